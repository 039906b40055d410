"""Carries a plan out: runs side by side, each isolated from the others' failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal

from orchestrator.fleet.plan import Plan
from orchestrator.launch.config import RunSpec
from orchestrator.launch.lease import LeaseHeldError
from orchestrator.launch.trainer import RunFailedError
from orchestrator.training.job import Outcome

RunStatus = Literal["waiting", "running", "finished", "stopped", "failed"]

# A run whose launch fails (not: whose workers crash, which Ray restarts) is launched once more.
LAUNCHES = 2
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Ended:
    """How a run ended: finished, stopped before its end, or failed with a reason."""

    status: RunStatus
    message: str
    outcome: Outcome | None = None


Launch = Callable[[RunSpec], Outcome]
OnChange = Callable[[RunSpec, RunStatus, str], None]


def supervise(plan: Plan, launch: Launch, on_change: OnChange, stop: threading.Event) -> dict[str, Ended]:
    """Run every run of the plan; how each ended, by name. One run's failure touches no other.

    `launch` blocks until a run ended; `on_change` is called from this thread at each change of a run's state.
    After `stop` is set no run is started; those under way are waited for (they see their own stop flag).
    """
    ended: dict[str, Ended] = {}
    waiting = list(plan.order)
    running: dict[Future[Ended], RunSpec] = {}
    with ThreadPoolExecutor(plan.at_once, thread_name_prefix="run") as pool:
        while waiting or running:
            while waiting and len(running) < plan.at_once and not stop.is_set():
                spec = waiting.pop(0)
                on_change(spec, "running", "")
                running[pool.submit(_run, spec, launch, stop)] = spec
            if stop.is_set():
                for spec in waiting:
                    ended[spec.name] = Ended("stopped", "not started")
                waiting = []
            done, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                spec = running.pop(future)
                ended[spec.name] = future.result()
                on_change(spec, ended[spec.name].status, ended[spec.name].message)
    return ended


def _run(spec: RunSpec, launch: Launch, stop: threading.Event) -> Ended:
    """Launch a run until it has an outcome; whatever it raises is its own failure."""
    message = ""
    for _ in range(LAUNCHES):
        try:
            outcome = launch(spec)
        except (LeaseHeldError, RunFailedError) as error:  # again would be the same: Ray has restarted the workers
            return Ended("stopped" if stop.is_set() else "failed", str(error))
        except Exception as error:  # isolation: any failure of one run is a result, named, not an end of all
            message = f"{type(error).__name__}: {error}"
            if stop.is_set():
                return Ended("stopped", message)
            continue
        if outcome.status == "finished":
            return Ended("finished", "", outcome)
        if outcome.status == "stopped":
            return Ended("stopped", outcome.message, outcome)
        return Ended("failed", f"{outcome.status}: {outcome.message}", outcome)
    return Ended("failed", message)
