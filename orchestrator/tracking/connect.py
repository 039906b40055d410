"""Open the tracker; beside other work where that cannot fail, since making a database takes seconds of a core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from orchestrator.tracking import tracking_uri as uris
from orchestrator.tracking.tracker import Tracker

LOW_PRIORITY_NICE = 10  # below training's; what it leaves of the cores is enough

T = TypeVar("T")


def open_tracker(uri: str, experiment: str) -> Tracker:
    """Return the tracker of a URI; imports mlflow, which takes more than a second. Raises TrackingError."""
    from orchestrator.tracking.mlflow_tracker import MlflowTracker  # MLflow takes seconds to import

    return MlflowTracker(uri, experiment)


def will_create_database(uri: str) -> bool:
    """Return whether the store is a database file that this job is going to make, in a folder where it can.

    Nothing else can be wrong with such a one. Whatever is there already can have another schema, a deleted experiment
    or no permission: only MLflow's client finds that out. Raises TrackingError for a URI that is refused.
    """
    path = uris.parse_tracking_uri(uri).sqlite_path
    if path is None or os.path.lexists(path):
        return False
    above = next(folder for folder in Path(path).parents if folder.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def run_at_low_priority(call: Callable[[], T]) -> T:
    """Return what the call returns, made by a thread that takes only what other work leaves of the cores (on Linux)."""
    future: Future[T] = Future()

    def run() -> None:
        with suppress(AttributeError, OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY_NICE)
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="tracker-opens", daemon=True).start()
    return future.result()
