"""Where Ray Train's controllers say what they do: in a file of the driver's in Ray's session, not on the user's screen.

Ray's own set-up of these logs is for a controller that has a process to itself.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import ray
from ray.train.v2._internal.logging.logging import LoggingManager, SessionFileHandler

SWITCH = "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"  # of Ray's own set-up
NAME = "ray.train"

_run: ContextVar[str] = ContextVar("run", default="-")
_lock = threading.Lock()


@contextmanager
def of(run: str) -> Iterator[None]:
    """Mark what Ray Train says in this thread as that run's."""
    if os.environ.get(SWITCH) == "0":  # else the user wants Ray's
        _set_up()
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def _set_up() -> None:
    """Once for each session of Ray's."""
    logger = logging.getLogger(NAME)
    with _lock:
        for old in [one for one in logger.handlers if isinstance(one, _File)]:
            if old.folder == LoggingManager.get_log_directory():
                return
            logger.removeHandler(old)
        logger.addHandler(_File())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _File(SessionFileHandler):
    """A file that is named as Ray names a controller's."""

    def __init__(self) -> None:
        self.folder = LoggingManager.get_log_directory()
        super().__init__(f"ray-train-app-controller-{ray.get_runtime_context().get_worker_id()}.log")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(run)s: %(message)s"))
        self.addFilter(_name)


def _name(record: logging.LogRecord) -> bool:
    record.run = _run.get()
    return True
