"""The order of an epoch as a pure function of (samples per shard, seed, epoch, lanes, window).

Shards are permuted; the sequence of their samples is cut into V lanes (contiguous, lengths differing by at most one);
each lane is shuffled in consecutive windows. Position p of the epoch is the next sample of lane p mod V, and global
batch b is positions b * B .. (b + 1) * B - 1, whatever the number of workers: rank r of W owns the lanes l with
l mod W = r. Memory grows with the shards and the open windows, never with the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import keyed
from orchestrator.data.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's order. `counts` are the samples of each shard in the manifest's order."""

    counts: tuple[int, ...]
    seed: int
    epoch: int
    lanes: int
    window: int

    @cached_property
    def samples(self) -> int:
        """Samples of the dataset: the positions that exist, the dropped tail included."""
        return sum(self.counts)

    @cached_property
    def shard_order(self) -> Ints:
        """Shards of the epoch in reading order."""
        return keyed.permutation(keyed.key(self.seed, "shards", self.epoch), len(self.counts))

    @cached_property
    def _counts(self) -> Ints:
        return np.asarray(self.counts, dtype=np.int64)

    @cached_property
    def _ends(self) -> Ints:
        return np.cumsum(self._counts[self.shard_order], dtype=np.int64)

    @cached_property
    def _starts_by_shard(self) -> Ints:
        """First sample id of each shard: ids number the samples in the manifest's order."""
        return np.cumsum([0, *self.counts[:-1]], dtype=np.int64)

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """Shard and number within the shard of the samples at these positions (each an array like `positions`)."""
        lane, step = positions % self.lanes, positions // self.lanes
        sequence = self._lane_start(lane) + self._shuffled(lane, step)
        slot = np.searchsorted(self._ends, sequence, side="right")
        shard = self.shard_order[slot]
        return shard, sequence - (self._ends[slot] - self._counts[shard])

    def ids(self, shard: Ints, number: Ints) -> Ints:
        """Sample ids (whole numbers, the same in every epoch) of located samples."""
        return np.asarray(self._starts_by_shard[shard] + number, dtype=np.int64)

    def _lane_start(self, lane: Ints) -> Ints:
        short, longer = divmod(self.samples, self.lanes)
        starts = np.asarray(lane * short + np.minimum(lane, longer), dtype=np.int64)
        return starts

    def _shuffled(self, lane: Ints, step: Ints) -> Ints:
        """Where in its lane the step-th sample lies: a permutation within each window."""
        block = step // self.window
        result = np.empty_like(step)
        for one_lane, one_block in np.unique(np.stack((lane, block), axis=1), axis=0).tolist():
            chosen = (lane == one_lane) & (block == one_block)
            start = one_block * self.window
            result[chosen] = start + self._window(one_lane, one_block)[step[chosen] - start]
        return result

    @cached_property
    def _open(self) -> dict[int, tuple[int, Ints]]:
        """Of each lane the window that was last asked for: lanes x window numbers at most."""
        return {}

    def _window(self, lane: int, block: int) -> Ints:
        """The shuffle of a lane's window, shorter at the lane's end."""
        held = self._open.get(lane)
        if held is None or held[0] != block:
            size = min(self.window, self._lane_length(lane) - block * self.window)
            key = keyed.key(self.seed, "window", self.epoch, lane, block)
            held = self._open[lane] = (block, keyed.permutation(key, size))
        return held[1]

    def _lane_length(self, lane: int) -> int:
        short, longer = divmod(self.samples, self.lanes)
        return short + (lane < longer)


def batch_positions(step: int, batch_size: int, lanes: int, rank: int, workers: int) -> Ints:
    """Positions of global batch `step` that rank `rank` of `workers` trains on, ascending."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    mine: Ints = positions[(positions % lanes) % workers == rank]
    return mine


def check(counts: Sequence[int], lanes: int, batch_size: int, workers: int) -> None:
    """Raise DataError when this many workers cannot share the work."""
    if workers > lanes:
        raise DataError(f"workers: {workers} is refused: more than order.lanes ({lanes}), so some would have no data")
    if workers > batch_size:
        raise DataError(f"workers: {workers} is refused: more than batch_size ({batch_size})")
    if sum(counts) < batch_size:
        raise DataError(f"batch_size: {batch_size} is refused: the split has only {sum(counts)} samples")


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Whole global batches of an epoch; the rest is dropped by plan, another rest in each epoch."""
    return samples // batch_size
