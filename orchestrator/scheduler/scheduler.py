"""Carries a plan out: runs side by side, each isolated from the others' failures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.checkpoint.checkpoint_dir import CheckpointFolder
from orchestrator.ray_backend.launch_errors import RunFailedError
from orchestrator.ray_backend.lease import LeaseHeldError
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler.capacity import CapacityMonitor
from orchestrator.scheduler.run_plan import RunPlan, replace_workers
from orchestrator.scheduler.widening import ActiveRun, choose_wider_runs
from orchestrator.training import attempts
from orchestrator.training.config import Outcome

RunPhase = Literal["waiting", "running", "finished", "stopped", "failed"]

# A run whose launch fails (not: whose workers crash, which Ray restarts) is launched again after so many seconds, as
# long as it comes farther, or has not failed more often in a row than this.
BACKOFF_SECONDS = (5.0, 20.0, 60.0)
POLL_SECONDS = 0.5
WIDEN_SECONDS = 5.0  # between looks whether runs should be widened

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a run ended: finished, stopped before its end, or failed with a reason."""

    status: RunPhase
    message: str
    outcome: Outcome | None = None


LaunchFn = Callable[[RunSpec], Outcome]
# The runs that have not begun, and the workers that the cluster holds now: in their new order, with their new workers.
ReplanFn = Callable[[Sequence[RunSpec], int], Sequence[RunSpec]]
PhaseCallback = Callable[[RunSpec, RunPhase, str], None]


@dataclass(frozen=True)
class WideningHooks:
    """What it takes to give empty slots to the runs that are left.

    seconds_left: of a run's training with its present workers; None: not known, and nothing is done.
    restart_seconds: from a wish to stop to the first step of the next launch.
    stop_run: asks one run to save and stop; its launch then returns "stopped", and the others go on.
    """

    seconds_left: Callable[[RunSpec], float | None]
    restart_seconds: Callable[[], float]
    stop_run: Callable[[RunSpec], None]


@dataclass
class _ScheduledRun:
    """A run that has not ended."""

    spec: RunSpec  # with the workers that it should have
    message: str = ""
    launched: bool = False
    failures: int = 0  # launches in a row that got nowhere
    known_checkpoints: Sequence[CheckpointFolder] = ()  # its checkpoints when a launch last failed
    not_before: float = 0.0  # monotonic seconds
    offered_since: float | None = None  # since when it could have been started with fewer workers
    wider_workers: int | None = None  # workers that it is being stopped for
    stop_requested: bool = False  # to stop for them


def execute_plan(
    plan: RunPlan,
    launch: LaunchFn,
    on_change: PhaseCallback,
    stop: threading.Event,
    supply: CapacityMonitor | None = None,
    tail: WideningHooks | None = None,
    replan: ReplanFn | None = None,
) -> dict[str, RunResult]:
    """Run every run of the plan; how each ended, by name. One run's failure touches no other.

    `launch` blocks until a run ended; `on_change` is called from this thread at each change of a run's state.
    After `stop` is set no run is started; those under way are waited for (they see their own stop flag).
    supply: how many workers the cluster holds, by default what the plan says. Nodes that come are used by the next
    run at once; when nodes go, nothing more is started until the runs under way fit again (Ray restarts their workers).
    tail: by default no run under way is given more workers. replan: asked when nodes have come or gone; by default what
    has not begun stays in its order. It may raise ValueError when nothing fits.
    """
    return _Scheduler(plan, launch, on_change, stop, supply or CapacityMonitor(plan.slots), tail, replan).run()


