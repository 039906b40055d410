"""The plan of a fleet: how many runs at once, in which order. A pure function of runs and capacity."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import itemgetter

from orchestrator.launch.cluster import Capacity
from orchestrator.launch.config import RunSpec


@dataclass(frozen=True)
class Plan:
    """Runs in starting order, how many of them run at once, and the expected makespan.

    In units of work; 1 for a run alone.
    """

    order: tuple[RunSpec, ...]
    at_once: int
    makespan: float


def work(spec: RunSpec) -> float:
    """How much a run has to do, up to a constant: epochs x multiply-adds of an image."""
    # Measured on a network that is built: torch, which takes two seconds to import, is needed for nothing else here.
    cost: int = import_module("orchestrator.models.measure").image_cost(spec.recipe.model)
    return float(spec.recipe.epochs * cost)


def plan(runs: Sequence[RunSpec], capacity: Capacity, gpus: float) -> Plan:
    """As many runs at once as the live nodes hold, longest first (Graham's rule: at most 4/3 of the best makespan).

    All runs have the placement of the first. Raises ValueError when there is no run or not even one fits.
    """
    if not runs:
        raise ValueError("there is no run to plan")
    placement = runs[0].placement
    if placement.min_workers is not None and len(runs) > 1:
        raise ValueError(
            f"placement.min_workers {placement.min_workers} is refused: only a run alone on its cluster can have "
            f"a number of workers that changes, and these are {len(runs)}; leave it out"
        )
    fits = capacity.bundles(placement.cpus_per_worker, gpus) // placement.least
    if fits < 1:
        raise ValueError(f"placement.workers: {placement.workers} is refused: not one run fits the cluster")
    at_once = min(fits, len(runs), placement.at_once or len(runs))
    # A run alone is not compared with any; to measure a network takes a second or two.
    works = [work(spec) for spec in runs] if len(runs) > 1 else [1.0]
    order = sorted(zip(works, runs, strict=True), key=itemgetter(0), reverse=True)
    return Plan(tuple(spec for _, spec in order), at_once, _makespan([amount for amount, _ in order], at_once))


def _makespan(works: Sequence[float], slots: int) -> float:
    """When the last run ends if each takes the slot that is free first."""
    ends = [0.0] * slots
    for amount in works:
        heapq.heapreplace(ends, ends[0] + amount)
    return max(ends)
