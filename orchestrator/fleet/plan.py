"""The plan of a fleet: how many runs at once, with how many workers each, in which order. A pure function.

Where it says that runs may be widened, a run may get more workers than its placement has, if then all end sooner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations_with_replacement, product

from orchestrator.fleet import schedule
from orchestrator.launch.cluster import Capacity
from orchestrator.launch.config import Placement, RunSpec
from orchestrator.models.config import normalises_batches

# Ways to give workers to runs that are compared; each takes some ten microseconds.
MOST_WAYS = 5000
_CLOSE = 1e-9


@dataclass(frozen=True)
class Pace:
    """How long runs take: a start, which no worker shortens, and training, by Amdahl's law.

    start: of each launch, in the unit of the durations. most_workers: of a run; None: no more than its placement has.
    serial_share: of a step that more workers make no shorter.
    """

    start: float = 0.0
    most_workers: int | None = None
    serial_share: float = 0.05

    def training(self, duration: float, workers: int, wider: int) -> float:
        """What takes `duration` with `workers` takes so long with `wider`."""
        return duration * self._share(wider) / self._share(workers)

    def _share(self, workers: int) -> float:
        return self.serial_share + (1 - self.serial_share) / workers

    def most(self, spec: RunSpec) -> int:
        """The most workers that a run may have; its own number where another one would change its losses."""
        own = spec.placement.workers
        if self.most_workers is None or spec.placement.elastic or normalises_batches(spec.recipe.model):
            return own
        return max(own, min(self.most_workers, spec.recipe.order.lanes, spec.recipe.batch_size))


STEADY = Pace()


@dataclass(frozen=True)
class Planned:
    """A run with its workers, and when it starts and ends."""

    spec: RunSpec
    start: float
    end: float


@dataclass(frozen=True)
class Plan:
    """Runs in starting order; times are in the unit of the durations that it was made of.

    slots: workers that the cluster holds at once. at_once: most runs at the same time. bound: what no plan of these
    runs can beat. workers: of each run by its placement; planned ones may have more.
    """

    runs: tuple[Planned, ...]
    slots: int
    at_once: int
    bound: float
    pace: Pace = STEADY
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
    def waves(self) -> int:
        """How many runs one after the other."""
        return math.ceil(len(self.runs) / self.at_once)

    def wave(self, name: str) -> int:
        """In which of them a run is, from 1."""
        return 1 + [run.spec.name for run in self.runs].index(name) // self.at_once


def work(spec: RunSpec) -> float:
    """How much a run has to do, up to a constant: epochs x multiply-adds of an image."""
    return float(spec.recipe.epochs * image_cost(spec))


def image_cost(spec: RunSpec) -> int:
    """Multiply-adds of one image's way forward through a run's network in training."""
    # Measured on a network that is built: torch, which takes two seconds to import, is needed for nothing else here.
    cost: int = import_module("orchestrator.models.measure").image_cost(spec.recipe.model)
    return cost


def slots(capacity: Capacity, placement: Placement, gpus: float) -> int:
    """Workers that the cluster holds at once, or would with the nodes that its autoscaler can bring.

    A node that has no room for a worker counts nothing.
    """
    live = capacity.bundles(placement.cpus_per_worker, gpus)
    if capacity.most_cpus is None or capacity.most_gpus is None:
        return live
    # Nodes come when runs ask for them, so runs have to be started before they are there.
    most = capacity.most_cpus // placement.cpus_per_worker
    return max(live, int(most if gpus <= 0 else min(most, capacity.most_gpus // gpus)))


def plan(
    runs: Sequence[RunSpec],
    capacity: Capacity,
    gpus: float,
    durations: Sequence[float] | None = None,
    pace: Pace = STEADY,
) -> Plan:
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
    return for_slots(runs, slots(capacity, placement, gpus), durations, pace)


def for_slots(
    runs: Sequence[RunSpec], there: int, durations: Sequence[float] | None = None, pace: Pace = STEADY
) -> Plan:
    """The plan for a cluster that holds so many workers at once; as `plan` does."""
    placement = runs[0].placement
    fits = there // placement.least
    if fits < 1:
        raise ValueError(f"placement.workers: {placement.workers} is refused: not one run fits the cluster")
    at_once = min(fits, len(runs), placement.at_once or len(runs))
    if durations is None:
        # A run alone is not compared with any; to measure a network takes a second or two.
        durations = [work(spec) for spec in runs] if len(runs) > 1 else [1.0]
    return _Planner(runs, durations, pace, there, at_once).plan()


class _Planner:
    """The search for a plan."""

    def __init__(
        self, runs: Sequence[RunSpec], durations: Sequence[float], pace: Pace, slots: int, at_once: int
    ) -> None:
        self._pace, self._slots, self._at_once = pace, slots, at_once
        # Longest first; runs of equal length in the order given.
        pairs = sorted(zip(runs, durations, strict=True), key=lambda pair: -pair[1])
        self._runs = [spec for spec, _ in pairs]
        self._durations = [duration for _, duration in pairs]
        self._own = [spec.placement.workers for spec in self._runs]

    def plan(self) -> Plan:
        """The best plan."""
        found = self._with_own_workers()
        end, best = max(run.end for run in found), None
        for workers in self._ways():
            other = max(start + lasts for _, start, lasts in self._times(workers))
            if other < end * (1 - _CLOSE):
                end, best = other, workers
        if best is not None:
            found = [
                Planned(with_workers(self._runs[run], best[run]), start, start + lasts)
                for run, start, lasts in self._times(best)
            ]
        # By start: who takes the runs in this order, each when there is room, carries the plan out.
        in_order = sorted(found, key=lambda run: run.start)
        return Plan(tuple(in_order), self._slots, self._at_once, self._bound(), self._pace, self._own[0])

    def _lasts(self, run: int, workers: int) -> float:
        return self._pace.start + self._pace.training(self._durations[run], self._own[run], workers)

    def _with_own_workers(self) -> list[Planned]:
        """The best plan without widening any run."""
        lasts = [self._lasts(run, own) for run, own in enumerate(self._own)]
        ends = [0.0] * self._at_once
        made = []
        for run, slot in enumerate(schedule.shortest(lasts, self._at_once)):
            made.append(Planned(self._runs[run], ends[slot], ends[slot] + lasts[run]))
            ends[slot] += lasts[run]
        return made

    def _times(self, workers: Sequence[int]) -> list[tuple[int, float, float]]:
        """(run, start, duration) with so many workers: longest first, each as soon as there is room for it."""
        lasts = [self._lasts(run, width) for run, width in enumerate(workers)]
        order = sorted(range(len(lasts)), key=lambda run: -lasts[run])
        starts = schedule.in_turn(
            [lasts[run] for run in order], [workers[run] for run in order], self._slots, self._at_once
        )
        return [(run, start, lasts[run]) for run, start in zip(order, starts, strict=True)]

    def _ways(self) -> Iterator[Sequence[int]]:
        """Numbers of workers that are worth a look, for each run; none where no run may have more than its own."""
        kinds: dict[tuple[float, tuple[int, ...]], list[int]] = {}
        for run, spec in enumerate(self._runs):
            options = _doublings(self._own[run], min(self._slots, self._pace.most(spec)))
            kinds.setdefault((self._durations[run], options), []).append(run)
        if all(len(options) == 1 for _, options in kinds):
            return
        if math.prod(math.comb(len(same) + len(key[1]) - 1, len(same)) for key, same in kinds.items()) > MOST_WAYS:
            yield from self._few_ways(kinds)
            return
        # Runs alike are interchangeable: what counts is how many of them have which number.
        for chosen in product(*(combinations_with_replacement(key[1], len(same)) for key, same in kinds.items())):
            workers = list(self._own)
            for same, widths in zip(kinds.values(), chosen, strict=True):
                for run, width in zip(same, widths, strict=True):
                    workers[run] = width
            yield workers

    def _few_ways(self, kinds: dict[tuple[float, tuple[int, ...]], list[int]]) -> Iterator[Sequence[int]]:
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

    def _bound(self) -> float:
        """What no plan can beat; a run's own workers take the fewest worker-hours, its most the least time."""
        own = [self._lasts(run, workers) for run, workers in enumerate(self._own)]
        most = [min(self._slots, self._pace.most(spec)) for spec in self._runs]
        if all(width <= mine for width, mine in zip(most, self._own, strict=True)):
            return schedule.lower_bound(own, self._at_once)
        area = sum(lasts * workers for lasts, workers in zip(own, self._own, strict=True))
        return max([area / self._slots, *(self._lasts(run, width) for run, width in enumerate(most))])


def with_workers(spec: RunSpec, workers: int) -> RunSpec:
    """The same run with another number of workers; which run it is does not depend on it."""
    if workers == spec.placement.workers:
        return spec
    return spec.model_copy(update={"placement": spec.placement.model_copy(update={"workers": workers})})


def _doublings(own: int, most: int) -> tuple[int, ...]:
    """own, 2 own, 4 own, ... and `most`."""
    found = [own]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    if most > found[-1]:
        found.append(most)
    return tuple(found)
