"""Which samples a rank will need, in the order of first need: what the read-ahead works through."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from orchestrator.data.order import EpochOrder, Ints, batch_positions

# A rank's first batch is read sample by sample, so that it does not wait for whole windows.
PRIMED_STEPS = 1
PRIMED_SHARE = 20  # such a batch is at most this part of what the windows hold


class Span(NamedTuple):
    """Neighbouring samples of a shard that are needed from one batch on."""

    shard: int
    numbers: Ints  # ascending numbers within the shard; those between them are not needed
    step: int  # batch in which the first of them is needed
    single: bool = False  # to be read sample by sample


def of_epoch(order: EpochOrder, batch_size: int, steps: range, rank: int, workers: int) -> Iterator[Span]:
    """The windows of the rank's lanes, in the order in which they open; memory for the lanes only."""
    # Asked for at once, before any window is: a window that opens with them then leaves them out. Unless they are many:
    # what lies between them is read with the windows all the same.
    primed = steps[:PRIMED_STEPS] if batch_size * PRIMED_SHARE < order.lanes * order.window else ()
    for step in primed:
        mine = batch_positions(step, batch_size, order.lanes, rank, workers)
        yield from _singles(*order.locate(mine), steps.start)
    begin, end = steps.start * batch_size, min(steps.stop * batch_size, order.samples)
    heap = []
    for lane in range(rank, order.lanes, workers):
        at, stop = (_lane_steps(position, lane, order.lanes) for position in (begin, end))
        if at < stop:
            heap.append((at * order.lanes + lane, lane, at, stop))
    heapq.heapify(heap)
    while heap:
        position, lane, at, stop = heapq.heappop(heap)
        start, past = order.window_at(lane, at)
        step = position // batch_size
        if at > start:
            # Resumed inside a window: only what is left of it is needed.
            left = np.arange(at, min(past, stop), dtype=np.int64) * order.lanes + lane
            yield from _grouped(*order.locate(left), step)
        else:
            for shard, first, last in order.spans(lane, start, past):
                yield Span(shard, np.arange(first, last, dtype=np.int64), step)
        if past < stop:
            heapq.heappush(heap, (past * order.lanes + lane, lane, past, stop))


def of_ids(counts: Sequence[int], first: int, past: int, batch_size: int) -> Iterator[Span]:
    """Samples `first` .. `past` - 1 by id, in order, in batches from 0 on."""
    start = 0
    for shard, count in enumerate(counts):
        low, high = max(first, start), min(past, start + count)
        for at in range(low, high, batch_size):
            numbers = np.arange(at - start, min(at + batch_size, high) - start, dtype=np.int64)
            yield Span(shard, numbers, (at - first) // batch_size)
        start += count


def _lane_steps(position: int, lane: int, lanes: int) -> int:
    """How many samples of a lane lie before a position of the epoch."""
    return max(0, -(-(position - lane) // lanes))


def _singles(shard: Ints, number: Ints, step: int) -> Iterator[Span]:
    for one, at in zip(shard.tolist(), number.tolist(), strict=True):
        yield Span(one, np.array([at], dtype=np.int64), step, single=True)


def _grouped(shard: Ints, number: Ints, step: int) -> Iterator[Span]:
    for one in np.unique(shard).tolist():
        yield Span(one, np.sort(number[shard == one]), step)
