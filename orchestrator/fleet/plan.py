"""The plan of a fleet: how many runs at once, in which order. A pure function of runs and capacity."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.launch.cluster import Capacity
from orchestrator.launch.config import RunSpec


@dataclass(frozen=True)
class Plan:
    """Runs in starting order, how many of them run at once, and the expected makespan in units of work."""

    order: tuple[RunSpec, ...]
    at_once: int
    makespan: float


def work(spec: RunSpec) -> float:
    """How much a run has to do, up to a constant: images x the area of the network's filters."""
    recipe = spec.recipe
    return recipe.epochs * recipe.model.width**2 * recipe.model.image_size**2


def plan(runs: Sequence[RunSpec], capacity: Capacity, gpus: float) -> Plan:
    """As many runs at once as the live nodes hold, longest first (Graham's rule: at most 4/3 of the best makespan).

    All runs have the placement of the first. Raises ValueError when there is no run or not even one fits.
    """
    if not runs:
        raise ValueError("there is no run to plan")
    placement = runs[0].placement
    fits = capacity.bundles(placement.cpus_per_worker, gpus) // placement.workers
    if fits < 1:
        raise ValueError(f"placement.workers: {placement.workers} is refused: not one run fits the cluster")
    at_once = min(fits, len(runs), placement.at_once or len(runs))
    order = tuple(sorted(runs, key=work, reverse=True))
    return Plan(order, at_once, _makespan([work(spec) for spec in order], at_once))


def _makespan(works: Sequence[float], slots: int) -> float:
    """When the last run ends if each takes the slot that is free first."""
    ends = [0.0] * slots
    for amount in works:
        heapq.heapreplace(ends, ends[0] + amount)
    return max(ends)
