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

from orchestrator.training.config import PhaseTimeouts

POLL_SECONDS = 0.5
MAX_STEP_DURATIONS = 101
REPORT_TIMEOUT_SECONDS = 10.0
MAX_SLOW_WORK_SHOWN = 3  # of what takes long in other threads
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: to be tried again

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches the phases of one worker; one thread trains, others may save."""

    def __init__(self, limits: PhaseTimeouts, tell: Callable[[str, str], None], pulse_steps: int = 1) -> None:
        """tell: keeps a cause and the stacks of all threads; given TELL_SECONDS.

        pulse_steps: steps between looks at wishes.
        """
        self._pulse_steps = pulse_steps
        self._limits, self._tell = limits, tell
        self._phases: dict[str, tuple[float, float]] = {}  # phase: began (monotonic), limit in seconds
        self._describe: Callable[[], list[str]] = list
        self._trainer = threading.get_ident()
        self._steps: deque[float] = deque(maxlen=MAX_STEP_DURATIONS)
        self._last: float | None = None
        self._ended = threading.Event()
        self._start_phase("start", limits.start_seconds)
        threading.Thread(target=self._poll_phases, name="watchdog", daemon=True).start()

    def record_step(self) -> None:
        """A step was made; the next one is due."""
        now = time.monotonic()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now
        if self._phases.pop("start", None) is not None:
            self._restart_phase("stop")
        self._phases["step"] = (now, self._compute_step_limit())

    @contextmanager
    def watch_phase(self, name: str, limit: float) -> Iterator[None]:
        """Watch a phase of its own; no step is due meanwhile when it is the training thread's."""
        training = threading.get_ident() == self._trainer
        if training:
            self._phases.pop("step", None)
            self._phases.pop("start", None)
        self._start_phase(name, limit)
        try:
            yield
        finally:
            self._phases.pop(name, None)
            if training:
                self._last = None
                self._start_phase("step", self._compute_step_limit())
                self._restart_phase("stop")

    def expect_stop(self) -> None:
        """Expect training to end soon: it hears of it at a pulse."""
        slow = 3 * self._pulse_steps * max(list(self._steps), default=0.0)
        self._start_phase("stop", max(self._limits.stop_seconds, slow))

    def acknowledge_stop(self) -> None:
        """The training thread has heard of it."""
        self._phases.pop("stop", None)

    def set_slow_work_source(self, describe: Callable[[], list[str]]) -> None:
        """Have a cause name what `describe` returns: the work of other threads that takes long, the longest first."""
        self._describe = describe

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _start_phase(self, phase: str, limit: float) -> None:
        self._phases[phase] = (time.monotonic(), limit)

    def _restart_phase(self, phase: str) -> None:
        """Nobody could answer meanwhile: what is expected has all its time anew."""
        if (expected := self._phases.get(phase)) is not None:
            self._start_phase(phase, expected[1])

    def _compute_step_limit(self) -> float:
        usual = statistics.median(self._steps) if self._steps else 0.0
        return max(self._limits.step_seconds, self._limits.step_times * usual)

    def _poll_phases(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            now = time.monotonic()
            phases = dict(self._phases)
            busy = not phases.keys().isdisjoint(("start", "evaluation", "wait-for-save"))
            for phase, (began, limit) in phases.items():
                if now - began > limit and not (busy and phase == "stop"):
                    self._abort_process(phase, now - began, limit)
                    return

    def _abort_process(self, phase: str, seconds: float, limit: float) -> None:
        place = self._locate_training_thread()
        cause = f"no end of the phase {phase!r} after {seconds:.1f} s (limit {limit:.1f} s), in {place}"
        if slow := self._describe():
            more = f" and {len(slow) - MAX_SLOW_WORK_SHOWN} more" if len(slow) > MAX_SLOW_WORK_SHOWN else ""
            cause += f"; meanwhile: {'; '.join(slow[:MAX_SLOW_WORK_SHOWN])}{more}"
        _log.error("watchdog: %s; this worker ends itself", cause)
        # Storage may be what hangs: it gets its seconds, then the process ends anyhow.
        teller = threading.Thread(target=self._tell, args=(cause, dump_stacks()), name="watchdog-tells", daemon=True)
        teller.start()
        teller.join(REPORT_TIMEOUT_SECONDS)
        if not self._ended.is_set():  # else it came to its end meanwhile
            end_process()

    def _locate_training_thread(self) -> str:
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


def dump_stacks() -> str:
    """The Python stacks of all threads."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
