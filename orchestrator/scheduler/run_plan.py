"""The plan for many runs: longest first, each on the next free slots. Pure functions."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler.capacity import count_slots


@dataclass(frozen=True)
class PlannedRun:
    """A run with its start and end, in the unit of the durations."""

    spec: RunSpec
    start: float
    end: float


@dataclass(frozen=True)
class RunPlan:
    """Runs in starting order.

    slots: workers that fit on the cluster. max_concurrent: most runs at the same time. min_makespan: lower bound of the
    makespan of any plan of these runs.
    """

    runs: tuple[PlannedRun, ...]
    slots: int
    max_concurrent: int
    min_makespan: float

    @property
    def order(self) -> tuple[RunSpec, ...]:
        """The runs in starting order."""
        return tuple(run.spec for run in self.runs)

    @property
    def makespan(self) -> float:
        """When the last run ends."""
        return max(run.end for run in self.runs)

    @property
    def num_waves(self) -> int:
        """The number of runs that follow one another."""
        return math.ceil(len(self.runs) / self.max_concurrent)


def plan_runs(
    specs: Sequence[RunSpec],
    capacity: ClusterCapacity,
    gpus: float,
    durations: Sequence[float],
    start_seconds: float = 0.0,
) -> RunPlan:
    """Plan runs that share the placement of the first: longest first, runs of equal length in the order given.

    durations: of each run's training. start_seconds: added to each, in the same unit. Longest first takes at most
    4/3 - 1/(3 slots) of the shortest makespan (Graham, 1969). Raises ValueError when there is no run or none fits.
    """
    if not specs:
        raise ValueError("there is no run to plan")
    placement = specs[0].placement
    if placement.min_workers is not None and len(specs) > 1:
        raise ValueError(
            "placement.min_workers must be left out when several runs share a cluster, got "
            f"{placement.min_workers} for {len(specs)} runs: only a single run can change its number of workers"
        )
    slots = count_slots(capacity, placement, gpus)
    max_concurrent = min(slots // placement.fewest_workers, len(specs), placement.at_once or len(specs))
    if max_concurrent < 1:
        raise ValueError(
            f"placement.workers must fit the cluster, got {placement.workers} and room for {slots}: not one run fits "
            "the cluster; set fewer workers, or fewer CPUs or GPUs per worker"
        )
    pairs = sorted(zip(specs, durations, strict=True), key=lambda pair: -pair[1])
    totals = [start_seconds + duration for _, duration in pairs]
    starts = compute_start_times(totals, max_concurrent)
    runs = [
        PlannedRun(spec, start, start + total) for (spec, _), start, total in zip(pairs, starts, totals, strict=True)
    ]
    return RunPlan(tuple(runs), slots, max_concurrent, compute_lower_bound(totals, max_concurrent))


def compute_start_times(
    durations: Sequence[float], max_concurrent: int, busy_until: Iterable[float] = ()
) -> list[float]:
    """Return when each run starts if each in turn takes the place that is free first.

    busy_until: ends of runs that are under way at time 0; there may be more of them than places.
    """
    ends = list(busy_until)
    heapq.heapify(ends)
    now = 0.0
    starts = []
    for duration in durations:
        while ends and len(ends) >= max_concurrent:
            now = heapq.heappop(ends)
        starts.append(now)
        heapq.heappush(ends, now + duration)
    return starts


def compute_lower_bound(durations: Sequence[float], max_concurrent: int) -> float:
    """Return a lower bound of the makespan: the longest run, the mean load, and the waves that many runs take.

    Of the k x places + 1 longest runs some place has to take k + 1; equal runs take ceil(runs / places) waves.
    """
    longest = sorted(durations, reverse=True)
    waves = (sum(longest[last - last // max_concurrent : last + 1]) for last in range(0, len(longest), max_concurrent))
    return max([sum(longest) / max_concurrent, *waves])
