"""Whether runs under way should be stopped to go on with more workers, when slots stay empty. Pure functions.

The global batch is the recipe's whatever the workers, so a run that is widened ends with the same weights but for
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.fleet.plan import Pace

# What is known of speeds is an estimate: less than this share of the time left is no gain.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class UnderWay:
    """A run that is trained: seconds of training left with its workers, and the most workers that it may have."""

    name: str
    left: float
    workers: int
    most: int


def worth_widening(left: float, workers: int, wider: int, pace: Pace) -> bool:
    """Whether a run with `left` seconds of training to go is done clearly sooner with `wider` workers.

    pace.start: seconds that stopping and starting again takes. The run has to save as much again, and a tenth of what
    is left: else a run could be stopped again and again for next to nothing.
    """
    return left - with_restart(left, workers, wider, pace) >= max(pace.start, LEAST_GAIN * left, 1e-9)


def with_restart(left: float, workers: int, wider: int, pace: Pace) -> float:
    """Seconds until a run is done that is stopped now and goes on with `wider` workers."""
    return pace.start + pace.training(left, workers, wider)


def widened(runs: Sequence[UnderWay], free: int, pace: Pace) -> dict[str, int]:
    """New numbers of workers by name, of the runs that are worth it; `free` slots are empty and no run waits for one.

    Slot after slot goes to the run that would end last, as long as that one can take it: only then all end sooner.
    """
    workers = {run.name: run.workers for run in runs}

    def end(run: UnderWay) -> float:
        wider = workers[run.name]
        return run.left if wider == run.workers else with_restart(run.left, run.workers, wider, pace)

    for _ in range(free if runs else 0):
        last = max(runs, key=end)
        if workers[last.name] >= last.most:
            break
        workers[last.name] += 1
    return {
        run.name: workers[run.name]
        for run in runs
        if workers[run.name] > run.workers and worth_widening(run.left, run.workers, workers[run.name], pace)
    }
