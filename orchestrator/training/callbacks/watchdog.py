"""Ends a process that makes no progress, with a named cause, so that the launcher starts its run again."""

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
from typing import TYPE_CHECKING

from orchestrator.training.callbacks.callback import Callback
from orchestrator.training.config import Outcome, PhaseTimeouts
from orchestrator.training.rank_sync import SyncResult

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.trainer import Trainer

POLL_SECONDS = 0.5
MAX_STEP_DURATIONS = 101
REPORT_TIMEOUT_SECONDS = 10.0
MAX_SLOW_WORK_SHOWN = 3  # of what takes long in other threads
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: a retry may succeed

_log = logging.getLogger(__name__)


class Watchdog(Callback):
    """Watches the phases of one worker; one thread trains, others may save."""

    def __init__(self, limits: PhaseTimeouts, report: Callable[[str, str], None], pulse_steps: int = 1) -> None:
        """report: records a cause and the stacks of all threads; it has REPORT_TIMEOUT_SECONDS.

        pulse_steps: steps between syncs, where training sees a stop request.
        """
        self._pulse_steps = pulse_steps
        self._limits, self._report = limits, report
        self._phases: dict[str, tuple[float, float]] = {}  # phase: began (monotonic), limit in seconds
        self._describe: Callable[[], list[str]] = list
        self._trainer = threading.get_ident()
        self._steps: deque[float] = deque(maxlen=MAX_STEP_DURATIONS)
        self._last: float | None = None
        self._ended = threading.Event()
        self._start_phase("start", limits.start_seconds)
        threading.Thread(target=self._poll_phases, name="watchdog", daemon=True).start()

    def on_step_end(self, trainer: Trainer) -> None:
        """Expect the next step."""
        self.record_step()

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        """End the phase "stop" when training has seen the request."""
        if sync.is_healthy and sync.sums.should_stop:
            self.acknowledge_stop()

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Stop watching."""
        self.close()

    def record_step(self) -> None:
        """Record the end of a step; the next one is due."""
        now = time.monotonic()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now
        if self._phases.pop("start", None) is not None:
            self._restart_phase("stop")
        self._phases["step"] = (now, self._compute_step_limit())

    @contextmanager
    def watch_phase(self, name: str, limit: float) -> Iterator[None]:
        """Watch a phase; when it is the training thread's, no step is due until it ends."""
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
        """Expect training to end soon after the next sync, where it sees the stop request."""
        slow = 3 * self._pulse_steps * max(list(self._steps), default=0.0)
        self._start_phase("stop", max(self._limits.stop_seconds, slow))

    def acknowledge_stop(self) -> None:
        """End the phase "stop": the training thread has seen the request."""
        self._phases.pop("stop", None)

    def set_slow_work_source(self, describe: Callable[[], list[str]]) -> None:
        """Name in a cause what `describe` returns: slow work of other threads, the longest first."""
        self._describe = describe

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _start_phase(self, phase: str, limit: float) -> None:
        self._phases[phase] = (time.monotonic(), limit)

    def _restart_phase(self, phase: str) -> None:
        """Restart the clock of a phase that the training thread could not end meanwhile."""
        if (running := self._phases.get(phase)) is not None:
            self._start_phase(phase, running[1])

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
        # Storage may be what hangs: after its seconds the process ends anyhow.
        reporter = threading.Thread(
            target=self._report, args=(cause, dump_stacks()), name="watchdog-report", daemon=True
        )
        reporter.start()
        reporter.join(REPORT_TIMEOUT_SECONDS)
        if not self._ended.is_set():  # else training ended meanwhile
            end_process()

    def _locate_training_thread(self) -> str:
        """Return the innermost lines of the training thread: this package's, and the last."""
        frame = sys._current_frames().get(self._trainer)
        if frame is None:
            return "a thread that is gone"
        lines = traceback.extract_stack(frame)
        own_lines = [line for line in lines if f"{os.sep}orchestrator{os.sep}" in line.filename]
        chosen = [*own_lines[-1:], *lines[-1:]]
        return " > ".join(
            dict.fromkeys(f"{os.path.basename(line.filename)}:{line.lineno} {line.name}" for line in chosen)
        )


def end_process() -> None:
    """End this process immediately, without waiting for its threads, which may hang."""
    os._exit(EXIT_STATUS)


def dump_stacks() -> str:
    """Return the Python stacks of all threads."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
