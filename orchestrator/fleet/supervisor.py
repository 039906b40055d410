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

from orchestrator.checkpoint.places import Place
from orchestrator.fleet.plan import Plan, with_workers
from orchestrator.fleet.supply import Supply
from orchestrator.fleet.widening import UnderWay, widened
from orchestrator.launch.config import RunSpec
from orchestrator.launch.lease import LeaseHeldError
from orchestrator.launch.trainer import RunFailedError
from orchestrator.training import attempts
from orchestrator.training.job import Outcome

RunStatus = Literal["waiting", "running", "finished", "stopped", "failed"]

# A run whose launch fails (not: whose workers crash, which Ray restarts) is launched again after so many seconds, as
# long as it comes farther, or has not failed more often in a row than this.
BACKOFF_SECONDS = (5.0, 20.0, 60.0)
POLL_SECONDS = 0.5
WIDEN_SECONDS = 5.0  # between looks whether runs should be widened

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ended:
    """How a run ended: finished, stopped before its end, or failed with a reason."""

    status: RunStatus
    message: str
    outcome: Outcome | None = None


Launch = Callable[[RunSpec], Outcome]
# The runs that have not begun, and the workers that the cluster holds now: in their new order, with their new workers.
Replan = Callable[[Sequence[RunSpec], int], Sequence[RunSpec]]
OnChange = Callable[[RunSpec, RunStatus, str], None]


@dataclass(frozen=True)
class Tail:
    """What it takes to give empty slots to the runs that are left.

    seconds_left: of a run's training with its present workers; None: not known, and nothing is done.
    restart_seconds: from a wish to stop to the first step of the next launch.
    stop_run: asks one run to save and stop; its launch then returns "stopped", and the others go on.
    """

    seconds_left: Callable[[RunSpec], float | None]
    restart_seconds: Callable[[], float]
    stop_run: Callable[[RunSpec], None]


@dataclass
class _Run:
    """A run that has not ended."""

    spec: RunSpec  # with the workers that it should have
    message: str = ""
    launched: bool = False
    failures: int = 0  # launches in a row that got nowhere
    saved: Sequence[Place] = ()  # its checkpoints when a launch last failed
    not_before: float = 0.0  # monotonic seconds
    offered: float | None = None  # since when it could have been started with fewer workers
    wider: int | None = None  # workers that it is being stopped for
    asked: bool = False  # to stop for them


def supervise(
    plan: Plan,
    launch: Launch,
    on_change: OnChange,
    stop: threading.Event,
    supply: Supply | None = None,
    tail: Tail | None = None,
    replan: Replan | None = None,
) -> dict[str, Ended]:
    """Run every run of the plan; how each ended, by name. One run's failure touches no other.

    `launch` blocks until a run ended; `on_change` is called from this thread at each change of a run's state.
    After `stop` is set no run is started; those under way are waited for (they see their own stop flag).
    supply: how many workers the cluster holds, by default what the plan says. Nodes that come are used by the next
    run at once; when nodes go, nothing more is started until the runs under way fit again (Ray restarts their workers).
    tail: by default no run under way is given more workers. replan: asked when nodes have come or gone; by default what
    has not begun stays in its order. It may raise ValueError when nothing fits.
    """
    return _Supervisor(plan, launch, on_change, stop, supply or Supply(plan.slots), tail, replan).run()


