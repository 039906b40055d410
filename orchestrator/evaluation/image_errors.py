"""Errors of each image for every score view, member and ensemble, in one pass over stored scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import rng
from orchestrator.data.transforms import multi_crop
from orchestrator.evaluation.score_reader import ShardScores
from orchestrator.evaluation.score_store import Float32Array, Scores

# Scores of an image: the mean over so many crops, also with the raw weights; the mean over the crops of one scale (by
# the paper's shorter side); the maximum over so many crops.
ScoreView = tuple[str, int]
CROPS, RAW, SCALE, MAXIMUM = "crops", "raw", "scale", "maximum"
ALL_CROPS: ScoreView = (CROPS, multi_crop.NUM_CROPS)

# Up to this many members all subsets are counted, 1,023 of them; of more members at most so many of each size.
MAX_EXHAUSTIVE_MEMBERS = 10
MAX_SUBSETS_PER_SIZE = 128
ROUNDING_MARGIN = np.float32(2**-16)  # relative; more than the rounding error of a float32 sum of a hundred scores

ErrorFlags = NDArray[np.bool_]  # images x 2: whether the true class misses the first place, and the first five
Subset = tuple[int, ...]  # numbers of members, ascending


@dataclass(frozen=True)
class ImageErrors:
    """Errors of the N images with scores and a label; K members, K + 1 models: the members and their ensemble."""

    num_members: int
    ids: NDArray[np.int64]  # N
    labels: NDArray[np.int64]  # N
    error_flags: Mapping[ScoreView, Mapping[Subset, ErrorFlags]]  # of the subsets that are detailed image by image
    error_counts: Mapping[int, Mapping[Subset, NDArray[np.int64]]]  # by crops, all subsets: images wrong, top-1 and -5
    predicted: NDArray[np.int64]  # K + 1 x N, over 144 crops; the label exactly where top-1 is right
    confidence: NDArray[np.float32]  # K + 1 x N, mean probability of `predicted`
    competing_classes: Sequence[CompetingClasses]  # over 144 crops, by shard
    bad_images: int
    unlabelled: int

    @property
    def all_members(self) -> Subset:
        """All members."""
        return tuple(range(self.num_members))

    def get_errors(self, view: ScoreView, models: int, members: Subset | None = None) -> NDArray[np.float64]:
        """Return N x 2 errors of all members or of these: for one model the mean over them, else of their ensemble."""
        members = self.all_members if members is None else members
        if models > 1:
            return self.error_flags[view][members].astype(np.float64)
        singles = [self.error_flags[view][(member,)] for member in members]
        return np.asarray(np.mean(singles, axis=0, dtype=np.float64))


def collect_errors(shards: Iterable[ShardScores], num_members: int, raw: Subset) -> ImageErrors:
    """Collect the errors of shards whose parts are those of the members, then of the raw weights of the `raw` of them.

    The views of raw weights number those as members 0, 1, ...
    """
    counted = set(list_subsets(num_members))
    detailed = {subset for subset in counted if len(subset) in (1, num_members - 1, num_members)} | {raw} - {()}
    parts = [_collect_shard_errors(shard, num_members, counted, detailed) for shard in shards]
    first = parts[0]
    return ImageErrors(
        num_members=num_members,
        ids=np.concatenate([part.ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        error_flags={
            view: {subset: np.concatenate([part.error_flags[view][subset] for part in parts]) for subset in by_subset}
            for view, by_subset in first.error_flags.items()
        },
        error_counts={
            count: {
                subset: np.sum([part.error_counts[count][subset] for part in parts], axis=0) for subset in by_subset
            }
            for count, by_subset in first.error_counts.items()
        },
        predicted=np.concatenate([part.predicted for part in parts], axis=1),
        confidence=np.concatenate([part.confidence for part in parts], axis=1),
        competing_classes=[classes for part in parts for classes in part.competing_classes],
        bad_images=sum(part.bad_images for part in parts),
        unlabelled=sum(part.unlabelled for part in parts),
    )


def _collect_shard_errors(
    shard: ShardScores, num_members: int, counted: set[Subset], detailed: set[Subset]
) -> ImageErrors:
    """Return the errors of one shard, with the counts of `counted` and the errors of images of `detailed`."""
    averaged, raw = shard.scores[:num_members], shard.scores[num_members:]
    flags: dict[ScoreView, dict[Subset, ErrorFlags]] = {}
    counts: dict[int, dict[Subset, NDArray[np.int64]]] = {}
    over_all_crops = []
    for view, scores in _iter_score_views(averaged, raw):
        competing = CompetingClasses(scores, shard.labels)
        if view[0] == CROPS:
            errors = dict(competing.iter_errors(counted | detailed))
            counts[view[1]] = {subset: errors[subset].sum(axis=0) for subset in sorted(counted)}
            flags[view] = {subset: errors[subset] for subset in sorted(detailed)}
        else:
            flags[view] = dict(competing.iter_errors(_list_singles_and_ensemble(len(scores))))
        if view == ALL_CROPS:
            over_all_crops.append(competing)
    predicted, confidence = _predict_classes(averaged, shard.labels, flags[ALL_CROPS])
    return ImageErrors(
        num_members, shard.ids, shard.labels, flags, counts, predicted, confidence, over_all_crops, shard.bad_images,
        shard.unlabelled,
    )  # fmt: skip


def _list_singles_and_ensemble(members: int) -> set[Subset]:
    return {*((member,) for member in range(members)), tuple(range(members))}


def _iter_score_views(
    averaged: Sequence[Scores], raw: Sequence[Scores]
) -> Iterator[tuple[ScoreView, list[Float32Array]]]:
    """Yield every view of a shard with the N x C scores of each model."""
    for count in multi_crop.CROP_SUBSETS:
        yield (CROPS, count), [part.means[count] for part in averaged]
        if raw:
            yield (RAW, count), [part.means[count] for part in raw]
    for number, scale in enumerate(multi_crop.PAPER_SCALES):
        yield (SCALE, scale), [part.per_scale[:, number] for part in averaged]
    yield (MAXIMUM, multi_crop.NUM_CROPS), [part.maximum for part in averaged]


def _predict_classes(
    averaged: Sequence[Scores], labels: NDArray[np.int64], flags: Mapping[Subset, ErrorFlags]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the class that each member, and then their ensemble, predicts for each image, and its mean probability."""
    means = [part.means[multi_crop.NUM_CROPS] for part in averaged]
    total = means[0].copy()
    for mean in means[1:]:
        total += mean
    answers = [_predict_top_class(mean, labels, flags[(member,)][:, 0]) for member, mean in enumerate(means)]
    ensemble, confidence = _predict_top_class(total, labels, flags[tuple(range(len(averaged)))][:, 0])
    answers.append((ensemble, confidence / np.float32(len(averaged))))
    return np.stack([classes for classes, _ in answers]), np.stack([confidence for _, confidence in answers])


