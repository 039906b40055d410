"""The plan for many runs: how long each takes, longest first, each on the next free slots. Pure functions."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.data import sampler
from orchestrator.data.manifest import Manifest
from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.run_spec import Placement, RunSpec
from orchestrator.scheduler.config import PlanConfig

# Validation is a forward pass; training is that and the two products of backward.
VALIDATION_SHARE = 1 / 3


@dataclass(frozen=True)
class RunHistory:
    """Records of a run in the storage."""

    epochs: float = 0.0  # trained
    images_per_second: float | None = None  # in training, of its last epoch
    workers: int | None = None  # during that epoch
    finished: bool = False


NO_HISTORY = RunHistory()


@dataclass(frozen=True)
class PlannedRun:
    """A run with its start and end, in the unit of the durations."""

    spec: RunSpec
    start: float
    end: float


@dataclass(frozen=True)
class RunPlan:
    """Runs in starting order.

    slots: workers that fit on the cluster. max_concurrent: most runs at the same time. in_seconds: False where no speed
    is known and times are units of work.
    """

    runs: tuple[PlannedRun, ...]
    slots: int
    max_concurrent: int
    in_seconds: bool = True

    @property
    def order(self) -> tuple[RunSpec, ...]:
        """The runs in starting order."""
        return tuple(run.spec for run in self.runs)

    @property
    def makespan(self) -> float:
        """When the last run ends."""
        return max(run.end for run in self.runs)


def plan_unfinished(
    specs: Sequence[RunSpec], histories: Mapping[str, RunHistory], manifest: Manifest | None, config: PlanConfig,
    capacity: ClusterCapacity, gpus: float,
) -> RunPlan:  # fmt: skip
    """Plan the runs that are not finished, with estimated durations. Raises ValueError as `plan_runs` does."""
    durations, in_seconds = estimate_durations(specs, histories, manifest, config.images_per_second)
    todo = [
        (spec, duration)
        for spec, duration in zip(specs, durations, strict=True)
        if not histories.get(spec.name, NO_HISTORY).finished
    ]
    start_seconds = config.start_seconds if in_seconds else 0.0
    return plan_runs(
        [spec for spec, _ in todo], capacity, gpus, [duration for _, duration in todo], start_seconds, in_seconds
    )


def plan_runs(
    specs: Sequence[RunSpec], capacity: ClusterCapacity, gpus: float, durations: Sequence[float],
    start_seconds: float = 0.0, in_seconds: bool = True,
) -> RunPlan:  # fmt: skip
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
    max_concurrent = count_concurrent(specs, slots)
    if max_concurrent < 1:
        raise ValueError(
            f"placement.workers must fit the cluster, got {placement.workers} and room for {slots}: not one run fits "
            "the cluster; set fewer workers, or fewer CPUs or GPUs per worker"
        )
    pairs = sorted(zip(specs, durations, strict=True), key=lambda pair: -pair[1])
    totals = [start_seconds + duration for _, duration in pairs]
    starts = compute_start_times(totals, max_concurrent)
    runs = tuple(
        PlannedRun(spec, start, start + total) for (spec, _), start, total in zip(pairs, starts, totals, strict=True)
    )
    return RunPlan(runs, slots, max_concurrent, in_seconds)


def count_concurrent(specs: Sequence[RunSpec], slots: int) -> int:
    """Return how many runs that share the placement of the first are trained at the same time on so many slots."""
    placement = specs[0].placement
    return min(slots // placement.fewest_workers, len(specs), placement.at_once or len(specs))


def count_slots(capacity: ClusterCapacity, placement: Placement, gpus: float) -> int:
    """Count the workers that fit on the cluster, nodes that its autoscaler can add included.

    gpus: of each worker. A node without room for a whole worker counts nothing.
    """
    live = capacity.count_bundles(placement.cpus_per_worker, gpus)
    if capacity.max_cpus is None or capacity.max_gpus is None:
        return live
    # The autoscaler adds nodes when runs ask for them, so runs have to start before the nodes are there.
    most = capacity.max_cpus // placement.cpus_per_worker
    return max(live, int(most if gpus <= 0 else min(most, capacity.max_gpus // gpus)))


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


def estimate_durations(
    specs: Sequence[RunSpec], histories: Mapping[str, RunHistory], manifest: Manifest | None, stated: float | None
) -> tuple[list[float], bool]:
    """Estimate the training time that each run still needs, and whether it is in seconds or in units of work.

    By the stated speed (images per second of the first run), else by each run's own, else by that of the others, scaled
    by multiply-adds. manifest: None when the data is not packed yet.
    """
    known = [histories.get(spec.name, NO_HISTORY) for spec in specs]
    epochs_left = [max(0.0, spec.recipe.epochs - run.epochs) for spec, run in zip(specs, known, strict=True)]
    # A single run is compared with none, and measuring a network takes a second or two.
    costs = [float(count_multiply_adds(spec)) for spec in specs] if len(specs) > 1 else [1.0] * len(specs)
    # Speeds are taken to grow with the workers; what differs by more is measured within an epoch.
    own = [
        (run.images_per_second or 0.0) * spec.placement.workers / (run.workers or spec.placement.workers)
        for spec, run in zip(specs, known, strict=True)
    ]
    if stated is not None:
        own = [stated, *[0.0] * (len(specs) - 1)]
    measured = [speed * cost for speed, cost in zip(own, costs, strict=True) if speed]
    if manifest is None or not measured:
        return [epochs * cost for epochs, cost in zip(epochs_left, costs, strict=True)], False
    usual = sum(measured) / len(measured)
    speeds = [speed or usual / cost for speed, cost in zip(own, costs, strict=True)]
    images = [_count_images(spec, epochs, manifest) for spec, epochs in zip(specs, epochs_left, strict=True)]
    return [count / speed for count, speed in zip(images, speeds, strict=True)], True


def _count_images(spec: RunSpec, epochs: float, manifest: Manifest) -> float:
    batch = spec.recipe.batch_size
    trained = sampler.count_steps(manifest.count_samples("train"), batch) * batch
    validated = manifest.count_samples("validation") if "validation" in manifest.splits else 0
    return epochs * (trained + VALIDATION_SHARE * validated / spec.cadence.validate_epochs)


def count_multiply_adds(spec: RunSpec) -> int:
    """Count the multiply-adds of one image's forward pass through a run's network in training."""
    from orchestrator.models import cost  # torch takes two seconds to import

    return cost.measure_cost(spec.recipe.model)[1]
