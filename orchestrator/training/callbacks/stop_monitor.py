"""Rank 0's monitor threads: stop flag, fencing, heartbeat."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from orchestrator.config.json_text import parse_json
from orchestrator.storage import file_io
from orchestrator.training.attempts import Attempt
from orchestrator.training.callbacks.callback import Callback
from orchestrator.training.config import Outcome
from orchestrator.training.rank_sync import SyncResult

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.trainer import Trainer

POLL_SECONDS = 1.0
FENCE_SECONDS = 5.0
BEAT_SECONDS = 2.0

StopRequest = Literal["go-on", "save-and-stop", "stop", "superseded"]

_log = logging.getLogger(__name__)


class StopMonitor(Callback):
    """Threads that poll storage. A failed poll is ignored, so that it ends no healthy run."""

    def __init__(
        self, attempt: Attempt, stop_flag: str, successor: str, on_request: Callable[[], None] = lambda: None
    ) -> None:
        """on_request: called in a thread of the monitor at the first request."""
        self.samples = 0  # set by the training thread; part of the heartbeat
        self._on_request = on_request
        self._attempt, self._stop_flag, self._successor = attempt, stop_flag, successor
        self._request: StopRequest = "go-on"
        self._ended = threading.Event()
        actions = {"look": (self._poll_stop_flag, POLL_SECONDS), "fence": (self._poll_fence, FENCE_SECONDS)}
        actions["beat"] = (self._write_heartbeat, BEAT_SECONDS)
        for name, arguments in actions.items():
            # A thread each: a request that hangs delays no other.
            threading.Thread(target=self._repeat, args=arguments, name=f"watch-{name}", daemon=True).start()

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        """Take the progress for the next heartbeat."""
        self.samples = trainer.state.progress.samples

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """End the threads."""
        self.close()

    @property
    def request(self) -> StopRequest:
        """The request to this attempt; "superseded" outweighs the others."""
        return self._request

    def close(self) -> None:
        """End the threads."""
        self._ended.set()

    def _repeat(self, action: Callable[[], None], seconds: float) -> None:
        while True:
            try:
                action()
            except OSError as error:
                _log.debug("stop monitor: %s", error)
            if self._ended.wait(seconds):
                return

    def _poll_stop_flag(self) -> None:
        if self._request == "go-on" and file_io.exists(self._stop_flag):
            self._set_request("save-and-stop" if _wants_checkpoint(file_io.read_bytes(self._stop_flag)) else "stop")

    def _poll_fence(self) -> None:
        if self._attempt.is_superseded() or (self._successor and file_io.exists(self._successor)):
            self._set_request("superseded")

    def _write_heartbeat(self) -> None:
        self._attempt.write_heartbeat(self.samples)

    def _set_request(self, request: StopRequest) -> None:
        is_first = self._request == "go-on"
        if self._request != "superseded":
            self._request = request
        if is_first:
            self._on_request()


def _wants_checkpoint(flag: bytes) -> bool:
    """Return whether a stop flag wants a checkpoint first, which it does unless it holds {"save": false}."""
    try:
        content = parse_json(flag)
    except ValueError:
        return True
    return not (isinstance(content, dict) and content.get("save") is False)
