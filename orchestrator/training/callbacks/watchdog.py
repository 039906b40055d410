"""Monitor threads of a worker: the watchdog that ends a process without progress, and rank 0's polls of storage."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from orchestrator.storage import file_io
from orchestrator.training.attempts import Attempt
from orchestrator.training.callbacks.callback import Callback
from orchestrator.training.config import Outcome, PhaseTimeouts
from orchestrator.training.rank_sync import SyncResult

if TYPE_CHECKING:  # trainer imports this module
    from orchestrator.training.trainer import Trainer

PHASE_POLL_SECONDS = 0.5
MAX_STEP_DURATIONS = 101
REPORT_TIMEOUT_SECONDS = 10.0
MAX_SLOW_WORK_SHOWN = 3  # of what takes long in other threads
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: a retry may succeed

# Of the stop monitor's threads.
POLL_SECONDS = 1.0
FENCE_SECONDS = 5.0
BEAT_SECONDS = 2.0

StopRequest = Literal["go-on", "save-and-stop", "stop", "superseded"]

_log = logging.getLogger(__name__)


class Watchdog(Callback):
    """Watches the phases of one worker; one thread trains, others may save."""

    def __init__(self, limits: PhaseTimeouts, report: Callable[[str, str], None], pulse_steps: int = 1) -> None:
        """report: records a cause and the stacks of all threads; it has REPORT_TIMEOUT_SECONDS.

        pulse_steps: steps between syncs, where training sees a stop request.
        """
        self.describe_slow_work: Callable[[], list[str]] = list  # of other threads, for a cause, the longest first
        self._limits, self._report, self._pulse_steps = limits, report, pulse_steps
        self._phases: dict[str, tuple[float, float]] = {}  # phase: began (monotonic), limit in seconds
        self._trainer = threading.get_ident()
        self._steps: deque[float] = deque(maxlen=MAX_STEP_DURATIONS)
        self._last: float | None = None
        self._ended = threading.Event()
        self._start_phase("start", limits.start_seconds)
        threading.Thread(target=self._poll_phases, name="watchdog", daemon=True).start()

    def on_step_end(self, trainer: Trainer | None = None) -> None:
        """Expect the next step."""
        now = time.monotonic()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now
        if self._phases.pop("start", None) is not None:
            self._restart_stop()
        self._phases["step"] = (now, self._compute_step_limit())

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        """End the phase "stop" when training has seen the request."""
        if sync.is_healthy and sync.sums.should_stop:
            self._phases.pop("stop", None)

    def on_end(self, trainer: Trainer | None = None, outcome: Outcome | None = None) -> None:
        """Stop watching."""
        self._ended.set()

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
                self._restart_stop()

    def expect_stop(self) -> None:
        """Expect training to end soon after the next sync, where it sees the stop request."""
        slow = 3 * self._pulse_steps * max(list(self._steps), default=0.0)
        self._start_phase("stop", max(self._limits.stop_seconds, slow))

    def _start_phase(self, phase: str, limit: float) -> None:
        self._phases[phase] = (time.monotonic(), limit)

    def _restart_stop(self) -> None:
        """Restart the clock of the phase "stop", which the training thread could not end meanwhile."""
        if (running := self._phases.get("stop")) is not None:
            self._start_phase("stop", running[1])

    def _compute_step_limit(self) -> float:
        usual = statistics.median(self._steps) if self._steps else 0.0
        return max(self._limits.step_seconds, self._limits.step_times * usual)

    def _poll_phases(self) -> None:
        while not self._ended.wait(PHASE_POLL_SECONDS):
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
        if slow := self.describe_slow_work():
            cause += f"; meanwhile: {'; '.join(slow[:MAX_SLOW_WORK_SHOWN])}"
        _log.error("watchdog: %s; this worker ends itself", cause)
        # Storage may be what hangs: after its seconds the process ends anyhow.
        arguments = (cause, _format_stacks())
        reporter = threading.Thread(target=self._report, args=arguments, name="watchdog-report", daemon=True)
        reporter.start()
        reporter.join(REPORT_TIMEOUT_SECONDS)
        if not self._ended.is_set():  # else training ended meanwhile
            os._exit(EXIT_STATUS)  # without waiting for its threads, which may hang

    def _locate_training_thread(self) -> str:
        """Return the innermost lines of the training thread: this package's, and the last."""
        frame = sys._current_frames().get(self._trainer)
        lines = [] if frame is None else traceback.extract_stack(frame)
        own_lines = [line for line in lines if f"{os.sep}orchestrator{os.sep}" in line.filename]
        chosen = (*own_lines[-1:], *lines[-1:])
        places = (f"{os.path.basename(line.filename)}:{line.lineno} {line.name}" for line in chosen)
        return " > ".join(dict.fromkeys(places)) or "a thread that has ended"


def _format_stacks() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {names.get(ident, str(ident)): frame for ident, frame in sys._current_frames().items()}
    return "\n".join(f"Thread {name}:\n{''.join(traceback.format_stack(frame))}" for name, frame in stacks.items())


class StopMonitor(Callback):
    """Rank 0's polls of storage for stop flag and later attempts, and its heartbeat; a failed poll is ignored."""

    def __init__(
        self, attempt: Attempt, stop_flag: str, successor: str, on_request: Callable[[], None] = lambda: None
    ) -> None:
        """on_request: called in a thread of the monitor at the first request."""
        self.samples = 0  # set by the training thread; part of the heartbeat
        self.request: StopRequest = "go-on"  # "superseded" outweighs the others
        self._on_request = on_request
        self._attempt, self._stop_flag, self._successor = attempt, stop_flag, successor
        self._ended = threading.Event()
        polls = (self._poll_stop_flag, POLL_SECONDS), (self._poll_fence, FENCE_SECONDS), (self._beat, BEAT_SECONDS)
        for arguments in polls:
            # A thread each: a request that hangs delays no other.
            threading.Thread(target=self._repeat, args=arguments, name="stop-monitor", daemon=True).start()

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        """Take the progress for the next heartbeat."""
        self.samples = trainer.state.progress.samples

    def on_end(self, trainer: Trainer | None = None, outcome: Outcome | None = None) -> None:
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
        if self.request == "go-on" and file_io.exists(self._stop_flag):
            saves = file_io.read_json_or_empty(self._stop_flag).get("save") is not False
            self._set_request("save-and-stop" if saves else "stop")

    def _poll_fence(self) -> None:
        if self._attempt.is_superseded() or (self._successor and file_io.exists(self._successor)):
            self._set_request("superseded")

    def _beat(self) -> None:
        self._attempt.write_heartbeat(self.samples)

    def _set_request(self, request: StopRequest) -> None:
        is_first = self.request == "go-on"
        if self.request != "superseded":
            self.request = request
        if is_first:
            self._on_request()
