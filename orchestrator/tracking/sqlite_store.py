"""Artifact locations of an sqlite store whose folder, with the artifacts, may be moved.

MLflow stores absolute locations and has no API to change them.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import quote

from orchestrator.storage import urls

ARTIFACT_FOLDER = "mlflow-artifacts"
BUSY_TIMEOUT_SECONDS = 10.0
# Columns of MLflow's schema that hold locations of artifacts.
_LOCATION_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_log = logging.getLogger(__name__)


def make_tracking_uri(path: str) -> str:
    """Return the tracking URI of an sqlite file, whose path SQLAlchemy decodes."""
    encoded = path.replace("%", "%25").replace("?", "%3F")
    # MLflow creates the parent folder of a path after "sqlite:///" without decoding it first.
    return ("sqlite:///" if encoded == path else "sqlite+pysqlite:///") + encoded


def make_sqlite_uri(path: str, mode: str) -> str:
    """Return the URI for sqlite3.connect(..., uri=True); mode: ro, rw."""
    return f"file:{quote(path)}?mode={mode}"


def get_artifact_root(database: str) -> str:
    """Return the URL of the artifacts of the store in an sqlite file."""
    return urls.to_file_url(os.path.join(os.path.dirname(database), ARTIFACT_FOLDER))


def resolve_artifact_location(database: str, place: str) -> str:
    """Return the present location of artifacts that an sqlite file records at `place`.

    A location follows its store when it was in ARTIFACT_FOLDER beside it, and such a folder is beside the store now.
    """
    old, new = _find_artifact_folder(place), os.path.join(os.path.dirname(database), ARTIFACT_FOLDER)
    if old is None or old == new or not os.path.isdir(new):
        return place
    if os.path.isdir(old) and os.path.samefile(old, new):
        return place
    return urls.to_file_url(new + urls.to_local_path(place)[len(old) :])


def update_artifact_locations(database: str) -> None:
    """Correct the artifact locations in an sqlite file whose folder was moved; change nothing in any other.

    A store that is read-only, locked or of another schema stays as it is, with a warning.
    """
    if not os.path.exists(database):
        return
    try:
        with closing(sqlite3.connect(make_sqlite_uri(database, "ro"), uri=True, timeout=BUSY_TIMEOUT_SECONDS)) as store:
            moved = list(_iter_moved_locations(store, database))
        if not moved:
            return
        with (
            closing(sqlite3.connect(make_sqlite_uri(database, "rw"), uri=True, timeout=BUSY_TIMEOUT_SECONDS)) as store,
            store,
        ):
            for table, column, old, new in moved:
                store.execute(f"update {table} set {column} = ? where {column} = ?", (new, old))  # noqa: S608  constants
    except sqlite3.Error as error:
        _log.warning("MLflow store %s: its artifact locations could not be checked: %s", database, error)


def _iter_moved_locations(store: sqlite3.Connection, database: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield table, column, old and new value of each location that has changed."""
    tables = {name for (name,) in store.execute("select name from sqlite_master where type = 'table'")}
    for table, column in _LOCATION_COLUMNS:
        if table in tables:
            for (place,) in store.execute(f"select distinct {column} from {table}").fetchall():  # noqa: S608  constants
                if place and (new := resolve_artifact_location(database, place)) != place:
                    yield table, column, place, new


def _find_artifact_folder(place: str) -> str | None:
    """Return the local path of the ARTIFACT_FOLDER that a location is, or is in; None for any other location."""
    if not urls.is_local(place) or not (path := urls.to_local_path(place)).startswith("/"):
        return None
    head, folder, rest = path.partition(f"/{ARTIFACT_FOLDER}")
    return head + folder if folder and rest[:1] in ("", "/") else None
