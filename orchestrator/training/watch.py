"""What rank 0 looks after behind the training's back: wishes to stop, later attempts, its own signs of life."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal

from orchestrator.config.json_text import parse_json
from orchestrator.storage import files
from orchestrator.training.attempts import Attempt

POLL_SECONDS = 1.0
FENCE_SECONDS = 5.0
BEAT_SECONDS = 2.0

Wish = Literal["go-on", "save-and-stop", "stop", "superseded"]

_log = logging.getLogger(__name__)


class Watch:
    """A thread that polls storage. Not to know is not to stop: a failed query ends no healthy run (pitfalls E44)."""

    def __init__(
        self, attempt: Attempt, stop_flag: str, successor: str, on_wish: Callable[[], None] = lambda: None
    ) -> None:
        """on_wish: called in a thread of the watch at the first wish."""
        self.samples = 0  # set by the training thread; goes into the signs of life
        self._on_wish = on_wish
        self._attempt, self._stop_flag, self._successor = attempt, stop_flag, successor
        self._wish: Wish = "go-on"
        self._ended = threading.Event()
        actions = {"look": (self._look, POLL_SECONDS), "fence": (self._fence, FENCE_SECONDS)}
        actions["beat"] = (self._beat, BEAT_SECONDS)
        for name, arguments in actions.items():
            # Each on its own: a request that hangs holds up no other.
            threading.Thread(target=self._repeat, args=arguments, name=f"watch-{name}", daemon=True).start()

    @property
    def wish(self) -> Wish:
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

    def _look(self) -> None:
        if self._wish == "go-on" and files.exists(self._stop_flag):
            self._set("save-and-stop" if _saves(files.read_bytes(self._stop_flag)) else "stop")

    def _fence(self) -> None:
        if self._attempt.superseded() or (self._successor and files.exists(self._successor)):
            self._set("superseded")

    def _beat(self) -> None:
        self._attempt.beat(self.samples)

    def _set(self, wish: Wish) -> None:
        first = self._wish == "go-on"
        if self._wish != "superseded":
            self._wish = wish
        if first:
            self._on_wish()


def _saves(flag: bytes) -> bool:
    """Whether a stop flag wants a checkpoint first: unless it says otherwise."""
    try:
        found = parse_json(flag)
    except ValueError:
        return True
    return not (isinstance(found, dict) and found.get("save") is False)
