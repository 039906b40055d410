"""Ends a process that makes no progress, with a named cause, so that its run is started again."""

from __future__ import annotations

import faulthandler
import logging
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.training.job import Limits

POLL_SECONDS = 0.5
STEPS_KEPT = 101
TELL_SECONDS = 10.0
NAMED = 3  # of what takes long in other threads
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: to be tried again

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches the phases of one worker; one thread trains, others may save."""

    def __init__(self, limits: Limits, tell: Callable[[str, str], None], pulse_steps: int = 1) -> None:
        """tell: keeps a cause and the stacks of all threads; given TELL_SECONDS.

        pulse_steps: steps between looks at wishes.
        """
        self._pulse_steps = pulse_steps
        self._limits, self._tell = limits, tell
        self._phases: dict[str, tuple[float, float]] = {}  # phase: began (monotonic), limit in seconds
        self._describe: Callable[[], list[str]] = list
        self._trainer = threading.get_ident()
        self._steps: deque[float] = deque(maxlen=STEPS_KEPT)
        self._last: float | None = None
        self._ended = threading.Event()
        self._begin("start", limits.start_seconds)
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def step(self) -> None:
        """A step was made; the next one is due."""
        now = time.monotonic()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now
        if self._phases.pop("start", None) is not None:
            self._again("stop")
        self._phases["step"] = (now, self._step_limit())

    @contextmanager
    def phase(self, name: str, limit: float) -> Iterator[None]:
        """Watch a phase of its own; no step is due meanwhile when it is the training thread's."""
        training = threading.get_ident() == self._trainer
        if training:
            self._phases.pop("step", None)
            self._phases.pop("start", None)
        self._begin(name, limit)
        try:
            yield
        finally:
            self._phases.pop(name, None)
            if training:
                self._last = None
                self._begin("step", self._step_limit())
                self._again("stop")

    def asked_to_stop(self) -> None:
        """Expect training to end soon: it hears of it at a pulse."""
        slow = 3 * self._pulse_steps * max(list(self._steps), default=0.0)
        self._begin("stop", max(self._limits.stop_seconds, slow))

    def stopping(self) -> None:
        """The training thread has heard of it."""
        self._phases.pop("stop", None)

    def explain_by(self, describe: Callable[[], list[str]]) -> None:
        """Have a cause name what `describe` returns: the work of other threads that takes long, the longest first."""
        self._describe = describe

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _begin(self, phase: str, limit: float) -> None:
        self._phases[phase] = (time.monotonic(), limit)

    def _again(self, phase: str) -> None:
        """Nobody could answer meanwhile: what is expected has all its time anew."""
        if (expected := self._phases.get(phase)) is not None:
            self._begin(phase, expected[1])

    def _step_limit(self) -> float:
        usual = statistics.median(self._steps) if self._steps else 0.0
        return max(self._limits.step_seconds, self._limits.step_times * usual)

    def _run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            now = time.monotonic()
            phases = dict(self._phases)
            busy = not phases.keys().isdisjoint(("start", "evaluation", "wait-for-save"))
            for phase, (began, limit) in phases.items():
                if now - began > limit and not (busy and phase == "stop"):
                    self._fire(phase, now - began, limit)
                    return

    def _fire(self, phase: str, seconds: float, limit: float) -> None:
        cause = f"no end of the phase {phase!r} after {seconds:.1f} s (limit {limit:.1f} s), in {self._where()}"
        if slow := self._describe():
            more = f" and {len(slow) - NAMED} more" if len(slow) > NAMED else ""
            cause += f"; meanwhile: {'; '.join(slow[:NAMED])}{more}"
        _log.error("watchdog: %s; this worker ends itself", cause)
        # Storage may be what hangs: it gets its seconds, then the process ends anyhow.
        teller = threading.Thread(target=self._tell, args=(cause, stacks()), name="watchdog-tells", daemon=True)
        teller.start()
        teller.join(TELL_SECONDS)
        if not self._ended.is_set():  # else it came to its end meanwhile
            end_process()

    def _where(self) -> str:
        """The innermost lines of the training thread: our own, and the last."""
        frame = sys._current_frames().get(self._trainer)
        if frame is None:
            return "a thread that is gone"
        found = traceback.extract_stack(frame)
        ours = [one for one in found if f"{os.sep}orchestrator{os.sep}" in one.filename]
        chosen = [*ours[-1:], *found[-1:]]
        return " > ".join(dict.fromkeys(f"{os.path.basename(one.filename)}:{one.lineno} {one.name}" for one in chosen))


def end_process() -> None:
    """End this process at once: its threads may hang, so nothing of it is waited for."""
    os._exit(EXIT_STATUS)


def stacks() -> str:
    """The Python stacks of all threads."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
