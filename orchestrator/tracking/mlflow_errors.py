"""Advice about MLflow's errors: rejections, schema mismatches, no response. Importable without mlflow."""

from __future__ import annotations

import re
import shlex
import sys

from orchestrator.tracking.tracker import TrackerUnreachableError, TrackingError
from orchestrator.tracking.tracking_uri import TrackingUri

# By this interpreter, so that printed commands work without an activated environment.
MLFLOW = f"{shlex.quote(sys.executable)} -m mlflow"

_REVISION_PATTERN = re.compile(r"database schema.*found version (\w+)|revision identified by '(\w+)'")
# "[Errno 111] Connection refused", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed ..."
_CAUSES = re.compile(r"\[(?:Errno -?\d+|SSL[^\]]*)\] ([\w :-]*\w)"), re.compile(r"Caused by \w+\([\"'](.+?)[\"']\)\)")
_DELETED_PATTERN = re.compile(r"the (run|experiment) (\w+) must be in the 'active' state\. current state is deleted")
# Pieces of an error's text in small letters, and the fix. The first match counts.
_FIX_BY_TEXT = {
    r"certificate verify failed": "Set MLFLOW_TRACKING_SERVER_CERT_PATH where the driver runs to the file (PEM) of the "
    "certificate, or of the authority, that signed the server's.",
    r"wrong_version_number|record layer failure": "The server speaks no TLS at that port: write http:// instead of "
    "https://.",
    r"readonly database|unable to open database file": "Change the mode or owner of the database's file, or set "
    "another one with --tracking.",
    r"not a database|malformed": "That file is no SQLite database, or a damaged one: restore it from a backup, or set "
    "another one with --tracking.",
    r"disk is full": "Free space on the disk of the database.",
    r"database is locked": "Another process holds the database: end it, or use an MLflow server, which takes many "
    "drivers.",
}
_FIX_OF_FILE = "Is the folder writable, the disk full, the file a database of this MLflow version?"
_FIX_OF_SERVER = (
    "Check that the server runs and the address is right (ADDRESS/health answers; https:// if it speaks TLS); set "
    "another one with --tracking"
)
# The same, behind the HTTP status, for an error that recurs.
_FIX_BY_REJECTION = {
    r"403 .*host header": "Use a name in the server's MLFLOW_SERVER_ALLOWED_HOSTS (--allowed-hosts), or add this one "
    "there.",
    r"401 ": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the driver runs, or write them to "
    "~/.mlflow/credentials. Of a server that `make up` or `make ui` started: user orchestrator, password in "
    "~/.orchestrator/mlflow_password.",
    r"403 ": "This user may not write there: ask the server's administrator for the permission EDIT on the experiment, "
    "or set another one with --experiment.",
    r".*<html": "Another service than MLflow answers there: give MLflow's address, with the path under which it is "
    "served.",
}


def make_error(text: str, status: int, uri: TrackingUri, doing: str) -> TrackingError:
    """Return the error of a call with its fix; TrackerUnreachableError for one that may not recur.

    text: of MLflow's error, without secrets. status: of HTTP, 0 without an answer. doing: what the call was to do.
    """
    place, low = uri.redacted, text.lower()
    if revision := _REVISION_PATTERN.search(text):
        return TrackingError(
            f"MLflow at {place} cannot {doing}: its database has the schema of another MLflow (revision "
            f"{revision[1] or revision[2]}): of an older one, back the database up, then run {MLFLOW} db upgrade "
            f"{place}; of a newer one, install that version of mlflow where the driver runs, or set another database "
            "with --tracking"
        )
    cause = (_summarize_silence(text) or text[:600]).rstrip(". ") + "."
    if 0 < status < 500 and status != 429:
        fixes = (fix for pattern, fix in _FIX_BY_REJECTION.items() if re.match(pattern, f"{status} {low}", re.DOTALL))
        fix = next(fixes, "")
        if deleted := _DELETED_PATTERN.search(low):
            command = format_restore_command(deleted[1], deleted[2], place)
            fix = (
                f"It was deleted in MLflow. To restore it: {command}. Left deleted, the next submission of the same "
                "command records the run anew."
            )
        return TrackingError(f"MLflow at {place} refused to {doing}: {cause} {fix}".rstrip())
    fixes = (fix for pattern, fix in _FIX_BY_TEXT.items() if re.search(pattern, low))
    fix = next(fixes, _FIX_OF_FILE if uri.sqlite_path else _FIX_OF_SERVER)
    return TrackerUnreachableError(f"MLflow at {place} cannot {doing}: {cause} {fix}")


def format_restore_command(kind: str, name: str, place: str) -> str:
    """Return the command that restores a deleted run or experiment. place: the tracking URI, redacted."""
    return f"MLFLOW_TRACKING_URI={place} {MLFLOW} {kind}s restore --{kind}-id {name}"


def _summarize_silence(text: str) -> str | None:
    """Return the reason in the long text of urllib3 or requests for no answer; None for any other error."""
    if "Max retries exceeded" not in text and "timeout exception" not in text:
        return None
    if "timed out" in text.lower():
        return "no answer in time"
    return next((match[1] for cause in _CAUSES if (match := cause.search(text)) is not None), None)
