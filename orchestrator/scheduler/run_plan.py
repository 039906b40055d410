"""The plan of a fleet: how many runs at once, with how many workers each, in which order. A pure function.

Where it says that runs may be widened, a run may get more workers than its placement has, if then all end sooner.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

from orchestrator.models.config import has_batch_norm
from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.run_spec import Placement, RunSpec

# Ways to give workers to runs that are compared; each takes some ten microseconds.
MAX_ALLOCATIONS = 5000
_PLAN_REL_TOL = 1e-9


@dataclass(frozen=True)
class ScalingModel:
    """How long runs take: a start, which no worker shortens, and training, by Amdahl's law.

    start: of each launch, in the unit of the durations. most_workers: of a run; None: no more than its placement has.
    serial_share: of a step that more workers make no shorter.
    """

    launch_overhead: float = 0.0
    most_workers: int | None = None
    serial_share: float = 0.05

    def scale_duration(self, duration: float, workers: int, wider: int) -> float:
        """What takes `duration` with `workers` takes so long with `wider`."""
        return duration * self._compute_time_share(wider) / self._compute_time_share(workers)

    def _compute_time_share(self, workers: int) -> float:
        return self.serial_share + (1 - self.serial_share) / workers

    def get_max_workers(self, spec: RunSpec) -> int:
        """The most workers that a run may have; its own number where another one would change its losses."""
        own = spec.placement.workers
        if self.most_workers is None or spec.placement.is_elastic or has_batch_norm(spec.recipe.model):
            return own
        return max(own, min(self.most_workers, spec.recipe.order.lanes, spec.recipe.batch_size))


DEFAULT_SCALING = ScalingModel()


@dataclass(frozen=True)
class PlannedRun:
    """A run with its workers, and when it starts and ends."""

    spec: RunSpec
    start: float
    end: float


@dataclass(frozen=True)
class RunPlan:
    """Runs in starting order; times are in the unit of the durations that it was made of.

    slots: workers that the cluster holds at once. at_once: most runs at the same time. bound: what no plan of these
    runs can beat. workers: of each run by its placement; planned ones may have more.
    """

    runs: tuple[PlannedRun, ...]
    slots: int
    max_concurrent: int
    min_makespan: float
    scaling: ScalingModel = DEFAULT_SCALING
    workers: int = 1

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
        """How many runs one after the other."""
        return math.ceil(len(self.runs) / self.max_concurrent)

    def get_wave(self, name: str) -> int:
        """In which of them a run is, from 1."""
        return 1 + [run.spec.name for run in self.runs].index(name) // self.max_concurrent


def estimate_work(spec: RunSpec) -> float:
    """How much a run has to do, up to a constant: epochs x multiply-adds of an image."""
    return float(spec.recipe.epochs * count_multiply_adds(spec))


def count_multiply_adds(spec: RunSpec) -> int:
    """Multiply-adds of one image's way forward through a run's network in training."""
    # Measured on a network that is built: torch, which takes two seconds to import, is needed for nothing else here.
    from orchestrator.models import flops  # torch takes two seconds to import

    return flops.count_image_multiply_adds(spec.recipe.model)


def count_slots(capacity: ClusterCapacity, placement: Placement, gpus: float) -> int:
    """Workers that the cluster holds at once, or would with the nodes that its autoscaler can bring.

    A node that has no room for a worker counts nothing.
    """
    live = capacity.count_bundles(placement.cpus_per_worker, gpus)
    if capacity.max_cpus is None or capacity.max_gpus is None:
        return live
    # Nodes come when runs ask for them, so runs have to be started before they are there.
    most = capacity.max_cpus // placement.cpus_per_worker
    return max(live, int(most if gpus <= 0 else min(most, capacity.max_gpus // gpus)))


def plan_runs(
    runs: Sequence[RunSpec],
    capacity: ClusterCapacity,
    gpus: float,
    durations: Sequence[float] | None = None,
    pace: ScalingModel = DEFAULT_SCALING,
) -> RunPlan:
    """The plan that ends first, or as good as first when there are more than a dozen runs of many kinds.

    durations: of each run's training with the workers of its placement; by default its work. All runs have the
    placement of the first. Raises ValueError when there is no run or not even one fits.
    """
    if not runs:
        raise ValueError("there is no run to plan")
    placement = runs[0].placement
    if placement.min_workers is not None and len(runs) > 1:
        raise ValueError(
            f"placement.min_workers {placement.min_workers} is refused: only a run alone on its cluster can have "
            f"a number of workers that changes, and these are {len(runs)}; leave it out"
        )
    return plan_for_slots(runs, count_slots(capacity, placement, gpus), durations, pace)


def plan_for_slots(
    runs: Sequence[RunSpec], there: int, durations: Sequence[float] | None = None, pace: ScalingModel = DEFAULT_SCALING
) -> RunPlan:
    """The plan for a cluster that holds so many workers at once; as `plan` does."""
    placement = runs[0].placement
    fits = there // placement.fewest_workers
    if fits < 1:
        raise ValueError(f"placement.workers: {placement.workers} is refused: not one run fits the cluster")
    at_once = min(fits, len(runs), placement.at_once or len(runs))
    if durations is None:
        # A run alone is not compared with any; to measure a network takes a second or two.
        durations = [estimate_work(spec) for spec in runs] if len(runs) > 1 else [1.0]
    return _Planner(runs, durations, pace, there, at_once).build_plan()


class _Planner:
    """The search for a plan."""

    def __init__(
        self, runs: Sequence[RunSpec], durations: Sequence[float], pace: ScalingModel, slots: int, at_once: int
    ) -> None:
        self._pace, self._slots, self._at_once = pace, slots, at_once
        # Longest first; runs of equal length in the order given.
        pairs = sorted(zip(runs, durations, strict=True), key=lambda pair: -pair[1])
        self._runs = [spec for spec, _ in pairs]
        self._durations = [duration for _, duration in pairs]
        self._own = [spec.placement.workers for spec in self._runs]

    def build_plan(self) -> RunPlan:
        """The best plan."""
        found = self._schedule_requested_workers()
        end, best = max(run.end for run in found), None
        for workers in self._iter_allocations():
            other = max(start + lasts for _, start, lasts in self._schedule_workers(workers))
            if other < end * (1 - _PLAN_REL_TOL):
                end, best = other, workers
        if best is not None:
            found = [
                PlannedRun(replace_workers(self._runs[run], best[run]), start, start + lasts)
                for run, start, lasts in self._schedule_workers(best)
            ]
        # By start: who takes the runs in this order, each when there is room, carries the plan out.
        in_order = sorted(found, key=lambda run: run.start)
        return RunPlan(
            tuple(in_order), self._slots, self._at_once, self._compute_min_makespan(), self._pace, self._own[0]
        )

    def _estimate_duration(self, run: int, workers: int) -> float:
        return self._pace.launch_overhead + self._pace.scale_duration(self._durations[run], self._own[run], workers)

    def _schedule_requested_workers(self) -> list[PlannedRun]:
        """The best plan without widening any run."""
        lasts = [self._estimate_duration(run, own) for run, own in enumerate(self._own)]
        ends = [0.0] * self._at_once
        made = []
        for run, slot in enumerate(assign_slots(lasts, self._at_once)):
            made.append(PlannedRun(self._runs[run], ends[slot], ends[slot] + lasts[run]))
            ends[slot] += lasts[run]
        return made

    def _schedule_workers(self, workers: Sequence[int]) -> list[tuple[int, float, float]]:
        """(run, start, duration) with so many workers: longest first, each as soon as there is room for it."""
        lasts = [self._estimate_duration(run, width) for run, width in enumerate(workers)]
        order = sorted(range(len(lasts)), key=lambda run: -lasts[run])
        starts = compute_start_times(
            [lasts[run] for run in order], [workers[run] for run in order], self._slots, self._at_once
        )
        return [(run, start, lasts[run]) for run, start in zip(order, starts, strict=True)]

    def _iter_allocations(self) -> Iterator[Sequence[int]]:
        """Numbers of workers that are worth a look, for each run; none where no run may have more than its own."""
        kinds: dict[tuple[float, tuple[int, ...]], list[int]] = {}
        for run, spec in enumerate(self._runs):
            options = _list_worker_counts(self._own[run], min(self._slots, self._pace.get_max_workers(spec)))
            kinds.setdefault((self._durations[run], options), []).append(run)
        if all(len(options) == 1 for _, options in kinds):
            return
        if (
            math.prod(math.comb(len(same) + len(key[1]) - 1, len(same)) for key, same in kinds.items())
            > MAX_ALLOCATIONS
        ):
            yield from self._iter_sampled_allocations(kinds)
            return
        # Runs alike are interchangeable: what counts is how many of them have which number.
        for chosen in product(*(combinations_with_replacement(key[1], len(same)) for key, same in kinds.items())):
            workers = list(self._own)
            for same, widths in zip(kinds.values(), chosen, strict=True):
                for run, width in zip(same, widths, strict=True):
                    workers[run] = width
            yield workers

    def _iter_sampled_allocations(
        self, kinds: dict[tuple[float, tuple[int, ...]], list[int]]
    ) -> Iterator[Sequence[int]]:
        """The longest runs widened, or the last ones."""
        options = {run: key[1] for key, same in kinds.items() for run in same}
        number = len(self._runs)
        step = max(1, number // 20)
        for size in range(1, max(len(found) for found in options.values())):
            for cut in range(0, number, step):
                for widened in (range(cut, number), range(cut + 1)):
                    workers = list(self._own)
                    for run in widened:
                        workers[run] = options[run][min(size, len(options[run]) - 1)]
                    yield workers

    def _compute_min_makespan(self) -> float:
        """What no plan can beat; a run's own workers take the fewest worker-hours, its most the least time."""
        own = [self._estimate_duration(run, workers) for run, workers in enumerate(self._own)]
        most = [min(self._slots, self._pace.get_max_workers(spec)) for spec in self._runs]
        if all(width <= mine for width, mine in zip(most, self._own, strict=True)):
            return compute_lower_bound(own, self._at_once)
        area = sum(lasts * workers for lasts, workers in zip(own, self._own, strict=True))
        return max([area / self._slots, *(self._estimate_duration(run, width) for run, width in enumerate(most))])


