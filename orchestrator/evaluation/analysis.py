"""Everything that can be said of an ensemble from stored scores alone; no model runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import rng
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import multi_crop
from orchestrator.evaluation import bootstrap, image_errors, score_reader, table3
from orchestrator.evaluation.analysis_results import (
    Analysis,
    Calibration,
    CalibrationBin,
    CellComparison,
    ClassErrorRates,
    Confusion,
    ErrorDifference,
    ErrorSpread,
    MaximumComparison,
    MemberErrorRates,
    MemberGain,
    Misclassification,
    PairwiseDiversity,
    ScaleErrorRates,
    SelectionStep,
    SubsetErrorRates,
    WeightAveragingComparison,
)
from orchestrator.evaluation.image_errors import ALL_CROPS, CROPS, MAXIMUM, RAW, SCALE, ErrorFlags, ImageErrors, Subset
from orchestrator.evaluation.table3 import CellKey

__all__ = ["MemberScores", "analyze_ensemble"]


@dataclass(frozen=True)
class MemberScores:
    """A member and where its scores lie."""

    name: str
    scores: str  # folder of the scores of its averaged weights
    raw: str | None = None  # folder of the scores of its raw weights, where they were scored


def analyze_ensemble(members: Sequence[MemberScores], manifest: Manifest, split: str) -> Analysis:
    """The analysis of the ensemble of `members`, in the order given (the order of sums).

    One pass over the scores, shard by shard, so memory is that of two shards of all members and of a few numbers an
    image. Raises DataError (no members, a member twice, scores of other images, labels or classes, no labelled image),
    FileNotFoundError (a shard is not scored) and storage.commit.CommitError (a damaged shard).
    """
    names = [member.name for member in members]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"member {twice[0]!r} is given twice; give each member once")
    raw = tuple(number for number, member in enumerate(members) if member.raw is not None)
    folders = [member.scores for member in members] + [member.raw for member in members if member.raw is not None]
    with ThreadPoolExecutor(table3.NUM_READERS) as pool:
        found = image_errors.collect_errors(score_reader.iter_shards(folders, manifest, split, pool), len(members), raw)
    return _build_analysis(found, names, raw, manifest, split)


def _build_analysis(
    found: ImageErrors, names: Sequence[str], raw: tuple[int, ...], manifest: Manifest, split: str
) -> Analysis:
    wrong = {
        (models, count): found.average_single_errors((CROPS, count))
        if models == 1
        else found.get_ensemble_errors((CROPS, count))
        for models, count in table3.list_cells(found.num_members)
    }
    means = bootstrap.resample_means(np.hstack(list(wrong.values())))
    confused = count_confusions(found)
    return Analysis(
        split=split,
        member_names=tuple(names),
        class_names=manifest.titles or manifest.classes,
        table=table3.build_table(wrong, means, found.bad_images, found.unlabelled, table3.is_ilsvrc(manifest.classes)),
        members=compute_member_errors(found, names),
        subsets=compute_subset_errors(found),
        pairs=compute_pairwise_diversity(found, names),
        gains=compute_member_gains(found, names),
        classes=compute_class_errors(found, confused),
        confusions=tuple(confused[:MAX_CONFUSIONS]),
        calibration=compute_calibration(found),
        paired=compare_cells(wrong, means),
        scales=compute_scale_errors(found),
        maximum=compare_maximum(found),
        averaging=compare_weight_averaging(found, raw),
        averaged_members=tuple(names[number] for number in raw),
        selection=select_members_greedily(found, names),
        mistakes=find_misclassifications(found),
    )


NUM_CALIBRATION_BINS = 15


def compute_calibration(outcomes: ImageErrors) -> tuple[Calibration, ...]:
    """Of the single models and of the ensemble; a single member is both."""
    right = outcomes.predicted == outcomes.labels
    singles = [_bin_confidence(outcomes.confidence[member], right[member]) for member in outcomes.all_members]
    found = [_pool_bins(1, np.stack(singles))]
    if outcomes.num_members > 1:
        found.append(_pool_bins(outcomes.num_members, _bin_confidence(outcomes.confidence[-1], right[-1])[None]))
    return tuple(found)


def _bin_confidence(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """3 x BINS: number of images, sum of their confidence, number of those right."""
    # A bin holds its upper end; what is stored may be above 1 by its last bit.
    places = np.clip(
        np.ceil(confidence.astype(np.float64) * NUM_CALIBRATION_BINS).astype(np.int64) - 1, 0, NUM_CALIBRATION_BINS - 1
    )
    weights = (np.ones(len(places)), confidence, right)
    return np.stack([np.bincount(places, weights=weight, minlength=NUM_CALIBRATION_BINS) for weight in weights])


def _pool_bins(models: int, binned: NDArray[np.float64]) -> Calibration:
    """Of each of some models' 3 x BINS sums: the mean of their errors, and their bins pooled."""
    images, confidence, right = np.moveaxis(binned, 1, 0)
    ece = float((np.abs(confidence - right).sum(axis=1) / images.sum(axis=1)).mean())
    bins = []
    for place, (number, sure, hits) in enumerate(binned.sum(axis=0).T.tolist()):
        mean, accuracy = (sure / number, hits / number) if number else (None, None)
        bins.append(
            CalibrationBin(
                place / NUM_CALIBRATION_BINS, (place + 1) / NUM_CALIBRATION_BINS, int(number), mean, accuracy
            )
        )
    return Calibration(models, ece, tuple(bins))


