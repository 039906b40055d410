"""Errors of each image for every score view, member and ensemble, in one pass over stored scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.transforms import multi_crop
from orchestrator.evaluation.score_store import Float32Array, ShardScores

# Scores of an image: the mean over so many crops; the mean over the crops of one scale (by the paper's shorter side);
# the maximum over so many crops.
ScoreView = tuple[str, int]
CROPS, SCALE, MAXIMUM = "crops", "scale", "maximum"
ALL_CROPS: ScoreView = (CROPS, multi_crop.NUM_CROPS)
# In the order of the stored rows.
VIEWS: tuple[ScoreView, ...] = (
    *((CROPS, count) for count in multi_crop.CROP_SUBSETS),
    *((SCALE, scale) for scale in multi_crop.PAPER_SCALES),
    (MAXIMUM, multi_crop.NUM_CROPS),
)

MAX_EXHAUSTIVE_MEMBERS = 10  # up to this many members all subsets are counted, 1,023 of them
ROUNDING_MARGIN = np.float32(2**-16)  # relative; more than the rounding error of a float32 sum of a hundred scores

ErrorFlags = NDArray[np.bool_]  # images x 2: whether the true class misses the first place, and the first five
Subset = tuple[int, ...]  # numbers of members, ascending


@dataclass(frozen=True)
class ImageErrors:
    """Errors of the N images with scores and a label; K members, K + 1 models: the members and their ensemble."""

    num_members: int
    ids: NDArray[np.int64]  # N
    labels: NDArray[np.int64]  # N
    flags: Mapping[tuple[ScoreView, Subset], ErrorFlags]  # of single members, all but one, and all
    error_counts: Mapping[int, Mapping[Subset, NDArray[np.int64]]]  # by crops and subset: images wrong, top-1 and -5
    predicted: NDArray[np.int64]  # K + 1 x N, over 144 crops; the label exactly where top-1 is right
    confidence: NDArray[np.float32]  # K + 1 x N, mean probability of `predicted`
    bad_images: int
    unlabelled: int

    @property
    def all_members(self) -> Subset:
        """All members."""
        return tuple(range(self.num_members))

    def get_errors(self, view: ScoreView, models: int) -> NDArray[np.float64]:
        """Return N x 2 errors: for one model the mean over the members, else those of their ensemble."""
        if models > 1:
            return self.flags[view, self.all_members].astype(np.float64)
        singles = [self.flags[view, (member,)] for member in self.all_members]
        return np.asarray(np.mean(singles, axis=0, dtype=np.float64))


def collect_errors(shards: Iterable[ShardScores], num_members: int) -> ImageErrors:
    """Collect the errors of shards whose parts are those of the members."""
    subsets = list_subsets(num_members)
    detailed = {subset for subset in subsets if len(subset) in (1, num_members - 1, num_members)}
    flags: dict[tuple[ScoreView, Subset], list[ErrorFlags]] = defaultdict(list)
    counts = {crops: dict.fromkeys(subsets, np.zeros(2, dtype=np.int64)) for crops in multi_crop.CROP_SUBSETS}
    columns: list[tuple[NDArray[Any], ...]] = []
    bad_images = unlabelled = 0
    for shard in shards:
        for row, view in enumerate(VIEWS):
            scores = [rows[:, row] for rows in shard.rows]
            for subset, wrong in iter_errors(scores, shard.labels, subsets if view[0] == CROPS else detailed):
                if view[0] == CROPS:
                    counts[view[1]][subset] = counts[view[1]][subset] + wrong.sum(axis=0)
                if subset in detailed:
                    flags[view, subset].append(wrong)
        top1_errors = {subset: flags[ALL_CROPS, subset][-1][:, 0] for subset in detailed}
        columns.append((shard.ids, shard.labels, *_predict_classes(shard, top1_errors)))
        bad_images, unlabelled = bad_images + shard.bad_images, unlabelled + shard.unlabelled
    ids, labels, predicted, confidence = (np.concatenate(parts, axis=-1) for parts in zip(*columns, strict=True))
    joined = {key: np.concatenate(parts) for key, parts in flags.items()}
    return ImageErrors(num_members, ids, labels, joined, counts, predicted, confidence, bad_images, unlabelled)


def _predict_classes(
    shard: ShardScores, wrong: Mapping[Subset, NDArray[np.bool_]]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the class that each member, and then their ensemble, predicts for each image, and its mean probability.

    wrong: the top-1 errors of the members and of the ensemble. A tie counts against the true class, so the other one is
    predicted then.
    """
    means = [rows[:, VIEWS.index(ALL_CROPS)] for rows in shard.rows]
    models = {(member,): mean for member, mean in enumerate(means)}
    rows = np.arange(len(shard.labels))
    answers = []
    for subset, scores in [*models.items(), (tuple(range(len(means))), reduce(np.add, means))]:
        predicted = scores.argmax(axis=1)
        tied = np.flatnonzero(wrong[subset] & (predicted == shard.labels))
        if len(tied):
            others = scores[tied]
            others[np.arange(len(tied)), shard.labels[tied]] = -1
            predicted[tied] = others.argmax(axis=1)
        confidence = scores[rows, predicted] / np.float32(len(subset))
        answers.append((predicted, np.where(np.isfinite(confidence), confidence, np.float32(0))))  # NaN is none
    return np.stack([classes for classes, _ in answers]), np.stack([confidence for _, confidence in answers])


