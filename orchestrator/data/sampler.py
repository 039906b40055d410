"""Order of an epoch as a pure function of (samples per shard, seed, epoch, lanes, window), and of labels if balanced.

Shards are permuted; the sequence of their samples is cut into V lanes (contiguous, lengths differing by at most one);
each lane is shuffled in consecutive windows, whose ends are spread over the lanes, so that reading is even. Position p
of the epoch is the next sample of lane p mod V, and global batch b is positions b * B .. (b + 1) * B - 1, whatever the
number of workers: rank r of W owns the lanes l with l mod W = r. Memory grows with the shards and the open windows,
never with the samples, unless classes are balanced: then each class gets an equal number of places, filled by its
samples in a keyed order that starts anew when all are used, and the places are put into the order of the shards.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import index, rng
from orchestrator.data.config import OrderConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest

Int64Array = NDArray[np.int64]
LOADING_THREADS = 16
# A rank's first batch, if at most this part of what the windows hold, is read sample by sample and so waits for none.
PRIMED_DIVISOR = 20


def load_balance_labels(url: str, manifest: Manifest, split: str, config: OrderConfig) -> NDArray[np.integer] | None:
    """Return the labels that a class-balanced order needs (N int32), read from all indexes; None for another order.

    Raises DataError when an index is unfit, StorageError when storage fails.
    """
    if config.balance != "class":
        return None
    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        columns = pool.map(lambda shard: index.load(url, shard).labels.astype(np.int32), manifest.shards(split))
        return np.concatenate([np.empty(0, np.int32), *columns])


@dataclass(frozen=True)
class EpochOrder:
    """Order of one epoch; class-balanced when the labels are given."""

    counts: tuple[int, ...]  # samples of each shard in the manifest's order
    seed: int
    epoch: int
    lanes: int
    window: int
    labels: NDArray[np.integer] | None = field(default=None, compare=False, repr=False)  # of each sample, by id

    @cached_property
    def samples(self) -> int:
        """Samples of the dataset: the positions that exist, the dropped tail included."""
        return sum(self.counts)

    @cached_property
    def shard_order(self) -> Int64Array:
        """Shards of the epoch in reading order."""
        return rng.permutation(rng.derive_key(self.seed, "shards", self.epoch), len(self.counts))

    @cached_property
    def _shard_starts(self) -> Int64Array:
        """Return where each shard of `shard_order` begins in the sequence of all samples in reading order."""
        sizes = np.asarray(self.counts, dtype=np.int64)[self.shard_order]
        return np.cumsum(sizes) - sizes

    @cached_property
    def _starts_by_shard(self) -> Int64Array:
        """First sample id of each shard: ids number the samples in the manifest's order."""
        return np.cumsum([0, *self.counts[:-1]], dtype=np.int64)

    def locate(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return shard and number within the shard of the samples at these positions (each like `positions`)."""
        return self.locate_places(self.find_places(positions))

    def get_sample_ids(self, shard: Int64Array, number: Int64Array) -> Int64Array:
        """Return sample ids (whole numbers, the same in every epoch) of located samples."""
        return np.asarray(self._starts_by_shard[shard] + number, dtype=np.int64)

    def get_draw_ids(self, positions: Int64Array, ids: Int64Array) -> Int64Array:
        """Return what to draw augmentation by: the ids at these positions, other numbers where a sample is repeated."""
        if self.labels is None:
            return ids
        return ids + self._balanced[1][self.find_places(positions)] * self.samples

    def find_places(self, positions: Int64Array) -> Int64Array:
        """Return the places in reading order of the samples at these positions."""
        lane, step = positions % self.lanes, positions // self.lanes
        return self.lane_starts[lane] + self._shuffle_in_lane(lane, step)

    def locate_places(self, places: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return shard and number within the shard of the samples at these places in reading order."""
        if self.labels is not None:
            return _locate(self._starts_by_shard, self._balanced[0][places])
        slot, number = _locate(self._shard_starts, places)
        return self.shard_order[slot], number

    @cached_property
    def _balanced(self) -> tuple[Int64Array, Int64Array]:
        """Ids of a class-balanced epoch in reading order, and how often each was used before: N each."""
        labels = np.asarray(self.labels)
        sizes = np.bincount(labels)
        classes = np.flatnonzero(sizes)
        by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[classes][:-1])
        share, rest = divmod(self.samples, len(classes))
        turn = rng.permutation(rng.derive_key(self.seed, "balance", self.epoch), len(classes))
        ids, repetitions = [], []
        for number, (label, members) in enumerate(zip(classes.tolist(), by_class, strict=True)):
            places = share + int(turn[number] < rest)
            key = rng.derive_key(self.seed, "balance-class", self.epoch, label)
            ids.append(np.resize(members[rng.permutation(key, len(members))], places))
            repetitions.append(np.arange(places, dtype=np.int64) // len(members))
        all_ids, all_repetitions = np.concatenate(ids), np.concatenate(repetitions)
        slots = np.argsort(self.shard_order)[_locate(self._starts_by_shard, all_ids)[0]]
        order = np.lexsort((all_repetitions, all_ids, slots))
        return all_ids[order], all_repetitions[order]

    @cached_property
    def lane_starts(self) -> Int64Array:
        """Of each lane where it begins in reading order, and where the last one ends."""
        short, longer = divmod(self.samples, self.lanes)
        lanes = np.arange(self.lanes + 1, dtype=np.int64)
        return lanes * short + np.minimum(lanes, longer)

    @cached_property
    def _first_windows(self) -> Int64Array:
        """Samples of each lane's first window: lanes that have several take turns to open the next one."""
        spread = 1 + np.arange(self.lanes, dtype=np.int64) * self.window // self.lanes
        return np.where(np.diff(self.lane_starts) > self.window, spread, self.window)

    @cached_property
    def _open_windows(self) -> tuple[Int64Array, Int64Array]:
        """Of each lane the window that was last asked for: its number and its shuffle, lanes x window numbers."""
        return np.full(self.lanes, -1, dtype=np.int64), np.zeros((self.lanes, self.window), dtype=np.int64)

    def _shuffle_in_lane(self, lane: Int64Array, step: Int64Array) -> Int64Array:
        """Return where in its lane the step-th sample lies: a permutation within each window."""
        first = self._first_windows[lane]
        block = np.where(step < first, 0, 1 + (step - first) // self.window)
        start = np.where(block == 0, 0, first + (block - 1) * self.window)
        blocks, windows = self._open_windows
        result = np.empty_like(step)
        left = np.arange(len(lane))
        while len(left):
            is_open = blocks[lane[left]] == block[left]
            now = left[is_open]
            result[now] = start[now] + windows[lane[now], (step - start)[now]]
            left = left[~is_open]
            left = left[np.lexsort((block[left], lane[left]))]
            for row in left[np.flatnonzero(np.diff(lane[left], prepend=-1))].tolist():  # of each lane its next block
                number, open_block = int(lane[row]), int(block[row])
                begin, end = self.find_window(number, int(start[row]))
                key = rng.derive_key(self.seed, "window", self.epoch, number, open_block)
                windows[number, : end - begin] = rng.permutation(key, end - begin)
                blocks[number] = open_block
        return result

    def find_window(self, lane: int, step: int) -> tuple[int, int]:
        """Return where in the lane the window that holds its step-th sample begins and ends."""
        first, lane_start, lane_end = (int(n) for n in (self._first_windows[lane], *self.lane_starts[lane : lane + 2]))
        start = 0 if step < first else first + (step - first) // self.window * self.window
        return start, min(first if start == 0 else start + self.window, lane_end - lane_start)


def _locate(starts: Int64Array, places: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return which of the stretches that begin at `starts` hold these places, and how far inside they lie."""
    stretch = np.searchsorted(starts, places, side="right") - 1
    return stretch, places - starts[stretch]


def select_rank_positions(step: int, batch_size: int, lanes: int, rank: int, workers: int) -> Int64Array:
    """Return the positions of global batch `step` that rank `rank` of `workers` trains on, ascending."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    return np.compress((positions % lanes) % workers == rank, positions)


def check_workers(counts: Sequence[int], lanes: int, batch_size: int, workers: int) -> None:
    """Raise DataError when this many workers cannot share the work."""
    if workers > lanes:
        raise DataError(f"workers must be at most order.lanes ({lanes}), got {workers}; raise order.lanes")
    if workers > batch_size:
        raise DataError(f"workers must be at most batch_size ({batch_size}), got {workers}; raise batch_size")
    if sum(counts) < batch_size:
        raise DataError(
            f"batch_size must be at most the {sum(counts)} samples of the split, got {batch_size}; lower it"
        )


def count_steps(samples: int, batch_size: int) -> int:
    """Return the whole global batches of an epoch; the rest is dropped by plan, another rest in each epoch."""
    return samples // batch_size


class Span(NamedTuple):
    """Neighbouring samples of a shard that are needed from one batch on."""

    shard: int
    numbers: Int64Array  # ascending numbers within the shard, some perhaps twice; those between them are not needed
    step: int  # batch in which the first of them is needed
    is_single: bool = False  # to be read sample by sample


def plan_epoch(order: EpochOrder, batch_size: int, steps: range, rank: int, workers: int) -> Iterator[Span]:
    """Yield the windows of the rank's lanes, in the order in which they open; memory for the lanes only."""
    if steps and batch_size * PRIMED_DIVISOR < order.lanes * order.window:
        # Requested before any window: a window that opens with them then leaves them out. Unless they are many: what
        # lies between them is read with the windows anyway.
        located = order.locate(select_rank_positions(steps.start, batch_size, order.lanes, rank, workers))
        for shard, number in zip(*(column.tolist() for column in located), strict=True):
            yield Span(shard, np.array([number], dtype=np.int64), steps.start, is_single=True)
    ends = steps.start * batch_size, min(steps.stop * batch_size, order.samples)

    def list_windows(lane: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        at, stop = (max(0, -(-(position - lane) // order.lanes)) for position in ends)  # samples before them
        while at < stop:
            start, past = order.find_window(lane, at)
            yield at * order.lanes + lane, lane, at, start, past, stop
            at = past

    lanes = range(rank, order.lanes, workers)
    for position, lane, at, start, past, stop in heapq.merge(*map(list_windows, lanes)):
        if at > start:  # resumed inside a window: only what is left of it is needed
            left = np.arange(at, min(past, stop), dtype=np.int64)
            places = np.sort(order.find_places(left * order.lanes + lane))
        else:
            places = np.arange(start, past, dtype=np.int64) + order.lane_starts[lane]
        shards, numbers = order.locate_places(places)
        for stretch in np.split(np.arange(len(shards)), np.flatnonzero(np.diff(shards)) + 1):
            yield Span(int(shards[stretch[0]]), numbers[stretch], position // batch_size)


def plan_id_range(counts: Sequence[int], first: int, past: int, batch_size: int) -> Iterator[Span]:
    """Yield samples `first` .. `past` - 1 by id, in order, in batches from 0 on."""
    start = 0
    for shard, count in enumerate(counts):
        low, high = max(first, start), min(past, start + count)
        for at in range(low, high, batch_size):
            numbers = np.arange(at - start, min(at + batch_size, high) - start, dtype=np.int64)
            yield Span(shard, numbers, (at - first) // batch_size)
        start += count