ErrorArray = NDArray[np.float64]  # N x 2: top-1 and top-5 errors of images, multiples of 1 / models


def compare_errors(errors: ErrorArray, others: ErrorArray, models: int) -> tuple[ErrorDifference, ErrorDifference]:
    """Errors less others, top-1 and top-5; each is 0 or 1 or a mean of such over so many models."""
    means = bootstrap.resample_means(np.hstack((errors, others)))
    top1, top5 = (
        _compute_difference(errors, others, means[:, rank] - means[:, rank + 2], rank, models) for rank in range(2)
    )
    return top1, top5


def compare_cells(wrong: Mapping[CellKey, ErrorArray], means: NDArray[np.float64]) -> tuple[CellComparison, ...]:
    """Every two cells of the table, later less earlier; `means` are the bootstrap's, two columns a cell."""
    models = max(size for size, _ in wrong)
    found = []
    for (first, other), (second, cell) in combinations(enumerate(wrong), 2):
        top1, top5 = (
            _compute_difference(
                wrong[cell], wrong[other], means[:, 2 * second + rank] - means[:, 2 * first + rank], rank, models
            )
            for rank in range(2)
        )
        found.append(CellComparison(cell, other, top1, top5))
    return tuple(found)


def compute_scale_errors(outcomes: ImageErrors) -> tuple[ScaleErrorRates, ...]:
    """Errors by the crops of each scale alone."""
    return tuple(
        ScaleErrorRates(scale, models, *compute_error_percent(wrong))
        for models in list_model_counts(outcomes.num_members)
        for scale in multi_crop.PAPER_SCALES
        for wrong in [_select_errors(outcomes, (SCALE, scale), models, None)]
    )


def compare_maximum(outcomes: ImageErrors) -> tuple[MaximumComparison, ...]:
    """The maximum over crops against the mean."""
    found = []
    for models in list_model_counts(outcomes.num_members):
        highest = _select_errors(outcomes, (MAXIMUM, multi_crop.NUM_CROPS), models, None)
        difference = compare_errors(highest, _select_errors(outcomes, ALL_CROPS, models, None), outcomes.num_members)
        found.append(MaximumComparison(models, *compute_error_percent(highest), *difference))
    return tuple(found)


def compare_weight_averaging(outcomes: ImageErrors, members: Subset) -> tuple[WeightAveragingComparison, ...]:
    """Raw weights against averaged ones, over the members whose raw weights were scored."""
    found = []
    for models in list_model_counts(len(members)) if members else ():
        for count in multi_crop.CROP_SUBSETS:
            raw = _select_errors(outcomes, (RAW, count), models, tuple(range(len(members))))
            averaged = _select_errors(outcomes, (CROPS, count), models, members)
            difference = compare_errors(raw, averaged, len(members))
            found.append(
                WeightAveragingComparison(
                    models, count, *compute_error_percent(raw), *compute_error_percent(averaged), *difference
                )
            )
    return tuple(found)


