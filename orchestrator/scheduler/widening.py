"""Whether runs under way should be stopped to go on with more workers, when slots stay empty. Pure functions.

The global batch is the recipe's whatever the workers, so a run that is widened ends with the same weights but for
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.scheduler.run_plan import ScalingModel

# What is known of speeds is an estimate: less than this share of the time left is no gain.
MIN_GAIN = 0.1


@dataclass(frozen=True)
class ActiveRun:
    """A run that is trained: seconds of training left with its workers, and the most workers that it may have."""

    name: str
    seconds_left: float
    workers: int
    max_workers: int


def is_worth_widening(left: float, workers: int, wider: int, pace: ScalingModel) -> bool:
    """Whether a run with `left` seconds of training to go is done clearly sooner with `wider` workers.

    pace.start: seconds that stopping and starting again takes. The run has to save as much again, and a tenth of what
    is left: else a run could be stopped again and again for next to nothing.
    """
    return left - estimate_restarted_seconds(left, workers, wider, pace) >= max(
        pace.launch_overhead, MIN_GAIN * left, 1e-9
    )


def estimate_restarted_seconds(left: float, workers: int, wider: int, pace: ScalingModel) -> float:
    """Seconds until a run is done that is stopped now and goes on with `wider` workers."""
    return pace.launch_overhead + pace.scale_duration(left, workers, wider)


def choose_wider_runs(runs: Sequence[ActiveRun], free: int, pace: ScalingModel) -> dict[str, int]:
    """New numbers of workers by name, of the runs that are worth it; `free` slots are empty and no run waits for one.

    Slot after slot goes to the run that would end last, as long as that one can take it: only then all end sooner.
    """
    workers = {run.name: run.workers for run in runs}

    def end(run: ActiveRun) -> float:
        wider = workers[run.name]
        return (
            run.seconds_left
            if wider == run.workers
            else estimate_restarted_seconds(run.seconds_left, run.workers, wider, pace)
        )

    for _ in range(free if runs else 0):
        last = max(runs, key=end)
        if workers[last.name] >= last.max_workers:
            break
        workers[last.name] += 1
    return {
        run.name: workers[run.name]
        for run in runs
        if workers[run.name] > run.workers and is_worth_widening(run.seconds_left, run.workers, workers[run.name], pace)
    }
