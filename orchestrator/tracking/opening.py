"""Opens the tracker without holding a job up: a quick look that it is there, the seconds of opening beside the work.

Importing mlflow and making its database take seconds of a core, as long as all the rest of a run's start.
"""

from __future__ import annotations

import base64
import configparser
import json
import os
import sqlite3
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from orchestrator.tracking import default_store
from orchestrator.tracking import uri as uris
from orchestrator.tracking.tracker import Tracker

LOOK_SECONDS = 5.0
NICE = 10  # below training's; what it leaves of the cores is enough
# MLflow's own variables that change how a server is asked; with one of them only MLflow's client knows how.
_TLS = ("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH")

T = TypeVar("T")


def tracker(uri: str, experiment: str) -> Tracker:
    """The tracker of a URI; imports mlflow. Raises TrackingError for a URI that is refused."""
    made: Tracker = import_module("orchestrator.tracking.mlflow").MlflowTracker(uri, experiment)
    return made


def answers(uri: str) -> bool:
    """Whether a quick look shows a store that can be used. False says nothing: MLflow's client then has to be asked.

    Raises TrackingError for a URI that is refused.
    """
    parsed = uris.parse(uri)
    if parsed.sqlite_path is not None:
        return _sqlite(Path(parsed.sqlite_path))
    return parsed.database is None and _server(parsed)


def beside(call: Callable[[], T]) -> T:
    """What the call returns, done by a thread that takes only what other work leaves of the cores (on Linux)."""
    future: Future[T] = Future()

    def run() -> None:
        with suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="tracker-opens", daemon=True).start()
    return future.result()


_FILED = ("mlflow_tracking_username", "mlflow_tracking_password")


def _sqlite(path: Path) -> bool:
    if not path.exists():
        above = next(folder for folder in path.parents if folder.exists())
        return above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    try:
        with closing(
            sqlite3.connect(default_store.sqlite_uri(str(path), "rw"), uri=True, timeout=LOOK_SECONDS)
        ) as database:
            database.execute("select version_num from alembic_version").fetchone()
            database.execute("begin immediate")  # a read-only or locked database shows itself
            database.rollback()
    except sqlite3.Error:
        return False
    return True


def _server(parsed: uris.TrackingUri) -> bool:
    if any(os.environ.get(name) for name in _TLS):
        return False
    url = f"{parsed.link}/api/2.0/mlflow/experiments/search"
    request = urllib.request.Request(  # noqa: S310  only http and https get here
        url, json.dumps({"max_results": 1}).encode(), {"Content-Type": "application/json"}
    )
    if (credentials := _credentials(parsed.raw)) is not None:
        request.add_header("Authorization", credentials)
    try:
        with urllib.request.urlopen(request, timeout=LOOK_SECONDS) as answer:  # noqa: S310
            return bool(answer.status == 200 and isinstance(json.load(answer), dict))
    except (OSError, ValueError):
        return False


def _credentials(raw: str) -> str | None:
    """As MLflow's client finds them: in the URI, else in its variables, else in its file."""
    parts, kept = urlsplit(raw), configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, UnicodeDecodeError, OSError):
        kept.read(Path.home() / ".mlflow" / "credentials")
    filed = kept["mlflow"] if kept.has_section("mlflow") else {}
    name = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME") or filed.get(_FILED[0], "")
    word = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD") or filed.get(_FILED[1], "")
    if name and word:
        return "Basic " + base64.b64encode(f"{name}:{word}".encode()).decode()
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return f"Bearer {token}"
    return None
