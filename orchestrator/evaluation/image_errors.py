"""One pass over stored scores: what each image comes to, for every view of it, member and ensemble."""

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
from orchestrator.evaluation.score_store import Scores

# What is scored of an image: the mean over so many crops, also with the raw weights; the mean over the crops of one
# scale (by the paper's shorter side); the maximum over so many crops.
ScoreView = tuple[str, int]
CROPS, RAW, SCALE, MAXIMUM = "crops", "raw", "scale", "maximum"
ALL_CROPS: ScoreView = (CROPS, multi_crop.NUM_CROPS)


@dataclass(frozen=True)
class ImageErrors:
    """What the N images with scores and a label come to; K members, K + 1 models: the members and their ensemble."""

    num_members: int
    ids: NDArray[np.int64]  # N
    labels: NDArray[np.int64]  # N
    error_flags: Mapping[
        ScoreView, Mapping[Subset, ErrorFlags]
    ]  # N x 2, of the subsets that are looked at image by image
    error_counts: Mapping[
        int, Mapping[Subset, NDArray[np.int64]]
    ]  # by crops, all subsets: images wrong, top-1 and top-5
    predicted: NDArray[np.int64]  # K + 1 x N, over 144 crops; the label just where top-1 is right
    confidence: NDArray[np.float32]  # K + 1 x N, mean probability of `predicted`
    competing_classes: Sequence[CompetingClasses]  # over 144 crops, shard by shard
    bad_images: int
    unlabelled: int

    @property
    def all_members(self) -> Subset:
        """All members."""
        return tuple(range(self.num_members))

    def average_single_errors(self, view: ScoreView, members: Subset | None = None) -> NDArray[np.float64]:
        """N x 2: the mean over single models (all, or these) of the errors of each image."""
        chosen = self.all_members if members is None else members
        mean: NDArray[np.float64] = np.mean(
            [self.error_flags[view][(member,)] for member in chosen], axis=0, dtype=np.float64
        )
        return mean

    def get_ensemble_errors(self, view: ScoreView, members: Subset | None = None) -> NDArray[np.float64]:
        """N x 2: the errors of each image by the ensemble of all members, or of these."""
        return self.error_flags[view][self.all_members if members is None else members].astype(np.float64)


def collect_errors(joined: Iterable[ShardScores], members: int, raw: Subset) -> ImageErrors:
    """The outcomes of shards whose parts are those of `members` models, then of the raw weights of the `raw` of them.

    The views of raw weights know those as members 0, 1, ...
    """
    everyone = set(list_subsets(members))
    kept = {subset for subset in everyone if len(subset) in (1, members - 1, members)} | {raw} - {()}
    shards = [_collect_shard_errors(shard, members, everyone, kept) for shard in joined]
    first = shards[0]
    return ImageErrors(
        num_members=members,
        ids=np.concatenate([shard.ids for shard in shards]),
        labels=np.concatenate([shard.labels for shard in shards]),
        error_flags={
            view: {key: np.concatenate([shard.error_flags[view][key] for shard in shards]) for key in found}
            for view, found in first.error_flags.items()
        },
        error_counts={
            count: {key: np.sum([shard.error_counts[count][key] for shard in shards], axis=0) for key in found}
            for count, found in first.error_counts.items()
        },
        predicted=np.concatenate([shard.predicted for shard in shards], axis=1),
        confidence=np.concatenate([shard.confidence for shard in shards], axis=1),
        competing_classes=[found for shard in shards for found in shard.competing_classes],
        bad_images=sum(shard.bad_images for shard in shards),
        unlabelled=sum(shard.unlabelled for shard in shards),
    )


def _collect_shard_errors(shard: ShardScores, members: int, everyone: set[Subset], kept: set[Subset]) -> ImageErrors:
    """The outcomes of one shard, with the counts of `everyone` and the errors of images of those `kept`."""
    own, raw = shard.scores[:members], shard.scores[members:]
    wrong: dict[ScoreView, dict[Subset, ErrorFlags]] = {}
    counts: dict[int, dict[Subset, NDArray[np.int64]]] = {}
    for view, scores in _iter_score_views(own, raw):
        found = CompetingClasses(scores, shard.labels)
        if view[0] != CROPS:
            wrong[view] = dict(found.iter_errors(_list_singles_and_ensemble(len(scores))))
            continue
        wrong[view], counts[view[1]] = {}, {}
        for subset, errors in found.iter_errors(everyone | kept):
            if subset in everyone:
                counts[view[1]][subset] = errors.sum(axis=0)
            if subset in kept:
                wrong[view][subset] = errors
        if view == ALL_CROPS:
            last = found
    predicted, confidence = _predict_classes(own, shard.labels, wrong[ALL_CROPS])
    return ImageErrors(
        members,
        shard.ids,
        shard.labels,
        wrong,
        counts,
        predicted,
        confidence,
        [last],
        shard.bad_images,
        shard.unlabelled,
    )


def _list_singles_and_ensemble(members: int) -> set[Subset]:
    return {*((member,) for member in range(members)), tuple(range(members))}


def _iter_score_views(own: Sequence[Scores], raw: Sequence[Scores]) -> Iterator[tuple[ScoreView, list[Float32Array]]]:
    """Every view of a shard with the N x C scores of each model."""
    for count in multi_crop.CROP_SUBSETS:
        yield (CROPS, count), [part.means[count] for part in own]
        if raw:
            yield (RAW, count), [part.means[count] for part in raw]
    for number, scale in enumerate(multi_crop.PAPER_SCALES):
        yield (SCALE, scale), [part.per_scale[:, number] for part in own]
    yield (MAXIMUM, multi_crop.NUM_CROPS), [part.maximum for part in own]