class _Scheduler:
    def __init__(
        self, plan: RunPlan, launch: LaunchFn, on_change: PhaseCallback, stop: threading.Event, supply: CapacityMonitor,
        tail: WideningHooks | None, replan: ReplanFn | None,
    ) -> None:  # fmt: skip
        self._replan, self._planned_for = replan, plan.slots
        self._plan, self._launch, self._on_change = plan, launch, on_change
        self._stop, self._supply, self._tail = stop, supply, tail
        self._waiting = [_ScheduledRun(spec) for spec in plan.order]
        self._running: dict[Future[Outcome], _ScheduledRun] = {}
        self._ended: dict[str, RunResult] = {}
        self._most = plan.order[0].placement.at_once or len(plan.order)
        self._looked = 0.0

    def run(self) -> dict[str, RunResult]:
        with ThreadPoolExecutor(len(self._waiting), thread_name_prefix="run") as pool:
            while self._waiting or self._running:
                self._replan_waiting_runs()
                while (following := self._pick_next_run()) is not None:
                    self._waiting.remove(following)
                    following.launched = True
                    self._on_change(following.spec, "running", following.message)
                    self._running[pool.submit(self._launch, following.spec)] = following
                if self._stop.is_set():
                    self._cancel_waiting_runs()
                self._request_widening()
                self._collect_finished()
        return self._ended

    # -------------------------------------------------------------- starting
    def _replan_waiting_runs(self) -> None:
        """When nodes have come or gone: who has not begun gets the order and the workers of another plan."""
        slots, fresh = self._supply.slots, {run.spec.name: run for run in self._waiting if not run.launched}
        if self._replan is None or slots == self._planned_for or not fresh:
            return
        self._planned_for = slots
        try:
            found = self._replan([run.spec for run in fresh.values()], slots)
        except ValueError:  # nothing fits now: they wait for nodes as they are
            return
        for spec in found:
            fresh[spec.name].spec, fresh[spec.name].offered_since = spec, None
        self._waiting = [run for run in self._waiting if run.launched] + [fresh[spec.name] for spec in found]

    def _count_free_slots(self) -> int:
        return self._supply.slots - sum(run.spec.placement.workers for run in self._running.values())

    def _pick_next_run(self) -> _ScheduledRun | None:
        """The run to start now, with the workers that it gets; None when nothing can be started."""
        now = time.monotonic()
        ready = [run for run in self._waiting if run.not_before <= now]
        if not ready or self._stop.is_set() or len(self._running) >= self._most:
            return None
        following, free = ready[0], self._count_free_slots()
        placement, own = following.spec.placement, self._plan.workers
        if free >= (placement.fewest_workers if placement.is_elastic else placement.workers):
            return following
        if free < own:
            # When nothing runs that could make room, Ray waits for nodes, visibly, and asks an autoscaler for them.
            if self._running:
                return None
            free = own
        # Wide runs wait for slots no longer than being widened later would cost; then they take what there is.
        following.offered_since = following.offered_since or now
        patience = self._plan.scaling.launch_overhead if self._tail is None else self._tail.restart_seconds()
        if self._running and now - following.offered_since < patience:
            return None
        if not placement.is_elastic:
            following.spec = replace_workers(following.spec, free)
        return following

    def _cancel_waiting_runs(self) -> None:
        """Nothing more is started."""
        for run in self._waiting:
            if run.launched:
                self._record_result(run, RunResult("stopped", run.message))
            else:
                self._ended[run.spec.name] = RunResult("stopped", "not started")
        self._waiting = []

    # -------------------------------------------------------------- ending
    def _collect_finished(self) -> None:
        """Wait a little, and take in what has ended."""
        if not self._running:
            if self._waiting:  # for their next launch
                self._stop.wait(POLL_SECONDS)
            return
        done, _ = wait(self._running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            run = self._running.pop(future)
            try:
                self._handle_outcome(run, future.result())
            except (LeaseHeldError, RunFailedError) as error:  # again would be the same: Ray has restarted the workers
                self._record_result(run, RunResult("stopped" if self._stop.is_set() else "failed", str(error)))
            except Exception as error:  # isolation: any failure of one run is a result, named, not an end of all
                self._handle_launch_failure(run, f"{type(error).__name__}: {error}")

    def _handle_outcome(self, run: _ScheduledRun, outcome: Outcome) -> None:
        if outcome.status == "finished":
            self._record_result(run, RunResult("finished", "", outcome))
        elif outcome.status != "stopped":
            self._record_result(run, RunResult("failed", f"{outcome.status}: {outcome.message}", outcome))
        elif run.wider_workers is None or self._stop.is_set():
            self._record_result(run, RunResult("stopped", outcome.message, outcome))
        else:
            run.spec, run.wider_workers, run.stop_requested = replace_workers(run.spec, run.wider_workers), None, False
            run.message = f"goes on with {run.spec.placement.workers} workers"
            self._waiting.insert(0, run)

    def _record_result(self, run: _ScheduledRun, ended: RunResult) -> None:
        self._ended[run.spec.name] = ended
        self._on_change(run.spec, ended.status, ended.message)

    def _handle_launch_failure(self, run: _ScheduledRun, message: str) -> None:
        """A launch failed: the run waits and is launched again, while others may have its slot."""
        with suppress(OSError):  # storage that does not answer shows no progress
            if attempts.has_progressed(run.spec.folder, run.known_checkpoints):
                run.failures = 0
            run.known_checkpoints = attempts.list_valid_checkpoints(run.spec.folder)
        run.failures += 1
        run.wider_workers, run.stop_requested, run.message = None, False, message
        if self._stop.is_set():
            self._record_result(run, RunResult("stopped", message))
        elif run.failures > len(BACKOFF_SECONDS):
            self._record_result(run, RunResult("failed", message))
        else:
            pause = BACKOFF_SECONDS[run.failures - 1]
            run.not_before = time.monotonic() + pause
            self._waiting.insert(0, run)
            self._on_change(run.spec, "waiting", f"its launch failed, again in {pause:g} s: {message}")
            run.message = f"launched again after {message}"

    # -------------------------------------------------------------- widening
    def _request_widening(self) -> None:
        """Have runs stopped that are done sooner with the slots that nobody else needs."""
        now = time.monotonic()
        if self._tail is None or self._waiting or self._stop.is_set() or now - self._looked < WIDEN_SECONDS:
            return
        self._looked, free = now, self._count_free_slots()
        runs = {run.spec.name: run for run in self._running.values()}
        try:
            if free > 0 and all(run.wider_workers is None for run in runs.values()):
                for name, workers in self._choose_wider_runs(self._tail, runs, free).items():
                    runs[name].wider_workers = workers
            for run in runs.values():
                if run.wider_workers is not None and not run.stop_requested:
                    self._tail.stop_run(run.spec)
                    run.stop_requested = True
        except Exception as error:  # it goes on as it is, and is asked at the next look
            _log.warning("fleet: no run is given more workers now: %s", error)

    def _choose_wider_runs(self, tail: WideningHooks, runs: dict[str, _ScheduledRun], free: int) -> dict[str, int]:
        pace = replace(self._plan.scaling, launch_overhead=tail.restart_seconds())
        under_way = []
        for name, run in runs.items():
            left = tail.seconds_left(run.spec)
            if left is None:
                return {}  # it may be the one that ends last
            under_way.append(ActiveRun(name, left, run.spec.placement.workers, pace.get_max_workers(run.spec)))
        return choose_wider_runs(under_way, free, pace)
