"""One pass over stored scores: what each image comes to, for every view of it, member and ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import crops
from orchestrator.evaluation import rivals
from orchestrator.evaluation.joined import Joined
from orchestrator.evaluation.rivals import Floats, Rivals, Subset, Wrong
from orchestrator.evaluation.score_store import Scores

# What is scored of an image: the mean over so many crops, also with the raw weights; the mean over the crops of one
# scale (by the paper's shorter side); the maximum over so many crops.
View = tuple[str, int]
CROPS, RAW, SCALE, MAXIMUM = "crops", "raw", "scale", "maximum"
ALL_CROPS: View = (CROPS, crops.NUM_CROPS)


@dataclass(frozen=True)
class Outcomes:
    """What the N images with scores and a label come to; K members, K + 1 models: the members and their ensemble."""

    members: int
    ids: NDArray[np.int64]  # N
    labels: NDArray[np.int64]  # N
    wrong: Mapping[View, Mapping[Subset, Wrong]]  # N x 2, of the subsets that are looked at image by image
    counts: Mapping[int, Mapping[Subset, NDArray[np.int64]]]  # by crops, all subsets: images wrong, top-1 and top-5
    predicted: NDArray[np.int64]  # K + 1 x N, over 144 crops; the label just where top-1 is right
    confidence: NDArray[np.float32]  # K + 1 x N, mean probability of `predicted`
    rivals: Sequence[Rivals]  # over 144 crops, shard by shard
    bad: int
    unlabelled: int

    @property
    def whole(self) -> Subset:
        """All members."""
        return tuple(range(self.members))

    def single(self, view: View, members: Subset | None = None) -> NDArray[np.float64]:
        """N x 2: the mean over single models (all, or these) of the errors of each image."""
        chosen = self.whole if members is None else members
        mean: NDArray[np.float64] = np.mean(
            [self.wrong[view][(member,)] for member in chosen], axis=0, dtype=np.float64
        )
        return mean

    def ensemble(self, view: View, members: Subset | None = None) -> NDArray[np.float64]:
        """N x 2: the errors of each image by the ensemble of all members, or of these."""
        return self.wrong[view][self.whole if members is None else members].astype(np.float64)


def gather(joined: Iterable[Joined], members: int, raw: Subset) -> Outcomes:
    """The outcomes of shards whose parts are those of `members` models, then of the raw weights of the `raw` of them.

    The views of raw weights know those as members 0, 1, ...
    """
    everyone = set(rivals.subsets(members))
    kept = {subset for subset in everyone if len(subset) in (1, members - 1, members)} | {raw} - {()}
    shards = [_outcomes(shard, members, everyone, kept) for shard in joined]
    first = shards[0]
    return Outcomes(
        members=members,
        ids=np.concatenate([shard.ids for shard in shards]),
        labels=np.concatenate([shard.labels for shard in shards]),
        wrong={
            view: {key: np.concatenate([shard.wrong[view][key] for shard in shards]) for key in found}
            for view, found in first.wrong.items()
        },
        counts={
            count: {key: np.sum([shard.counts[count][key] for shard in shards], axis=0) for key in found}
            for count, found in first.counts.items()
        },
        predicted=np.concatenate([shard.predicted for shard in shards], axis=1),
        confidence=np.concatenate([shard.confidence for shard in shards], axis=1),
        rivals=[found for shard in shards for found in shard.rivals],
        bad=sum(shard.bad for shard in shards),
        unlabelled=sum(shard.unlabelled for shard in shards),
    )


def _outcomes(shard: Joined, members: int, everyone: set[Subset], kept: set[Subset]) -> Outcomes:
    """The outcomes of one shard, with the counts of `everyone` and the errors of images of those `kept`."""
    own, raw = shard.parts[:members], shard.parts[members:]
    wrong: dict[View, dict[Subset, Wrong]] = {}
    counts: dict[int, dict[Subset, NDArray[np.int64]]] = {}
    for view, scores in _views(own, raw):
        found = Rivals(scores, shard.labels)
        if view[0] != CROPS:
            wrong[view] = dict(found.errors(_alone_and_together(len(scores))))
            continue
        wrong[view], counts[view[1]] = {}, {}
        for subset, errors in found.errors(everyone | kept):
            if subset in everyone:
                counts[view[1]][subset] = errors.sum(axis=0)
            if subset in kept:
                wrong[view][subset] = errors
        if view == ALL_CROPS:
            last = found
    predicted, confidence = _predictions(own, shard.labels, wrong[ALL_CROPS])
    return Outcomes(
        members, shard.ids, shard.labels, wrong, counts, predicted, confidence, [last], shard.bad, shard.unlabelled
    )  # fmt: skip


def _alone_and_together(members: int) -> set[Subset]:
    return {*((member,) for member in range(members)), tuple(range(members))}


def _views(own: Sequence[Scores], raw: Sequence[Scores]) -> Iterator[tuple[View, list[Floats]]]:
    """Every view of a shard with the N x C scores of each model."""
    for count in crops.SUBSETS:
        yield (CROPS, count), [part.means[count] for part in own]
        if raw:
            yield (RAW, count), [part.means[count] for part in raw]
    for number, scale in enumerate(crops.PAPER_SCALES):
        yield (SCALE, scale), [part.per_scale[:, number] for part in own]
    yield (MAXIMUM, crops.NUM_CROPS), [part.maximum for part in own]


def _predictions(
    own: Sequence[Scores], labels: NDArray[np.int64], wrong: Mapping[Subset, Wrong]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The class that each member, and then their ensemble, names for each image, and its mean probability."""
    means = [part.means[crops.NUM_CROPS] for part in own]
    total = means[0].copy()
    for mean in means[1:]:
        total += mean
    found = [_named(mean, labels, wrong[(member,)][:, 0]) for member, mean in enumerate(means)]
    ensemble, confidence = _named(total, labels, wrong[tuple(range(len(own)))][:, 0])
    found.append((ensemble, confidence / np.float32(len(own))))
    return np.stack([classes for classes, _ in found]), np.stack([confidence for _, confidence in found])


def _named(
    scores: Floats, labels: NDArray[np.int64], wrong: NDArray[np.bool_]
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
