"""Tracking URIs: validation, redaction of their secrets, and sqlite stores whose folder may be moved."""

from __future__ import annotations

import logging
import os
import posixpath
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from orchestrator.config.redaction import find_credentials_end, redact
from orchestrator.storage import urls
from orchestrator.tracking.tracker import TrackingError

ARTIFACT_FOLDER = "mlflow-artifacts"
# Columns of MLflow's schema that hold locations of artifacts.
_LOCATION_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_UNQUOTED_CHARACTERS = re.compile(r"[/?#\[\]\s]")
_USERINFO = re.compile(r"(?<=://)[^/\s]+@")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackingUri:
    """An accepted URI.

    raw: with secrets. redacted: for people and logs. sqlite_path: absolute path, or None for a server.
    """

    raw: str
    redacted: str
    sqlite_path: str | None
    secrets: tuple[str, ...] = ()

    @property
    def base_url(self) -> str:
        """The URI without user, password and query; a path may follow."""
        return _USERINFO.sub("", self.raw.partition("?")[0]).rstrip("/")

    def redact(self, text: str) -> str:
        """Return the text without this URI's user and password, quoted or not."""
        text = text.replace(self.raw, self.redacted)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return _USERINFO.sub("***@", text)


def parse_tracking_uri(uri: str) -> TrackingUri:
    """Return a parsed http(s) URI, or sqlite URI with an absolute path. Raises TrackingError for any other."""
    before, separator, rest = uri.partition("://")
    end = find_credentials_end(rest, before)
    bare, _, query = rest[end:].partition("?")
    shown = before + separator + ("***@" if end else "") + bare + ("?***" if query else "")
    scheme = uri.partition(":")[0].partition("+")[0].lower() if ":" in uri else ""
    if scheme == "sqlite":
        return TrackingUri(uri, shown, _sqlite_path(uri))
    if scheme not in ("http", "https"):
        reason = f"scheme {scheme!r} is not supported"
        if scheme in ("", "file"):
            reason = "is a folder: MLflow has retired its file store"
        raise TrackingError(
            f"tracking uri {redact(shown)!r}: {reason}; give http(s)://host:port of an MLflow server, or "
            "sqlite:////absolute/path/mlflow.db"
        )
    if _UNQUOTED_CHARACTERS.search(rest[: max(0, end - 1)]):
        raise TrackingError(
            f"tracking uri {shown!r}: user and password must be quoted, such as %2F for /; or leave them "
            "out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    try:
        parts = urlsplit(uri)
        if not parts.hostname or parts.port == 0:  # reading an invalid port raises
            raise ValueError("has no host")
    except ValueError as error:
        raise TrackingError(f"tracking uri {shown!r}: {error}; give for example http://mlflow:5000") from None
    # Without a password the user name may be a token; with one it is a name, often a common word.
    candidates = (parts.password or parts.username, query)
    secrets = tuple(form for secret in candidates if secret for form in (secret, unquote(secret)))
    return TrackingUri(uri, shown, None, secrets)


def _sqlite_path(uri: str) -> str:
    path = unquote(uri.partition(":///")[2].partition("?")[0], errors="surrogateescape")
    if not path.startswith("/"):
        raise TrackingError(
            f"tracking uri {uri!r} has no absolute path: a relative or in-memory database would vanish with"
            " the job's working folder; give sqlite:////absolute/path/mlflow.db (four slashes)"
        )
    return re.sub(r"^//+", "/", posixpath.normpath(path))


def make_tracking_uri(path: str) -> str:
    """Return the tracking URI of an sqlite file, whose path SQLAlchemy decodes."""
    encoded = path.replace("%", "%25").replace("?", "%3F")
    # MLflow creates the parent folder of a path after "sqlite:///" without decoding it first.
    return ("sqlite:///" if encoded == path else "sqlite+pysqlite:///") + encoded


def open_sqlite(path: str) -> sqlite3.Connection:
    """Return a connection to an existing sqlite file, which waits seconds for its locks. Raises sqlite3.Error."""
    return sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, timeout=5.0)


def get_artifact_root(database: str) -> str:
    """Return the URL of the artifacts of the store in an sqlite file."""
    return urls.to_file_url(os.path.join(os.path.dirname(database), ARTIFACT_FOLDER))


def update_artifact_locations(database: str) -> None:
    """Correct the artifact locations in an sqlite file whose folder was moved, for which MLflow has no API.

    A location follows its store when it was in ARTIFACT_FOLDER beside it, and such a folder is beside the store now.
    A store that is read-only, locked or of another schema stays as it is, with a warning.
    """
    if not os.path.exists(database):
        return
    try:
        with closing(open_sqlite(database)) as store, store:
            folder = os.path.join(os.path.dirname(database), ARTIFACT_FOLDER)
            for table, column, old, new in list(_iter_moved_locations(store, folder)):
                store.execute(f"update {table} set {column} = ? where {column} = ?", (new, old))  # noqa: S608  constants
    except sqlite3.Error as error:
        _log.warning("MLflow store %s: its artifact locations could not be checked: %s", database, error)


def _iter_moved_locations(store: sqlite3.Connection, folder: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield table, column, old and new value of each location that has changed; folder: of the artifacts now."""
    for table, column in _LOCATION_COLUMNS if os.path.isdir(folder) else ():
        for (place,) in store.execute(f"select distinct {column} from {table}"):  # noqa: S608  constants
            old = _find_artifact_folder(place or "")
            if old and old != folder and not (os.path.isdir(old) and os.path.samefile(old, folder)):
                yield table, column, place, urls.to_file_url(folder + urls.to_local_path(place)[len(old) :])


def _find_artifact_folder(place: str) -> str:
    """Return the local path of the ARTIFACT_FOLDER that a location is, or is in; empty for any other location."""
    path = urls.to_local_path(place) if urls.is_local(place) else ""
    head, folder, rest = path.partition(f"/{ARTIFACT_FOLDER}")
    return head + folder if path.startswith("/") and folder and rest[:1] in ("", "/") else ""
