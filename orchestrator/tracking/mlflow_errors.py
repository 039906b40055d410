"""Advice about MLflow's errors: rejections, schema mismatches, no response. Importable without mlflow."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable

# By this interpreter, so that printed commands work without an activated environment.
MLFLOW = f"{shlex.quote(sys.executable)} -m mlflow"

_REVISION_PATTERN = re.compile(r"found version (\w+)|revision identified by '(\w+)'")
# "[Errno 111] Connection refused", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed ..."
_CAUSES = re.compile(r"\[(?:Errno -?\d+|SSL[^\]]*)\] ([\w :-]*\w)"), re.compile(r"Caused by \w+\([\"'](.+?)[\"']\)\)")
_DELETED_PATTERN = re.compile(r"the (run|experiment) (\w+) must be in the 'active' state\. current state is deleted")
# A piece of an error's text in small letters, and the fix. The first match counts.
_FIX_BY_TEXT = (
    (
        "certificate verify failed",
        "Set MLFLOW_TRACKING_SERVER_CERT_PATH where the driver runs to the file (PEM) of the certificate, or of the "
        "authority, that signed the server's.",
    ),
    ("wrong_version_number", "The server speaks no TLS at that port: write http:// instead of https://."),
    ("record layer failure", "The server speaks no TLS at that port: write http:// instead of https://."),
    (
        "readonly database",
        "This user may not write the database's file: change its mode or owner, or set another one with --tracking.",
    ),
    ("unable to open database file", "Change the mode or owner of the file, or set another one with --tracking."),
    (
        "not a database",
        "That file is no SQLite database, or a damaged one: restore it from a backup, or set another one with "
        "--tracking.",
    ),
    (
        "malformed",
        "The database is damaged: restore it from a backup, or set another one with --tracking.",
    ),
    ("disk is full", "Free space on the disk of the database."),
    (
        "database is locked",
        "Another process holds the database: end it, or use an MLflow server, which takes many drivers.",
    ),
)


def explain_schema_mismatch(text: str, uri: str, is_known: Callable[[str], bool]) -> str | None:
    """Return the fix for a database of another MLflow version; None for any other error.

    uri: the database's, redacted. is_known: whether the installed MLflow knows a revision of the schema.
    """
    match = _REVISION_PATTERN.search(text)
    if match is None or not ("database schema" in text or "revision identified" in text):
        return None
    revision = match.group(1) or match.group(2)
    # "None": the first migration of the database never ran.
    if revision == "None" or is_known(revision):
        return (
            f"its database has the schema of an older MLflow (revision {revision}); back the database up, then run "
            f"{MLFLOW} db upgrade {uri}"
        )
    return (
        f"its database has the schema of a newer MLflow (revision {revision}); install that version of mlflow where "
        "the driver runs, or set another database with --tracking"
    )


def explain_rejection(status: int, text: str, uri: str = "") -> str:
    """Return the fix for an error that recurs; empty when the answer itself states it.

    status: of HTTP; 0 when no request was sent. uri: the tracking URI, redacted.
    """
    low = text.lower()
    if status == 0:
        return (
            " The driver of that database is not installed: write the URI as postgresql+psycopg2://... with "
            "the package psycopg2-binary, or give an MLflow server's address."
        )
    if status == 401:
        return (
            " Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the driver runs, or write them to "
            "~/.mlflow/credentials. Of a server that `make up` or `make ui` started: user orchestrator, password in "
            "~/.orchestrator/mlflow_password."
        )
    if status == 403 and "host header" in low:
        return " Use a name in the server's MLFLOW_SERVER_ALLOWED_HOSTS (--allowed-hosts), or add this one there."
    if status == 403:
        return (
            " This user may not write there: ask the server's administrator for the permission EDIT on the experiment, "
            "or set another one with --experiment."
        )
    if "<html" in low:
        return (
            " Another service than MLflow answers there: give MLflow's address, with the path under which it is served."
        )
    if deleted := _DELETED_PATTERN.search(low):
        kind, name = deleted.groups()
        return (
            f" It was deleted in MLflow. To restore it: MLFLOW_TRACKING_URI={uri} {MLFLOW} {kind}s restore "
            f"--{kind}-id {name}. Left deleted, the next submission of the same command records the run anew."
        )
    return ""


def summarize_silence(text: str) -> str | None:
    """Return the reason in the long text of urllib3 or requests for no answer; None for any other error."""
    if "Max retries exceeded" not in text and "timeout exception" not in text:
        return None
    if "timed out" in text.lower():
        return "no answer in time"
    return next((match[1] for cause in _CAUSES if (match := cause.search(text)) is not None), None)


def explain_no_response(in_file: bool, text: str = "") -> str:
    """Return what to check when a store does not answer; in_file: it is a database in a file."""
    low = text.lower()
    for piece, fix in _FIX_BY_TEXT:
        if piece in low:
            return fix
    if in_file:
        return "Is the folder writable, the disk full, the file a database of this MLflow version?"
    return (
        "Check that the server runs and the address is right (ADDRESS/health answers; https:// if it speaks TLS); "
        "set another one with --tracking"
    )
