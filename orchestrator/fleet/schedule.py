"""Schedules of runs on equal slots, as numbers: the shortest one, when each run starts, and what none can beat.

Runs are given by their durations (all positive, in any unit); a slot is what one worker, or one run of a fixed number
of workers, needs of the cluster.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

# Up to so many runs the shortest schedule is searched for; beyond it, longest first is near enough.
EXACT_RUNS = 12
# Far more than twelve durations that were measured need; it bounds the time (a second) of those made to be hard.
MOST_NODES = 200_000
_CLOSE = 1e-9  # relative; sums of floats in another order differ by less


def lower_bound(durations: Sequence[float], slots: int) -> float:
    """What no schedule can beat: the longest run, the mean load of a slot, and the waves that come of many runs.

    Of the k x slots + 1 longest runs some slot has to take k + 1; for equal runs that is ceil(runs / slots) waves.
    0 without a run. Raises ValueError without a slot.
    """
    _check(slots)
    longest = sorted(durations, reverse=True)
    mean = sum(longest) / slots
    waves = (sum(longest[at - at // slots : at + 1]) for at in range(0, len(longest), slots))
    return max([mean, *waves])


def shortest(durations: Sequence[float], slots: int) -> list[int]:
    """The slot of each run in the schedule that ends first; each slot takes its runs one after the other.

    Longest first, each to the slot that is free first (Graham: at most 4/3 - 1/(3 slots) of the shortest), unless a
    search finds better; the search is exact up to `EXACT_RUNS` runs. Raises ValueError without a slot.
    """
    _check(slots)
    order = sorted(range(len(durations)), key=lambda run: -durations[run])
    sizes = [durations[run] for run in order]
    found, end = _longest_first(sizes, slots)
    if len(sizes) <= EXACT_RUNS:
        found = _Search(sizes, slots, found, end).best
    chosen = [0] * len(sizes)
    for run, slot in zip(order, found, strict=True):
        chosen[run] = slot
    return chosen


def in_turn(
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


def _check(slots: int) -> None:
    if slots < 1:
        raise ValueError(f"slots: {slots} is refused: at least 1 is needed")


def _longest_first(sizes: Sequence[float], slots: int) -> tuple[list[int], float]:
    """The slot of each run, and the end; `sizes` fall."""
    ends = [(0.0, slot) for slot in range(slots)]
    chosen = []
    for size in sizes:
        end, slot = ends[0]
        chosen.append(slot)
        heapq.heapreplace(ends, (end + size, slot))
    return chosen, max(end for end, _ in ends)


class _Search:
    """Branch and bound over the slot of each run, longest first."""

    def __init__(self, sizes: Sequence[float], slots: int, best: list[int], end: float) -> None:
        """sizes: falling. best, end: a schedule to be improved, and when it ends."""
        self.best = best
        self._sizes, self._end = sizes, end
        self._floor = lower_bound(sizes, slots) * (1 + _CLOSE)
        self._left = [sum(sizes[at:]) for at in range(len(sizes) + 1)]
        self._loads = [0.0] * slots
        self._chosen: list[int] = []
        self._nodes = 0
        self._place()

    def _place(self) -> None:
        """Try every slot for the next run."""
        at = len(self._chosen)
        if at == len(self._sizes):
            end = max(self._loads)
            if end < self._end * (1 - _CLOSE):  # not for a rounding: longest first bears surprises better
                self.best, self._end = list(self._chosen), end
            return
        tried = set()
        # The emptiest first, so that good schedules are found early; slots of equal load are one.
        for slot in sorted(range(len(self._loads)), key=self._loads.__getitem__):
            load, size = self._loads[slot], self._sizes[at]
            if self._end <= self._floor or self._nodes >= MOST_NODES:
                return
            if load in tried or load + size >= self._end * (1 - _CLOSE) or not self._may_fit(at):
                continue
            tried.add(load)
            self._nodes += 1
            self._loads[slot] = load + size
            self._chosen.append(slot)
            self._place()
            self._chosen.pop()
            self._loads[slot] = load

    def _may_fit(self, at: int) -> bool:
        """Whether the room below the best end holds all that is left."""
        room = sum(self._end - load for load in self._loads)
        return self._left[at] < room