def iter_errors(
    scores: Sequence[Float32Array], labels: NDArray[np.int64], subsets: Iterable[Subset]
) -> Iterator[tuple[Subset, ErrorFlags]]:
    """Yield each subset of the members with the errors (N x 2) of its ensemble, in sorted order.

    scores: K times N x C. labels: N, each a class. Scores are summed in float32 in the order of the members, and a tie
    counts against the true class.

    Only classes that score at least as high as the true one in at least one member are looked at. No other class can do
    so in a mean of members: where each member's score is below that of the true class, so are their sums. A float32 sum
    of K scores is off by less than K parts in 2^24, so that rounding cannot change that where they differ by more than
    ROUNDING_MARGIN. Scores decoded from float16 do so whenever they differ.
    """
    rows, shape = np.arange(len(labels)), scores[0].shape
    true_scores = np.stack([member[rows, labels] for member in scores])
    below, all_below = np.empty(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
    for member, true in zip(scores, true_scores, strict=True):
        # Not ">=": a NaN score must count as wrong, not as right.
        all_below &= np.less(member, true[:, None] * (1 - ROUNDING_MARGIN), out=below)
    all_below[rows, labels] = True
    images, classes = np.divmod(np.flatnonzero(~all_below), shape[1])
    competing = np.stack([member[images, classes] for member in scores])
    # The classes are in the order of their images, so those of an image are between two of these.
    bounds = np.searchsorted(images, np.arange(len(labels) + 1))
    # A subset shares the sum of the first members that it has in common with the one before it.
    sums: list[tuple[int, Float32Array, Float32Array]] = []
    for subset in sorted(subsets):
        shared = 0
        while shared < min(len(sums), len(subset)) and sums[shared][0] == subset[shared]:
            shared += 1
        del sums[shared:]
        for number in subset[shared:]:
            total, true = competing[number], true_scores[number]
            if sums:
                total, true = sums[-1][1] + total, sums[-1][2] + true
            sums.append((number, total, true))
        _, total, true = sums[-1]
        not_below = np.flatnonzero(~(total < np.repeat(true, np.diff(bounds))))
        others = np.diff(np.searchsorted(not_below, bounds))
        yield subset, np.stack((others >= 1, others >= 5), axis=1)


def list_subsets(num_members: int) -> list[Subset]:
    """List all subsets of members but the empty one; of very many only the single ones, all but one, all."""
    sizes: Sequence[int] = range(1, num_members + 1)
    if num_members > MAX_EXHAUSTIVE_MEMBERS:
        sizes = (1, num_members - 1, num_members)
    return [subset for size in sizes for subset in combinations(range(num_members), size)]
