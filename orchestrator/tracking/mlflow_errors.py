"""Advice about MLflow's errors: rejections, schema mismatches, no response. Importable without mlflow."""

from __future__ import annotations

import re
import shlex
import sys

# By this interpreter, so that printed commands work without an activated environment.
MLFLOW = f"{shlex.quote(sys.executable)} -m mlflow"

_REVISION_PATTERN = re.compile(r"database schema.*found version (\w+)|revision identified by '(\w+)'")
# "[Errno 111] Connection refused", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed ..."
_CAUSES = re.compile(r"\[(?:Errno -?\d+|SSL[^\]]*)\] ([\w :-]*\w)"), re.compile(r"Caused by \w+\([\"'](.+?)[\"']\)\)")
_DELETED_PATTERN = re.compile(r"the (run|experiment) (\w+) must be in the 'active' state\. current state is deleted")
# Pieces of an error's text in small letters, and the fix. The first match counts.
_FIX_BY_TEXT = (
    (
        r"certificate verify failed",
        "Set MLFLOW_TRACKING_SERVER_CERT_PATH where the driver runs to the file (PEM) of the certificate, or of the "
        "authority, that signed the server's.",
    ),
    (
        r"wrong_version_number|record layer failure",
        "The server speaks no TLS at that port: write http:// instead of https://.",
    ),
    (
        r"readonly database|unable to open database file",
        "Change the mode or owner of the database's file, or set another one with --tracking.",
    ),
    (
        r"not a database|malformed",
        "That file is no SQLite database, or a damaged one: restore it from a backup, or set another one with "
        "--tracking.",
    ),
    (r"disk is full", "Free space on the disk of the database."),
    (
        r"database is locked",
        "Another process holds the database: end it, or use an MLflow server, which takes many drivers.",
    ),
)
_FIX_BY_STATUS = {
    401: " Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the driver runs, or write them to "
    "~/.mlflow/credentials. Of a server that `make up` or `make ui` started: user orchestrator, password in "
    "~/.orchestrator/mlflow_password.",
    403: " This user may not write there: ask the server's administrator for the permission EDIT on the experiment, or "
    "set another one with --experiment.",
}


def explain_schema_mismatch(text: str, uri: str) -> str | None:
    """Return the fix for a database of another MLflow version; None for any other error. uri: its own, redacted."""
    match = _REVISION_PATTERN.search(text)
    if match is None:
        return None
    return (
        f"its database has the schema of another MLflow (revision {match[1] or match[2]}): of an older one, back the "
        f"database up, then run {MLFLOW} db upgrade {uri}; of a newer one, install that version of mlflow where the "
        "driver runs, or set another database with --tracking"
    )


def explain_rejection(status: int, text: str, uri: str = "") -> str:
    """Return the fix for an error that recurs; empty when the answer itself states it.

    status: of HTTP. uri: the tracking URI, redacted.
    """
    low = text.lower()
    if status == 403 and "host header" in low:
        return " Use a name in the server's MLFLOW_SERVER_ALLOWED_HOSTS (--allowed-hosts), or add this one there."
    if status in _FIX_BY_STATUS:
        return _FIX_BY_STATUS[status]
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
    if fix := next((fix for pattern, fix in _FIX_BY_TEXT if re.search(pattern, text.lower())), None):
        return fix
    if in_file:
        return "Is the folder writable, the disk full, the file a database of this MLflow version?"
    return (
        "Check that the server runs and the address is right (ADDRESS/health answers; https:// if it speaks TLS); "
        "set another one with --tracking"
    )
