"""Executes a plan: runs side by side, each isolated from the others' failures, on as many slots as the cluster has."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self

from orchestrator.checkpoint.checkpoint_dir import CheckpointFolder
from orchestrator.ray_backend.launch_errors import RunFailedError
from orchestrator.ray_backend.lease import LeaseHeldError
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler.run_plan import RunPlan
from orchestrator.training import attempts
from orchestrator.training.config import Outcome

RunPhase = Literal["waiting", "running", "finished", "stopped", "failed"]

# Pauses before a run whose launch failed is launched again (crashed workers are restarted by Ray). A run fails after
# more failures in a row than there are pauses, unless its checkpoints advanced in between.
BACKOFF_SECONDS = (5.0, 20.0, 60.0)
POLL_SECONDS = 0.5
CAPACITY_POLL_SECONDS = 5.0
JOIN_TIMEOUT_SECONDS = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """The end of a run: finished, stopped before its end, or failed with a reason."""

    status: RunPhase
    message: str
    outcome: Outcome | None = None


class CapacityMonitor:
    """Polls the cluster's slots in a thread while its `with` block runs, so that a query that hangs delays nothing.

    slots: workers that fit on the cluster at the same time. A query that fails leaves the last number.
    """

    def __init__(
        self,
        slots: int,
        query_slots: Callable[[], int],
        on_change: Callable[[int, int], None] = lambda before, now: None,
    ) -> None:
        """slots: the known number. on_change: called in the thread with the numbers before and now."""
        self.slots, self._query_slots, self._on_change = slots, query_slots, on_change
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capacity", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(JOIN_TIMEOUT_SECONDS)

    def _run(self) -> None:
        while not self._ended.wait(CAPACITY_POLL_SECONDS):
            try:
                now = self._query_slots()
                if now != self.slots and not self._ended.is_set():
                    before, self.slots = self.slots, now
                    self._on_change(before, now)
            except Exception as error:  # whatever it is, no run depends on it
                _log.warning("scheduler: cannot query the cluster's capacity: %s", error)


@dataclass
class _ScheduledRun:
    """A run that has not ended."""

    spec: RunSpec
    message: str = ""
    launched: bool = False
    failures: int = 0  # launches in a row without progress
    known_checkpoints: Sequence[CheckpointFolder] = ()  # valid ones when a launch last failed
    not_before: float = 0.0  # monotonic seconds


class Scheduler:
    """Runs every run of a plan, in its order, on the slots that are free; one run's failure affects no other."""

    def __init__(
        self,
        plan: RunPlan,
        launch: Callable[[RunSpec], Outcome],
        on_change: Callable[[RunSpec, RunPhase, str], None],
        stop: threading.Event,
        capacity: CapacityMonitor | None = None,
    ) -> None:
        """launch: blocks until a run ended. on_change: called by `run`, in its thread, at each change of a phase.

        stop: once it is set no run is started; active runs are waited for (they watch their own stop flags).
        capacity: follows the slots of the cluster, by default the plan's. New nodes serve the next runs; after a loss
        of nodes nothing starts until the active runs fit again (Ray restarts their workers).
        """
        self._launch, self._on_change, self._stop = launch, on_change, stop
        self._capacity = capacity or CapacityMonitor(plan.slots, lambda: plan.slots)
        self._waiting = [_ScheduledRun(spec) for spec in plan.order]
        self._running: dict[Future[Outcome], _ScheduledRun] = {}
        self._results: dict[str, RunResult] = {}
        self._max_concurrent = plan.order[0].placement.at_once or len(plan.order)

    def run(self) -> dict[str, RunResult]:
        """Run all; return the results by name."""
        with ThreadPoolExecutor(len(self._waiting), thread_name_prefix="run") as pool:
            while self._waiting or self._running:
                while (run := self._pick_next_run()) is not None:
                    self._waiting.remove(run)
                    run.launched = True
                    self._on_change(run.spec, "running", run.message)
                    self._running[pool.submit(self._launch, run.spec)] = run
                if self._stop.is_set():
                    self._cancel_waiting_runs()
                self._collect_ended_runs()
        return self._results

    def _pick_next_run(self) -> _ScheduledRun | None:
        if self._stop.is_set() or len(self._running) >= self._max_concurrent:
            return None
        ready = next((run for run in self._waiting if run.not_before <= time.monotonic()), None)
        free = self._capacity.slots - sum(run.spec.placement.workers for run in self._running.values())
        # When nothing runs that could free slots, Ray waits for nodes, visibly, and asks an autoscaler for them.
        if ready is not None and self._running and free < ready.spec.placement.fewest_workers:
            return None
        return ready

    def _cancel_waiting_runs(self) -> None:
        for run in self._waiting:
            if run.launched:
                self._record_result(run, RunResult("stopped", run.message))
            else:
                self._results[run.spec.name] = RunResult("stopped", "not started")
        self._waiting = []

    def _collect_ended_runs(self) -> None:
        if not self._running:
            if self._waiting:  # for their next launch
                self._stop.wait(POLL_SECONDS)
            return
        done, _ = wait(self._running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            run = self._running.pop(future)
            try:
                outcome = future.result()
            except (LeaseHeldError, RunFailedError) as error:  # permanent: Ray has restarted the workers already
                self._record_result(run, RunResult("stopped" if self._stop.is_set() else "failed", str(error)))
            except Exception as error:  # any failure of one run is its result, never the end of the others
                self._handle_launch_failure(run, f"{type(error).__name__}: {error}")
            else:
                result = RunResult("failed", f"{outcome.status}: {outcome.message}", outcome)
                if outcome.status in ("finished", "stopped"):
                    message = outcome.message if outcome.status == "stopped" else ""
                    result = RunResult(outcome.status, message, outcome)
                self._record_result(run, result)

    def _record_result(self, run: _ScheduledRun, result: RunResult) -> None:
        self._results[run.spec.name] = result
        self._on_change(run.spec, result.status, result.message)

    def _handle_launch_failure(self, run: _ScheduledRun, message: str) -> None:
        """Have the run wait for its next launch, while others may use its slots; or record that it failed."""
        with suppress(OSError):  # unreachable storage shows no progress
            if attempts.has_progressed(run.spec.folder, run.known_checkpoints):
                run.failures = 0
            run.known_checkpoints = attempts.list_valid_checkpoints(run.spec.folder)
        run.failures += 1
        run.message = message
        if self._stop.is_set():
            self._record_result(run, RunResult("stopped", message))
        elif run.failures > len(BACKOFF_SECONDS):
            self._record_result(run, RunResult("failed", message))
        else:
            pause = BACKOFF_SECONDS[run.failures - 1]
            run.not_before = time.monotonic() + pause
            self._waiting.insert(0, run)
            self._on_change(run.spec, "waiting", f"launch failed, retrying in {pause:g} s: {message}")
            run.message = f"launched again after {message}"