class _Supervisor:
    def __init__(
        self, plan: Plan, launch: Launch, on_change: OnChange, stop: threading.Event, supply: Supply,
        tail: Tail | None, replan: Replan | None,
    ) -> None:  # fmt: skip
        self._replan, self._planned_for = replan, plan.slots
        self._plan, self._launch, self._on_change = plan, launch, on_change
        self._stop, self._supply, self._tail = stop, supply, tail
        self._waiting = [_Run(spec) for spec in plan.order]
        self._running: dict[Future[Outcome], _Run] = {}
        self._ended: dict[str, Ended] = {}
        self._most = plan.order[0].placement.at_once or len(plan.order)
        self._looked = 0.0

    def run(self) -> dict[str, Ended]:
        with ThreadPoolExecutor(len(self._waiting), thread_name_prefix="run") as pool:
            while self._waiting or self._running:
                self._plan_again()
                while (following := self._next()) is not None:
                    self._waiting.remove(following)
                    following.launched = True
                    self._on_change(following.spec, "running", following.message)
                    self._running[pool.submit(self._launch, following.spec)] = following
                if self._stop.is_set():
                    self._let_go()
                self._widen()
                self._collect()
        return self._ended

    # -------------------------------------------------------------- starting
    def _plan_again(self) -> None:
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
            fresh[spec.name].spec, fresh[spec.name].offered = spec, None
        self._waiting = [run for run in self._waiting if run.launched] + [fresh[spec.name] for spec in found]

    def _free(self) -> int:
        return self._supply.slots - sum(run.spec.placement.workers for run in self._running.values())

    def _next(self) -> _Run | None:
        """The run to start now, with the workers that it gets; None when nothing can be started."""
        now = time.monotonic()
        ready = [run for run in self._waiting if run.not_before <= now]
        if not ready or self._stop.is_set() or len(self._running) >= self._most:
            return None
        following, free = ready[0], self._free()
        placement, own = following.spec.placement, self._plan.workers
        if free >= (placement.least if placement.elastic else placement.workers):
            return following
        if free < own:
            # When nothing runs that could make room, Ray waits for nodes, visibly, and asks an autoscaler for them.
            if self._running:
                return None
            free = own
        # Wide runs wait for slots no longer than being widened later would cost; then they take what there is.
        following.offered = following.offered or now
        patience = self._plan.pace.start if self._tail is None else self._tail.restart_seconds()
        if self._running and now - following.offered < patience:
            return None
        if not placement.elastic:
            following.spec = with_workers(following.spec, free)
        return following

    def _let_go(self) -> None:
        """Nothing more is started."""
        for run in self._waiting:
            if run.launched:
                self._end(run, Ended("stopped", run.message))
            else:
                self._ended[run.spec.name] = Ended("stopped", "not started")
        self._waiting = []

    # -------------------------------------------------------------- ending
    def _collect(self) -> None:
        """Wait a little, and take in what has ended."""
        if not self._running:
            if self._waiting:  # for their next launch
                self._stop.wait(POLL_SECONDS)
            return
        done, _ = wait(self._running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            run = self._running.pop(future)
            try:
                self._ended_as(run, future.result())
            except (LeaseHeldError, RunFailedError) as error:  # again would be the same: Ray has restarted the workers
                self._end(run, Ended("stopped" if self._stop.is_set() else "failed", str(error)))
            except Exception as error:  # isolation: any failure of one run is a result, named, not an end of all
                self._failed(run, f"{type(error).__name__}: {error}")

    def _ended_as(self, run: _Run, outcome: Outcome) -> None:
        if outcome.status == "finished":
            self._end(run, Ended("finished", "", outcome))
        elif outcome.status != "stopped":
            self._end(run, Ended("failed", f"{outcome.status}: {outcome.message}", outcome))
        elif run.wider is None or self._stop.is_set():
            self._end(run, Ended("stopped", outcome.message, outcome))
        else:
            run.spec, run.wider, run.asked = with_workers(run.spec, run.wider), None, False
            run.message = f"goes on with {run.spec.placement.workers} workers"
            self._waiting.insert(0, run)

    def _end(self, run: _Run, ended: Ended) -> None:
        self._ended[run.spec.name] = ended
        self._on_change(run.spec, ended.status, ended.message)

    def _failed(self, run: _Run, message: str) -> None:
        """A launch failed: the run waits and is launched again, while others may have its slot."""
        with suppress(OSError):  # storage that does not answer shows no progress
            if attempts.has_progressed(run.spec.folder, run.saved):
                run.failures = 0
            run.saved = attempts.committed(run.spec.folder)
        run.failures += 1
        run.wider, run.asked, run.message = None, False, message
        if self._stop.is_set():
            self._end(run, Ended("stopped", message))
        elif run.failures > len(BACKOFF_SECONDS):
            self._end(run, Ended("failed", message))
        else:
            pause = BACKOFF_SECONDS[run.failures - 1]
            run.not_before = time.monotonic() + pause
            self._waiting.insert(0, run)
            self._on_change(run.spec, "waiting", f"its launch failed, again in {pause:g} s: {message}")
            run.message = f"launched again after {message}"

    # -------------------------------------------------------------- widening
    def _widen(self) -> None:
        """Have runs stopped that are done sooner with the slots that nobody else needs."""
        now = time.monotonic()
        if self._tail is None or self._waiting or self._stop.is_set() or now - self._looked < WIDEN_SECONDS:
            return
        self._looked, free = now, self._free()
        runs = {run.spec.name: run for run in self._running.values()}
        try:
            if free > 0 and all(run.wider is None for run in runs.values()):
                for name, workers in self._wider(self._tail, runs, free).items():
                    runs[name].wider = workers
            for run in runs.values():
                if run.wider is not None and not run.asked:
                    self._tail.stop_run(run.spec)
                    run.asked = True
        except Exception as error:  # it goes on as it is, and is asked at the next look
            _log.warning("fleet: no run is given more workers now: %s", error)

    def _wider(self, tail: Tail, runs: dict[str, _Run], free: int) -> dict[str, int]:
        pace = replace(self._plan.pace, start=tail.restart_seconds())
        under_way = []
        for name, run in runs.items():
            left = tail.seconds_left(run.spec)
            if left is None:
                return {}  # it may be the one that ends last
            under_way.append(UnderWay(name, left, run.spec.placement.workers, pace.most(run.spec)))
        return widened(under_way, free, pace)