def compute_error_percent(wrong: ErrorArray) -> tuple[float, float]:
    """Top-1 and top-5 error in percent."""
    top1, top5 = (100 * wrong.mean(axis=0)).tolist()
    return top1, top5


def list_model_counts(members: int) -> list[int]:
    """A single model and the ensemble; a single member is both."""
    return sorted({1, members})


def _select_errors(outcomes: ImageErrors, view: tuple[str, int], models: int, members: Subset | None) -> ErrorArray:
    return outcomes.average_single_errors(view, members) if models == 1 else outcomes.get_ensemble_errors(view, members)


def _compute_difference(
    errors: ErrorArray, others: ErrorArray, resampled: NDArray[np.float64], rank: int, models: int
) -> ErrorDifference:
    differences = errors[:, rank] - others[:, rank]
    return ErrorDifference(
        100 * float(differences.mean()),
        bootstrap.compute_interval(100 * resampled),
        bootstrap.compute_sign_flip_p(differences, models),
    )


MAX_CONFUSIONS = 20
MAX_MISCLASSIFICATIONS = 24


def count_confusions(outcomes: ImageErrors) -> list[Confusion]:
    """All pairs of classes that are confused, the most frequent first, then by label."""
    classes = 1 + int(max(outcomes.labels.max(), outcomes.predicted[-1].max()))
    wrong = outcomes.predicted[-1] != outcomes.labels
    codes, counts = np.unique(outcomes.labels[wrong] * classes + outcomes.predicted[-1][wrong], return_counts=True)
    order = np.lexsort((codes, -counts))
    return [
        Confusion(code // classes, code % classes, count)
        for code, count in zip(codes[order].tolist(), counts[order].tolist(), strict=True)
    ]


def compute_class_errors(outcomes: ImageErrors, confused: list[Confusion]) -> tuple[ClassErrorRates, ...]:
    """Errors of each class that has images; `confused` are all confusions, the most frequent first."""
    wrong = outcomes.error_flags[ALL_CROPS][outcomes.all_members]
    images = np.bincount(outcomes.labels)
    top1, top5 = (np.bincount(outcomes.labels, weights=wrong[:, rank]) for rank in range(2))
    most: dict[int, Confusion] = {}
    for pair in confused:
        most.setdefault(pair.true, pair)
    found = []
    for label in np.flatnonzero(images).tolist():
        number, mistaken = int(images[label]), most.get(label)
        confused_with, times = (mistaken.predicted, mistaken.images) if mistaken else (None, 0)
        errors = 100 * float(top1[label]) / number, 100 * float(top5[label]) / number
        found.append(ClassErrorRates(label, number, *errors, confused_with, times))
    return tuple(found)


def find_misclassifications(outcomes: ImageErrors) -> tuple[Misclassification, ...]:
    """The images that are wrong with the highest confidence, the most confident first, then by number."""
    predicted, confidence = outcomes.predicted[-1], outcomes.confidence[-1]
    wrong = np.flatnonzero(predicted != outcomes.labels)
    worst = wrong[np.lexsort((outcomes.ids[wrong], -confidence[wrong]))][:MAX_MISCLASSIFICATIONS]
    return tuple(
        Misclassification(
            int(outcomes.ids[image]), int(outcomes.labels[image]), int(predicted[image]), float(confidence[image])
        )
        for image in worst
    )


def compute_member_errors(outcomes: ImageErrors, names: Sequence[str]) -> tuple[MemberErrorRates, ...]:
    """Errors of each member alone at each number of crops."""
    return tuple(
        MemberErrorRates(name, count, *compute_error_percent(outcomes.get_ensemble_errors((CROPS, count), (member,))))
        for member, name in enumerate(names)
        for count in multi_crop.CROP_SUBSETS
    )


def compute_subset_errors(outcomes: ImageErrors) -> tuple[SubsetErrorRates, ...]:
    """Errors over the ensembles of each size at each number of crops."""
    found = []
    for count, counted in outcomes.error_counts.items():
        for size in range(1, outcomes.num_members + 1):
            errors = np.array([wrong for subset, wrong in counted.items() if len(subset) == size])
            errors = 100 * errors / len(outcomes.labels)
            top1, top5 = (
                ErrorSpread(float(ranked.min()), float(ranked.mean()), float(ranked.max())) for ranked in errors.T
            )
            found.append(SubsetErrorRates(size, count, len(errors), math.comb(outcomes.num_members, size), top1, top5))
    return tuple(found)


def compute_pairwise_diversity(outcomes: ImageErrors, names: Sequence[str]) -> PairwiseDiversity:
    """Pairwise disagreement of top-1 classes and correlation of top-1 errors."""
    predicted = outcomes.predicted[: outcomes.num_members]
    wrong = np.stack([outcomes.error_flags[ALL_CROPS][(member,)][:, 0] for member in outcomes.all_members]).astype(
        np.float64
    )
    apart = wrong - wrong.mean(axis=1, keepdims=True)
    together = apart @ apart.T
    disagreement, correlation = [], []
    for one in outcomes.all_members:
        disagreement.append(tuple(100 * float((predicted[one] != other).mean()) for other in predicted))
        spreads = [math.sqrt(together[one, one] * together[other, other]) for other in outcomes.all_members]
        correlation.append(
            tuple(
                float(np.clip(together[one, other] / spread, -1, 1)) if spread else None
                for other, spread in enumerate(spreads)
            )
        )
    return PairwiseDiversity(tuple(names), tuple(disagreement), tuple(correlation))


def compute_member_gains(outcomes: ImageErrors, names: Sequence[str]) -> tuple[MemberGain, ...]:
    """The error of the ensemble without each member less that with it; none for a single member."""
    if outcomes.num_members == 1:
        return ()
    found = []
    for member, name in enumerate(names):
        others = tuple(other for other in outcomes.all_members if other != member)
        difference = compare_errors(
            outcomes.get_ensemble_errors(ALL_CROPS, others), outcomes.get_ensemble_errors(ALL_CROPS), 1
        )
        found.append(MemberGain(name, *difference))
    return tuple(found)


ImageMask = NDArray[np.bool_]  # N: which images


def select_members_greedily(outcomes: ImageErrors, names: Sequence[str]) -> tuple[SelectionStep, ...]:
    """Ensembles of 1 .. K members picked on one half of the images and scored on the other, both ways.

    None for a single member or a single image. The halves are a keyed draw, the same each time.
    """
    images = len(outcomes.labels)
    if outcomes.num_members == 1 or images == 1:
        return ()
    first = rng.permutation(rng.derive_key(0, "halves"), images) < images // 2
    known: dict[Subset, ErrorFlags] = {}
    halves = [(_rank_members_greedily(outcomes, half, known), ~half) for half in (first, ~first)]
    steps = []
    for size in range(1, outcomes.num_members + 1):
        wrong = sum(known[_sort_members(picks[:size])][rest].sum(axis=0) for picks, rest in halves)
        top1, top5 = (100 * np.asarray(wrong) / images).tolist()
        one, other = (names[picks[size - 1]] for picks, _ in halves)
        steps.append(SelectionStep(size, (one, other), top1, top5))
    return tuple(steps)


def _rank_members_greedily(outcomes: ImageErrors, half: ImageMask, known: dict[Subset, ErrorFlags]) -> list[int]:
    """All members, each the one that with those before it has the least top-5 (then top-1) error on these images."""
    picks: list[int] = []
    while len(picks) < outcomes.num_members:
        wider = {_sort_members([*picks, member]): member for member in outcomes.all_members if member not in picks}
        _compute_missing_errors(outcomes, [subset for subset in wider if subset not in known], known)
        best = min(wider, key=lambda subset: (*known[subset][half].sum(axis=0)[::-1].tolist(), wider[subset]))
        picks.append(wider[best])
    return picks


def _compute_missing_errors(outcomes: ImageErrors, subsets: Sequence[Subset], known: dict[Subset, ErrorFlags]) -> None:
    """Put the errors of images by these subsets into `known`."""
    found = [dict(shard.iter_errors(subsets)) for shard in outcomes.competing_classes]
    known |= {subset: np.concatenate([errors[subset] for errors in found]) for subset in subsets}


def _sort_members(members: Sequence[int]) -> Subset:
    return tuple(sorted(members))