def _predict_top_class(
    scores: Float32Array, labels: NDArray[np.int64], wrong: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the class of the highest of N x C scores, and that score.

    A tie counts against the true class, so the other one is predicted then.
    """
    predicted = scores.argmax(axis=1)
    tied = np.flatnonzero(wrong & (predicted == labels))
    if len(tied):
        others = scores[tied]
        others[np.arange(len(tied)), labels[tied]] = -1
        predicted[tied] = others.argmax(axis=1)
    confidence = scores[np.arange(len(labels)), predicted]
    return predicted, np.where(np.isfinite(confidence), confidence, np.float32(0))  # NaN is no confidence


class CompetingClasses:
    """The classes of some images that score at least as high as the true one in at least one member.

    No other class can do so in a mean of members: where each member's score is below that of the true class, so are
    their sums. A float32 sum of K scores is off by less than K parts in 2^24, so that rounding cannot change that where
    they differ by more than ROUNDING_MARGIN. Scores decoded from float16 do so whenever they differ.
    """

    def __init__(self, scores: Sequence[Float32Array], labels: NDArray[np.int64]) -> None:
        """scores: K times N x C, decoded from float16. labels: N, each a class."""
        rows = np.arange(len(labels))
        self._true = np.stack([member[rows, labels] for member in scores])
        shape = scores[0].shape
        below, all_below = np.empty(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
        for member, true in zip(scores, self._true, strict=True):
            # Not ">=": a NaN score must count as wrong, not as right.
            all_below &= np.less(member, true[:, None] * (1 - ROUNDING_MARGIN), out=below)
        all_below[rows, labels] = True
        images, classes = np.divmod(np.flatnonzero(~all_below), shape[1])
        self._scores = np.stack([member[images, classes] for member in scores])
        # The classes are in the order of their images, so those of an image are between two of these.
        self._bounds = np.searchsorted(images, np.arange(len(labels) + 1))

    def iter_errors(self, subsets: Iterable[Subset]) -> Iterator[tuple[Subset, ErrorFlags]]:
        """Yield each subset of the members with the errors (N x 2) of its ensemble, in sorted order.

        Scores are summed in float32 in the order of the members, and a tie counts against the true class.
        """
        num_classes = np.diff(self._bounds)
        # A subset shares the sum of the first members that it has in common with the one before it.
        sums: list[tuple[int, Float32Array, Float32Array]] = []
        for subset in sorted(subsets):
            shared = 0
            while shared < min(len(sums), len(subset)) and sums[shared][0] == subset[shared]:
                shared += 1
            del sums[shared:]
            for member in subset[shared:]:
                scores, true = self._scores[member], self._true[member]
                if sums:
                    scores, true = sums[-1][1] + scores, sums[-1][2] + true
                sums.append((member, scores, true))
            _, scores, true = sums[-1]
            not_below = np.flatnonzero(~(scores < np.repeat(true, num_classes)))
            others = np.diff(np.searchsorted(not_below, self._bounds))
            yield subset, np.stack((others >= 1, others >= 5), axis=1)


def list_subsets(num_members: int) -> list[Subset]:
    """List all subsets of members but the empty one; of many members at most MAX_SUBSETS_PER_SIZE of each size.

    A keyed draw selects those, the same each time. Single members, the whole, and the whole less one are always there.
    """
    subsets: list[Subset] = []
    for size in range(1, num_members + 1):
        possible = math.comb(num_members, size)
        if num_members <= MAX_EXHAUSTIVE_MEMBERS or possible <= max(MAX_SUBSETS_PER_SIZE, num_members):
            subsets += combinations(range(num_members), size)
            continue
        drawn: dict[Subset, None] = {}
        first = 0
        while len(drawn) < MAX_SUBSETS_PER_SIZE:
            draws = np.arange(first, first + MAX_SUBSETS_PER_SIZE)
            orders = rng.uniform(rng.derive_key(0, "subset", size), draws, num_members).argsort(axis=1)
            drawn |= dict.fromkeys(tuple(row) for row in np.sort(orders[:, :size], axis=1).tolist())
            first += MAX_SUBSETS_PER_SIZE
        subsets += sorted(list(drawn)[:MAX_SUBSETS_PER_SIZE])
    return subsets
