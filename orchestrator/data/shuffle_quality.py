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

# Upper bounds: enough for the figures, few enough to be read at the start of a run.
MAX_SHARDS = 256
MAX_BATCHES = 32
# With less than half the variety of a shuffled batch, gradients are as noisy as those of a much smaller batch.
POOR_SHARE = 0.5
_SIGMAS = 4.0


@dataclass(frozen=True)
class ShuffleQuality:
    """Means over the shards and batches that were drawn."""

    shard_classes: float  # different classes in a shard
    shard_effective: float  # effective number of classes of a shard
    batch_classes: float  # different classes in a global batch
    batch_effective: float
    split_effective: float  # of the whole split: what shards and batches have when all is shuffled
    batch_size: int
    lanes: int
    is_poor: bool

    def format_message(self) -> str:
        """Return one line; with the fix when the mixing is poor."""
        line = (
            f"label mixing: a shard holds {self.shard_classes:.1f} classes, a batch of {self.batch_size} over "
            f"{self.lanes} lanes {self.batch_classes:.1f}; as varied as {self.shard_effective:.1f} and "
            f"{self.batch_effective:.1f} equally frequent classes, {self.split_effective:.1f} if shuffled"
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
    batches = _draw_batches(shards, order, batch_size)
    shard_same, shard_pairs = _count_same_class_pairs(shards)
    batch_same, batch_pairs = _count_same_class_pairs(batches)
    all_same, all_pairs = _count_same_class_pairs([np.concatenate([np.empty(0, np.int64), *shards])])
    # Two samples of the whole split are of the same shard once in as many times as there are shards. Only so the
    # shards that were not drawn count, too: each may hold a class of its own.
    within, across = (
        _divide_or_zero(shard_same, shard_pairs),
        _divide_or_zero(all_same - shard_same, all_pairs - shard_pairs),
    )
    chance = within / len(labels) + across * (1 - 1 / len(labels)) if len(labels) else 0.0
    by_chance = batch_pairs * chance
    # Samples that are spread more evenly than by chance are as good as shuffled, and no more.
    known = _count_classes(shards) if len(drawn) == len(labels) else float("inf")
    effective = min(_compute_effective_classes(chance, 1.0), known)
    batch_effective = min(_compute_effective_classes(_divide_or_zero(batch_same, batch_pairs), effective), effective)
    return ShuffleQuality(
        shard_classes=_mean_classes(shards),
        shard_effective=min(_compute_effective_classes(within, effective), effective),
        batch_classes=_mean_classes(batches),
        batch_effective=batch_effective,
        split_effective=effective,
        batch_size=batch_size,
        lanes=order.lanes,
        # Few samples show few classes by chance alone.
        is_poor=batch_effective - 1 < POOR_SHARE * (effective - 1)
        and batch_same > by_chance + _SIGMAS * by_chance**0.5,
    )


def _draw_batches(shards: Sequence[Labels], order: OrderConfig, batch_size: int) -> list[Labels]:
    """Return labels of global batches spread over an epoch; of all samples when they are fewer than a batch."""
    counts = tuple(len(shard) for shard in shards)
    if not sum(counts):
        return []
    batch_size = min(batch_size, sum(counts))
    steps = sum(counts) // batch_size
    plan = EpochOrder(counts, 0, 0, order.lanes, order.window)
    chosen = np.unique(np.linspace(0, steps - 1, MAX_BATCHES, dtype=np.int64))
    batches = []
    for step in chosen.tolist():
        shard, number = plan.locate(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64))
        picked = [shards[s][n] for s, n in zip(shard.tolist(), number.tolist(), strict=True)]
        batches.append(np.array(picked, dtype=np.int64))
    return batches


def _count_same_class_pairs(batches: Sequence[Labels]) -> tuple[float, float]:
    """Return the pairs of samples within a batch that share their class, and all pairs."""
    counts = [np.unique(batch, return_counts=True)[1] for batch in batches]
    same = sum(float((count * (count - 1)).sum()) for count in counts) / 2
    return same, sum(len(batch) * (len(batch) - 1) for batch in batches) / 2


def _divide_or_zero(same: float, pairs: float) -> float:
    return same / pairs if pairs else 0.0


def _compute_effective_classes(chance: float, otherwise: float) -> float:
    """Return the effective number of classes by the chance that two samples share theirs; `otherwise` without one."""
    return 1 / chance if chance else otherwise


def _count_classes(groups: Sequence[Labels]) -> int:
    return len(np.unique(np.concatenate([np.empty(0, np.int64), *groups])))


def _mean_classes(groups: Sequence[Labels]) -> float:
    return float(np.mean([len(np.unique(group)) for group in groups])) if groups else 0.0
