"""The sqlite store that lies in a folder with its artifacts, which may be moved: where its artifacts are now.

MLflow keeps absolute places and has no API to change them.
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
# Columns of MLflow's schema that hold places of artifacts.
_LOCATION_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_log = logging.getLogger(__name__)


def make_tracking_uri(path: str) -> str:
    """Return the tracking URI of a sqlite file, of which SQLAlchemy decodes the path."""
    encoded = path.replace("%", "%25").replace("?", "%3F")
    # Of a path after "sqlite:///" MLflow makes the parent folder without decoding it first.
    return ("sqlite:///" if encoded == path else "sqlite+pysqlite:///") + encoded


def make_sqlite_uri(path: str, mode: str) -> str:
    """Return what sqlite3.connect(..., uri=True) opens; mode: ro, rw."""
    return f"file:{quote(path)}?mode={mode}"


def get_artifact_root(database: str) -> str:
    """Return the URL under which experiments of the store in a sqlite file keep their artifacts."""
    return urls.to_file_url(os.path.join(os.path.dirname(database), ARTIFACT_FOLDER))


def resolve_artifact_location(database: str, place: str) -> str:
    """Return where artifacts lie now that the store in a sqlite file says are at `place`; `place` where they are there.

    A place follows its store when it was `FOLDER` beside it, and another such folder is beside the store now.
    """
    old, now = _find_artifact_folder(place), os.path.join(os.path.dirname(database), ARTIFACT_FOLDER)
    if old is None or old == now or not os.path.isdir(now):
        return place
    if os.path.isdir(old) and os.path.samefile(old, now):
        return place
    return urls.to_file_url(now + urls.to_local_path(place)[len(old) :])


def update_artifact_locations(database: str) -> None:
    """Correct the places of artifacts in a sqlite file whose folder was moved; nothing happens to any other.

    A store that may not be written, is locked or has another schema is left as it is, with a warning.
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
                store.execute(f"update {table} set {column} = ? where {column} = ?", (new, old))  # noqa: S608  ours
    except sqlite3.Error as error:
        _log.warning("MLflow store %s: the places of its artifacts could not be checked: %s", database, error)


def _iter_moved_locations(store: sqlite3.Connection, database: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield table, column, old and new value of each place that has changed."""
    tables = {name for (name,) in store.execute("select name from sqlite_master where type = 'table'")}
    for table, column in _LOCATION_COLUMNS:
        if table in tables:
            for (place,) in store.execute(f"select distinct {column} from {table}").fetchall():  # noqa: S608  ours
                if place and (now := resolve_artifact_location(database, place)) != place:
                    yield table, column, place, now


def _find_artifact_folder(place: str) -> str | None:
    """Return the local path of the folder named FOLDER that a place is, or is in; None for any other place."""
    if not urls.is_local(place) or not (path := urls.to_local_path(place)).startswith("/"):
        return None
    head, found, rest = path.partition(f"/{ARTIFACT_FOLDER}")
    return head + found if found and rest[:1] in ("", "/") else None
