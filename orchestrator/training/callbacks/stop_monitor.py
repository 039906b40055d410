"""What rank 0 looks after behind the training's back: wishes to stop, later attempts, its own signs of life."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal

from orchestrator.config.json_text import parse_json
from orchestrator.storage import file_io
from orchestrator.training.attempts import Attempt

POLL_SECONDS = 1.0
FENCE_SECONDS = 5.0
BEAT_SECONDS = 2.0

StopRequest = Literal["go-on", "save-and-stop", "stop", "superseded"]

_log = logging.getLogger(__name__)


class StopMonitor:
    """A thread that polls storage. Not to know is not to stop: a failed query ends no healthy run (pitfalls E44)."""

    def __init__(
        self, attempt: Attempt, stop_flag: str, successor: str, on_wish: Callable[[], None] = lambda: None
    ) -> None:
        """on_wish: called in a thread of the watch at the first wish."""
        self.samples = 0  # set by the training thread; goes into the signs of life
        self._on_wish = on_wish
        self._attempt, self._stop_flag, self._successor = attempt, stop_flag, successor
        self._wish: StopRequest = "go-on"
        self._ended = threading.Event()
        actions = {"look": (self._poll_stop_flag, POLL_SECONDS), "fence": (self._poll_fence, FENCE_SECONDS)}
        actions["beat"] = (self._write_heartbeat, BEAT_SECONDS)
        for name, arguments in actions.items():
            # Each on its own: a request that hangs holds up no other.
            threading.Thread(target=self._repeat, args=arguments, name=f"watch-{name}", daemon=True).start()

    @property
    def request(self) -> StopRequest:
        """What somebody wants of this attempt; the weightiest wish stays."""
        return self._wish

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _repeat(self, action: Callable[[], None], seconds: float) -> None:
        while True:
            try:
                action()
            except OSError as error:
                _log.debug("watch: %s", error)
            if self._ended.wait(seconds):
                return

    def _poll_stop_flag(self) -> None:
        if self._wish == "go-on" and file_io.exists(self._stop_flag):
            self._set_request("save-and-stop" if _wants_checkpoint(file_io.read_bytes(self._stop_flag)) else "stop")

    def _poll_fence(self) -> None:
        if self._attempt.is_superseded() or (self._successor and file_io.exists(self._successor)):
            self._set_request("superseded")

    def _write_heartbeat(self) -> None:
        self._attempt.write_heartbeat(self.samples)

    def _set_request(self, wish: StopRequest) -> None:
        first = self._wish == "go-on"
        if self._wish != "superseded":
            self._wish = wish
        if first:
            self._on_wish()


def _wants_checkpoint(flag: bytes) -> bool:
    """Whether a stop flag wants a checkpoint first: unless it says otherwise."""
    try:
        found = parse_json(flag)
    except ValueError:
        return True
    return not (isinstance(found, dict) and found.get("save") is False)
