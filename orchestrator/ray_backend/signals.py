"""Ctrl-C, SIGTERM, SIGHUP and stop flags turned into one event, with things to do at once when it is set."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_log = logging.getLogger(__name__)


class Interruption:
    """Set once by a signal or by `request`; `ray job stop` kills 3 s after its SIGTERM, so actions are quick."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal: int | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    def add_callback(self, action: Callable[[], None]) -> None:
        """Call `action`, from a thread of its own, when the event is set; at once when it is already."""
        with self._lock:
            self._callbacks.append(action)
            if self.event.is_set():
                threading.Thread(target=self._run_callbacks, args=([action],), name="interrupt", daemon=True).start()

    def remove_callback(self, action: Callable[[], None]) -> None:
        """Do not call `action` any more."""
        with self._lock:
            if action in self._callbacks:
                self._callbacks.remove(action)

    def request_stop(self, number: int | None = None) -> None:
        """Set the event, as a signal would."""
        with self._lock:
            if self.event.is_set():
                return
            self.signal = number
            self.event.set()
            threading.Thread(
                target=self._run_callbacks, args=(list(self._callbacks),), name="interrupt", daemon=True
            ).start()

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells have it; that of SIGTERM for a stop flag."""
        return 128 + (self.signal or signal.SIGTERM)

    def _run_callbacks(self, actions: list[Callable[[], None]]) -> None:
        for action in actions:
            try:
                action()
            except Exception:  # one action's failure must not keep the others from being done
                _log.exception("interrupt: an action failed")


def get_stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a job: SIGHUP, of a closed terminal, only where the job's starter did not ignore it.

    `nohup` ignores it, for a job that is to outlive its terminal.
    """
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGINT, signal.SIGTERM, *hangup


@contextmanager
def shield_children_from_hangup() -> Iterator[None]:
    """Have the processes that this thread starts in the block outlive a closed terminal: their driver ends them.

    The kernel sends SIGHUP to all that runs in a terminal's foreground, Ray's own processes included, which the
    workers need in order to save. A signal mask is inherited by what is started; Ray itself treats SIGINT like this.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def catch_stop_signals() -> Iterator[Interruption]:
    """An Interruption fed by `ending_signals` while the block runs; a second of them ends the process at once.

    A SIGHUP never counts as the second: one closed terminal sends several. Must be entered in the main thread. Training
    code runs in other threads, where no handler would be called.
    """
    interruption = Interruption()
    asked = False

    def handler(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = asked or (interruption.event.is_set() and interruption.signal != signal.SIGHUP)
        if asked and number != signal.SIGHUP:
            os._exit(128 + number)
        asked = asked or number != signal.SIGHUP
        interruption.request_stop(number)

    before = {number: signal.signal(number, handler) for number in get_stop_signals()}
    try:
        yield interruption
    finally:
        for number, old in before.items():
            signal.signal(number, old)