def replace_workers(spec: RunSpec, workers: int) -> RunSpec:
    """The same run with another number of workers; which run it is does not depend on it."""
    if workers == spec.placement.workers:
        return spec
    return spec.model_copy(update={"placement": spec.placement.model_copy(update={"workers": workers})})


def _list_worker_counts(own: int, most: int) -> tuple[int, ...]:
    """own, 2 own, 4 own, ... and `most`."""
    found = [own]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    if most > found[-1]:
        found.append(most)
    return tuple(found)


# Up to so many runs the shortest schedule is searched for; beyond it, longest first is near enough.
MAX_EXACT_RUNS = 12
# Far more than twelve durations that were measured need; it bounds the time (a second) of those made to be hard.
MAX_SEARCH_NODES = 200_000
_SCHEDULE_REL_TOL = 1e-9  # relative; sums of floats in another order differ by less


def compute_lower_bound(durations: Sequence[float], slots: int) -> float:
    """What no schedule can beat: the longest run, the mean load of a slot, and the waves that come of many runs.

    Of the k x slots + 1 longest runs some slot has to take k + 1; for equal runs that is ceil(runs / slots) waves.
    0 without a run. Raises ValueError without a slot.
    """
    _check_slots(slots)
    longest = sorted(durations, reverse=True)
    mean = sum(longest) / slots
    waves = (sum(longest[at - at // slots : at + 1]) for at in range(0, len(longest), slots))
    return max([mean, *waves])


def assign_slots(durations: Sequence[float], slots: int) -> list[int]:
    """The slot of each run in the schedule that ends first; each slot takes its runs one after the other.

    Longest first, each to the slot that is free first (Graham: at most 4/3 - 1/(3 slots) of the shortest), unless a
    search finds better; the search is exact up to `EXACT_RUNS` runs. Raises ValueError without a slot.
    """
    _check_slots(slots)
    order = sorted(range(len(durations)), key=lambda run: -durations[run])
    sizes = [durations[run] for run in order]
    found, end = _assign_longest_first(sizes, slots)
    if len(sizes) <= MAX_EXACT_RUNS:
        found = _BranchAndBound(sizes, slots, found, end).best
    chosen = [0] * len(sizes)
    for run, slot in zip(order, found, strict=True):
        chosen[run] = slot
    return chosen


def compute_start_times(
    durations: Sequence[float],
    workers: Sequence[int],
    slots: int,
    at_once: int | None = None,
    busy: Iterable[tuple[float, int]] = (),
) -> list[float]:
    """When each run starts if each in turn waits until as many slots as it has workers are free.

    at_once: the most runs at the same time. busy: (end, workers) of runs that are under way at time 0. A run that
    needs more than there is starts when all others have ended.
    """
    ends = list(busy)
    heapq.heapify(ends)
    free, now = slots - sum(width for _, width in ends), 0.0
    starts = []
    for duration, width in zip(durations, workers, strict=True):
        while ends and (free < width or (at_once is not None and len(ends) >= at_once)):
            now, freed = heapq.heappop(ends)
            free += freed
        starts.append(now)
        heapq.heappush(ends, (now + duration, width))
        free -= width
    return starts


def _check_slots(slots: int) -> None:
    if slots < 1:
        raise ValueError(f"slots: {slots} is refused: at least 1 is needed")


def _assign_longest_first(sizes: Sequence[float], slots: int) -> tuple[list[int], float]:
    """The slot of each run, and the end; `sizes` fall."""
    ends = [(0.0, slot) for slot in range(slots)]
    chosen = []
    for size in sizes:
        end, slot = ends[0]
        chosen.append(slot)
        heapq.heapreplace(ends, (end + size, slot))
    return chosen, max(end for end, _ in ends)


class _BranchAndBound:
    """Branch and bound over the slot of each run, longest first."""

    def __init__(self, sizes: Sequence[float], slots: int, best: list[int], end: float) -> None:
        """sizes: falling. best, end: a schedule to be improved, and when it ends."""
        self.best = best
        self._sizes, self._end = sizes, end
        self._floor = compute_lower_bound(sizes, slots) * (1 + _SCHEDULE_REL_TOL)
        self._left = [sum(sizes[at:]) for at in range(len(sizes) + 1)]
        self._loads = [0.0] * slots
        self._chosen: list[int] = []
        self._nodes = 0
        self._assign_next_run()

    def _assign_next_run(self) -> None:
        """Try every slot for the next run."""
        at = len(self._chosen)
        if at == len(self._sizes):
            end = max(self._loads)
            if end < self._end * (1 - _SCHEDULE_REL_TOL):  # not for a rounding: longest first bears surprises better
                self.best, self._end = list(self._chosen), end
            return
        tried = set()
        # The emptiest first, so that good schedules are found early; slots of equal load are one.
        for slot in sorted(range(len(self._loads)), key=self._loads.__getitem__):
            load, size = self._loads[slot], self._sizes[at]
            if self._end <= self._floor or self._nodes >= MAX_SEARCH_NODES:
                return
            if load in tried or load + size >= self._end * (1 - _SCHEDULE_REL_TOL) or not self._can_improve(at):
                continue
            tried.add(load)
            self._nodes += 1
            self._loads[slot] = load + size
            self._chosen.append(slot)
            self._assign_next_run()
            self._chosen.pop()
            self._loads[slot] = load

    def _can_improve(self, at: int) -> bool:
        """Whether the room below the best end holds all that is left."""
        room = sum(self._end - load for load in self._loads)
        return self._left[at] < room
