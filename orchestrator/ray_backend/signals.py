"""Ctrl-C, SIGTERM, SIGHUP and stop flags as one event, with callbacks that run when it is set."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_log = logging.getLogger(__name__)


class Interruption:
    """An event that a signal or `request_stop` sets once, with callbacks.

    `ray job stop` kills 3 s after its SIGTERM, so each callback has a thread of its own.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.signal: int | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.RLock()

    def add_callback(self, action: Callable[[], None]) -> None:
        """Call `action`, from another thread, when the event is set; immediately when it is set already."""
        with self._lock:
            self._callbacks.append(action)
            if self.event.is_set():
                _start_callbacks([action])

    @contextmanager
    def calling(self, action: Callable[[], None]) -> Iterator[None]:
        """Call `action`, as `add_callback` does, while the block runs."""
        self.add_callback(action)
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(action)

    def request_stop(self, number: int | None = None) -> None:
        """Set the event, as the signal of that number would."""
        with self._lock:
            if not self.event.is_set():
                self.signal = number
                self.event.set()
                _start_callbacks(self._callbacks)

    @property
    def exit_status(self) -> int:
        """The exit status of a job that was stopped: 128 + the signal's number; that of SIGTERM for a stop flag."""
        return 128 + (self.signal or signal.SIGTERM)


def _start_callbacks(actions: Sequence[Callable[[], None]]) -> None:
    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            _log.exception("interrupt: an action failed")

    for action in actions:
        threading.Thread(target=run, args=(action,), name="interrupt", daemon=True).start()


def get_stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that end a job: SIGHUP, of a closed terminal, only where the job's starter did not ignore it.

    `nohup` ignores it, for a job that is to outlive its terminal.
    """
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGINT, signal.SIGTERM, *hangup


@contextmanager
def shield_children_from_hangup() -> Iterator[None]:
    """Let the processes that this thread starts in the block outlive a closed terminal: their driver ends them.

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
    """Yield an Interruption that stop signals set while the block runs; the second signal ends the process immediately.

    A SIGHUP never counts as the second: one closed terminal sends several. Must be entered in the main thread.
    """
    interruption = Interruption()
    signaled = False

    def handler(number: int, _frame: FrameType | None) -> None:
        nonlocal signaled
        signaled = signaled or (interruption.event.is_set() and interruption.signal != signal.SIGHUP)
        if signaled and number != signal.SIGHUP:
            os._exit(128 + number)
        signaled = signaled or number != signal.SIGHUP
        # Not here: the thread that the signal interrupts may hold the lock of the event.
        threading.Thread(target=interruption.request_stop, args=(number,), name="signal", daemon=True).start()

    before = {number: signal.signal(number, handler) for number in get_stop_signals()}
    try:
        yield interruption
    finally:
        for number, old in before.items():
            signal.signal(number, old)
