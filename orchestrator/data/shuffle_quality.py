"""Measure of how well labels are mixed, per shard and per global batch: tars sorted by class train badly, unnoticed.

The measure is the effective number of classes: one over the chance that two samples of the same shard or batch share
their class. It does not depend on how many samples are counted; shuffled perfectly, it is that of the whole split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.errors import format_command
from orchestrator.data import rng
from orchestrator.data.config import OrderConfig
from orchestrator.data.sampler import EpochOrder

Labels = NDArray[np.int64]

# Upper bounds: enough for the figures, few enough to be read within seconds.
MAX_SHARDS = 256
MAX_BATCHES = 32
# With less than half the variety of a shuffled batch, gradients are as noisy as those of a much smaller batch.
POOR_SHARE = 0.5
_SIGMAS = 4.0


@dataclass(frozen=True)
class ShuffleQuality:
    """Effective numbers of classes: means over the shards and batches that were drawn."""

    shard: float
    batch: float
    split: float  # of the whole split: what shards and batches have when all is shuffled
    batch_size: int
    lanes: int
    is_poor: bool

    def format_message(self) -> str:
        """Return one line; with the fix when the mixing is poor."""
        line = (
            f"label mixing: a shard is as varied as {self.shard:.1f} equally frequent classes, a batch of "
            f"{self.batch_size} over {self.lanes} lanes as {self.batch:.1f}; {self.split:.1f} if shuffled"
        )
        if not self.is_poor:
            return line
        return f"{line}: POOR: pack anew with a global shuffle ({format_command('shards pack')}), or raise order.lanes"


def measure_shuffle_quality(
    labels: Sequence[NDArray[np.integer]], order: OrderConfig, batch_size: int
) -> ShuffleQuality:
    """Measure the label mixing of a split whose shards have these labels, trained on in this order.

    Uses no more than max(MAX_SHARDS, 4 x lanes) shards, drawn by hash: `labels` may load them on access.
    """
    most = max(MAX_SHARDS, 4 * order.lanes)
    drawn = rng.permutation(rng.derive_key(0, "mixing"), len(labels))[:most].tolist()
    shards = [np.asarray(labels[shard], dtype=np.int64) for shard in drawn]
    together = np.concatenate([np.empty(0, np.int64), *shards])
    shard_same, shard_pairs = _count_same_class_pairs(shards)
    batch_same, batch_pairs = _count_same_class_pairs(_draw_batches(shards, order, batch_size))
    all_same, all_pairs = _count_same_class_pairs([together])
    # Two samples of the whole split are of the same shard once in as many times as there are shards. Only so the
    # shards that were not drawn count, too: each may hold a class of its own.
    within = shard_same / max(1, shard_pairs)
    across = (all_same - shard_same) / max(1, all_pairs - shard_pairs)
    chance = within / len(labels) + across * (1 - 1 / len(labels)) if len(labels) else 0.0
    by_chance = batch_pairs * chance
    # Samples that are spread more evenly than by chance are as good as shuffled, and no more.
    known = len(np.unique(together)) if len(drawn) == len(labels) else float("inf")
    split = min(1 / chance if chance else 1.0, known)
    shard, batch = (
        min(pairs / same if same else split, split)
        for same, pairs in ((shard_same, shard_pairs), (batch_same, batch_pairs))
    )
    # Few samples show few classes by chance alone.
    is_poor = batch - 1 < POOR_SHARE * (split - 1) and batch_same > by_chance + _SIGMAS * by_chance**0.5
    return ShuffleQuality(shard, batch, split, batch_size, order.lanes, is_poor)


def _draw_batches(shards: Sequence[Labels], order: OrderConfig, batch_size: int) -> list[Labels]:
    """Return labels of global batches spread over an epoch; of all samples when they are fewer than a batch."""
    counts = tuple(len(shard) for shard in shards)
    if not sum(counts):
        return []
    batch_size = min(batch_size, sum(counts))
    plan, together = EpochOrder(counts, 0, 0, order.lanes, order.window), np.concatenate(shards)
    steps = np.unique(np.linspace(0, sum(counts) // batch_size - 1, MAX_BATCHES, dtype=np.int64)).tolist()
    positions = (np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64) for step in steps)
    return [together[plan.get_sample_ids(*plan.locate(each))] for each in positions]


def _count_same_class_pairs(groups: Sequence[Labels]) -> tuple[float, float]:
    """Return the pairs of samples within a group that share their class, and all pairs."""
    counts = [np.unique(group, return_counts=True)[1] for group in groups]
    same = sum(float((count * (count - 1)).sum()) for count in counts) / 2
    return same, sum(len(group) * (len(group) - 1) for group in groups) / 2