def _predict_classes(
    own: Sequence[Scores], labels: NDArray[np.int64], wrong: Mapping[Subset, ErrorFlags]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The class that each member, and then their ensemble, names for each image, and its mean probability."""
    means = [part.means[multi_crop.NUM_CROPS] for part in own]
    total = means[0].copy()
    for mean in means[1:]:
        total += mean
    found = [_predict_top_class(mean, labels, wrong[(member,)][:, 0]) for member, mean in enumerate(means)]
    ensemble, confidence = _predict_top_class(total, labels, wrong[tuple(range(len(own)))][:, 0])
    found.append((ensemble, confidence / np.float32(len(own))))
    return np.stack([classes for classes, _ in found]), np.stack([confidence for _, confidence in found])


def _predict_top_class(
    scores: Float32Array, labels: NDArray[np.int64], wrong: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The class of the highest of N x C scores, and that score.

    A tie counts against the true class, so the one beside it is named then.
    """
    predicted = scores.argmax(axis=1)
    tied = np.flatnonzero(wrong & (predicted == labels))
    if len(tied):
        others = scores[tied]
        others[np.arange(len(tied)), labels[tied]] = -1
        predicted[tied] = others.argmax(axis=1)
    confidence = scores[np.arange(len(labels)), predicted]
    # What is no number says nothing of how sure a model is.
    return predicted, np.where(np.isfinite(confidence), confidence, np.float32(0))


# Up to this many members all subsets are looked at, 1,023 of them; of more members at most so many of each size.
MAX_EXHAUSTIVE_MEMBERS = 10
MAX_SUBSETS_PER_SIZE = 128
ROUNDING_MARGIN = np.float32(2**-16)  # relative; more than what rounds off a float32 sum of a hundred scores

Float32Array = NDArray[np.float32]
ErrorFlags = NDArray[np.bool_]  # images x 2: whether the true class misses the first place, and the first five
Subset = tuple[int, ...]  # numbers of members, ascending


class CompetingClasses:
    """The classes of some images that come before the true one, or level with it, in at least one member.

    No other class can do so in a mean of members: where each member's score is below that of the true class, so are
    their sums. A float32 sum of K scores is off by less than K parts in 2^24, so that rounding cannot change that where
    they differ by more than MARGIN. Scores of float16 (evaluation.half) do so whenever they differ.
    """

    def __init__(self, members: Sequence[Float32Array], labels: NDArray[np.int64]) -> None:
        """`members` is K times N x C, decoded from float16; `labels` is N, each a class."""
        rows = np.arange(len(labels))
        self._true = np.stack([scores[rows, labels] for scores in members])
        shape = members[0].shape
        below, all_below = np.empty(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
        for scores, true in zip(members, self._true, strict=True):
            # Not ">=": a score that is no number must count as wrong, not as right.
            all_below &= np.less(scores, true[:, None] * (1 - ROUNDING_MARGIN), out=below)
        all_below[rows, labels] = True
        images, classes = np.divmod(np.flatnonzero(~all_below), shape[1])
        self._scores = np.stack([scores[images, classes] for scores in members])
        # Rivals are in the order of their images, so those of an image are the ones between two of these.
        self._bounds = np.searchsorted(images, np.arange(len(labels) + 1))

    def iter_errors(self, subsets: Iterable[Subset]) -> Iterator[tuple[Subset, ErrorFlags]]:
        """Each subset of the members with the errors (N x 2) of its ensemble; subsets come in sorted order.

        Scores are summed in float32 in the order of the members, and a tie counts against the true class.
        """
        of_image = np.diff(self._bounds)
        # A subset follows those it shares its first members with, and so their sum.
        summed: list[tuple[int, Float32Array, Float32Array]] = []
        for subset in sorted(subsets):
            shared = 0
            while shared < min(len(summed), len(subset)) and summed[shared][0] == subset[shared]:
                shared += 1
            del summed[shared:]
            for member in subset[shared:]:
                scores, true = self._scores[member], self._true[member]
                if summed:
                    scores, true = summed[-1][1] + scores, summed[-1][2] + true
                summed.append((member, scores, true))
            _, scores, true = summed[-1]
            not_below = np.flatnonzero(~(scores < np.repeat(true, of_image)))
            others = np.diff(np.searchsorted(not_below, self._bounds))
            yield subset, np.stack((others >= 1, others >= 5), axis=1)


def list_subsets(members: int) -> list[Subset]:
    """All subsets of so many members but the empty one; of more than MOST_MEMBERS at most so many of each size.

    Which ones is a keyed draw, the same each time. Single members, the whole, and the whole less one are always there.
    """
    found: list[Subset] = []
    for size in range(1, members + 1):
        possible = math.comb(members, size)
        if members <= MAX_EXHAUSTIVE_MEMBERS or possible <= max(MAX_SUBSETS_PER_SIZE, members):
            found += combinations(range(members), size)
            continue
        drawn: dict[Subset, None] = {}
        first = 0
        while len(drawn) < MAX_SUBSETS_PER_SIZE:
            draws = np.arange(first, first + MAX_SUBSETS_PER_SIZE)
            orders = rng.uniform(rng.derive_key(0, "subset", size), draws, members).argsort(axis=1)
            drawn |= dict.fromkeys(tuple(row) for row in np.sort(orders[:, :size], axis=1).tolist())
            first += MAX_SUBSETS_PER_SIZE
        found += sorted(list(drawn)[:MAX_SUBSETS_PER_SIZE])
    return found
