"""What to do about an MLflow that refuses or does not answer. Importable without mlflow."""

from __future__ import annotations


def on_refusal(status: int, text: str) -> str:
    """The fix for what would be the same later; empty when only the answer itself tells it.

    status: of HTTP; 0 when nobody was asked.
    """
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
    if status == 403 and "host header" in text.lower():
        return " Use a name in the server's MLFLOW_SERVER_ALLOWED_HOSTS (--allowed-hosts), or add this one there."
    return " This user may not do that: ask the server's administrator for the permission." if status == 403 else ""


def on_silence(in_file: bool) -> str:
    """What to look at when it does not answer; in_file: it is a database in a file."""
    if in_file:
        return "Is the folder writable, the disk full, the file a database of this MLflow version?"
    return "Is the server up, the address right (try ADDRESS/health)? Or give another URI"
