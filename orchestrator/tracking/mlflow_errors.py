"""What to do about an MLflow that refuses or does not answer. Importable without mlflow."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable

# Commands of MLflow as this interpreter has it: those printed run where no environment is active.
MLFLOW = f"{shlex.quote(sys.executable)} -m mlflow"

_REVISION_PATTERN = re.compile(r"found version (\w+)|revision identified by '(\w+)'")
# "[Errno 111] Connection refused", "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed ..."
_CAUSES = re.compile(r"\[(?:Errno -?\d+|SSL[^\]]*)\] ([\w :-]*\w)"), re.compile(r"Caused by \w+\([\"'](.+?)[\"']\)\)")
_DELETED_PATTERN = re.compile(r"the (run|experiment) (\w+) must be in the 'active' state\. current state is deleted")
# A piece of an error's text in small letters, and what mends it. The first that fits counts.
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


def explain_schema_mismatch(text: str, shown: str, is_known: Callable[[str], bool]) -> str | None:
    """Return what to do about a database of another MLflow version; None when the error is about something else.

    shown: the database's URI. is_known: whether the installed MLflow knows a revision of the schema.
    """
    found = _REVISION_PATTERN.search(text)
    if found is None or not ("database schema" in text or "revision identified" in text):
        return None
    revision = found.group(1) or found.group(2)
    # Absent: a database whose first migration never ran.
    if revision == "None" or is_known(revision):
        return (
            f"its database has the schema of an older MLflow (revision {revision}); back the database up, then run "
            f"{MLFLOW} db upgrade {shown}"
        )
    return (
        f"its database has the schema of a newer MLflow (revision {revision}); install that version of mlflow where "
        "the driver runs, or set another database with --tracking"
    )


def explain_rejection(status: int, text: str, shown: str = "") -> str:
    """Return the fix for what would be the same later; empty when only the answer itself tells it.

    status: of HTTP; 0 when nothing was asked. shown: the tracking URI.
    """
    low = text.lower()
    if status == 0:
        return (
            " What speaks to that database is not installed: write the URI as postgresql+psycopg2://... with "
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
        return " What answers there is not MLflow: give its address, with the path under which it is served."
    if deleted := _DELETED_PATTERN.search(low):
        what, name = deleted.groups()
        return (
            f" Somebody deleted it in MLflow. To have it back: MLFLOW_TRACKING_URI={shown} {MLFLOW} {what}s restore "
            f"--{what}-id {name}. Left deleted, the next submission of the same command records the run anew."
        )
    return ""


def summarize_silence(text: str) -> str | None:
    """Return why urllib3 or requests got no answer, out of their long text; None for any other error."""
    if "Max retries exceeded" not in text and "timeout exception" not in text:
        return None
    if "timed out" in text.lower():
        return "no answer in time"
    return next((found[1] for cause in _CAUSES if (found := cause.search(text)) is not None), None)


def explain_no_response(in_file: bool, text: str = "") -> str:
    """Return what to look at when a store does not answer; in_file: it is a database in a file."""
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
