"""Tracking URIs: validation, and redaction of their secrets."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from orchestrator.config.redaction import find_credentials_end, redact
from orchestrator.tracking.tracker import TrackingError

_SERVER_SCHEMES = ("http", "https")
_DATABASE_SCHEMES = ("postgresql", "mysql", "mssql")
_DEFAULT_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_UNQUOTED_CHARACTERS = re.compile(r"[/?#\[\]\s]")
_USERINFO = re.compile(r"(?<=://)[^/\s]+@")


@dataclass(frozen=True)
class TrackingUri:
    """An accepted URI.

    raw: with secrets. redacted: for people and logs. sqlite_path: absolute path, or None.
    database: (host, port) of a database server that this process connects to, or None.
    """

    raw: str
    redacted: str
    sqlite_path: str | None
    database: tuple[str, int] | None
    secrets: tuple[str, ...]

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
    """Return a parsed http(s) URI, sqlite URI with an absolute path, or SQL database URI.

    Raises TrackingError for any other, with the reason and what to give instead.
    """
    before, separator, rest = uri.partition("://")
    end = find_credentials_end(rest, before)
    bare, _, query = rest[end:].partition("?")
    shown = before + separator + ("***@" if end else "") + bare + ("?***" if query else "")
    scheme = uri.partition(":")[0].partition("+")[0].lower() if ":" in uri else ""
    if scheme == "sqlite":
        return TrackingUri(uri, shown, _sqlite_path(uri), None, ())
    if scheme not in _SERVER_SCHEMES + _DATABASE_SCHEMES:
        raise TrackingError(_explain_unsupported(redact(shown), scheme))
    if _UNQUOTED_CHARACTERS.search(rest[: max(0, end - 1)]):
        raise TrackingError(
            f"tracking uri {shown!r}: user and password must be quoted, such as %2F for /; or leave them "
            "out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TrackingError(f"tracking uri {shown!r}: {error}; give scheme://host:port") from None
    if not host:
        raise TrackingError(f"tracking uri {shown!r} has no host; give for example http://mlflow:5000")
    # Without a password the user name may be a token; with one it is a name, often a common word.
    candidates = (parts.password or parts.username, query)
    secrets = tuple(form for secret in candidates if secret for form in (secret, unquote(secret)))
    database = (host, port or _DEFAULT_PORTS[scheme]) if scheme in _DATABASE_SCHEMES else None
    return TrackingUri(uri, shown, None, database, secrets)


def _sqlite_path(uri: str) -> str:
    path = unquote(uri.partition(":///")[2].partition("?")[0], errors="surrogateescape")
    if not path.startswith("/"):
        raise TrackingError(
            f"tracking uri {uri!r} has no absolute path: a relative or in-memory database would vanish with"
            " the job's working folder; give sqlite:////absolute/path/mlflow.db (four slashes)"
        )
    return re.sub(r"^//+", "/", posixpath.normpath(path))


def _explain_unsupported(shown: str, scheme: str) -> str:
    advice = "give http(s)://host:port of an MLflow server, or sqlite:////absolute/path/mlflow.db"
    if scheme == "file" or not scheme:
        return (
            f"tracking uri {shown!r} is a folder: MLflow has retired its file store (it raises unless"
            f" MLFLOW_ALLOW_FILE_STORE is set) and it corrupts under concurrent runs; {advice}"
        )
    return f"tracking uri {shown!r}: scheme {scheme!r} is not supported; {advice}"
