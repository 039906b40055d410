"""Analysis of an ensemble from stored scores alone; no model runs."""

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
from orchestrator.evaluation.table3 import CellKey, ErrorArray

NUM_READERS = 2  # threads that read, verify and decode scores while others are joined
NUM_CALIBRATION_BINS = 15
MAX_CONFUSIONS = 20
MAX_MISCLASSIFICATIONS = 24

ImageMask = NDArray[np.bool_]  # N: selected images
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class MemberScores:
    """A member and the folders of its scores."""

    name: str
    scores: str  # folder of the scores of its averaged weights
    raw: str | None = None  # folder of the scores of its raw weights, where they were scored


def analyze_ensemble(members: Sequence[MemberScores], manifest: Manifest, split: str) -> Analysis:
    """Analyze the ensemble of `members`, in the order given (the order of sums).

    One pass over the scores, shard by shard, so memory is that of two shards of all members and of a few numbers an
    image. Raises DataError (no members, a member twice, scores of other images, labels or classes, no labelled image),
    FileNotFoundError (a shard is not scored) and CommitError (a damaged shard).
    """
    names = [member.name for member in members]
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"member {duplicates[0]!r} is given twice; give each member once")
    raw = tuple(number for number, member in enumerate(members) if member.raw is not None)
    folders = [member.scores for member in members] + [member.raw for member in members if member.raw is not None]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        shards = score_reader.iter_shards(folders, manifest, split, pool)
        images = image_errors.collect_errors(shards, len(members), raw)
    cells = {
        (models, count): images.get_errors((CROPS, count), models) for models, count in table3.list_cells(len(members))
    }
    means = bootstrap.resample_means(np.hstack(list(cells.values())))
    confusions = count_confusions(images.labels, images.predicted[-1])
    ensemble_flags = images.error_flags[ALL_CROPS][images.all_members]
    return Analysis(
        split=split,
        member_names=tuple(names),
        class_names=manifest.titles or manifest.classes,
        table=table3.build_table(
            cells, means, images.bad_images, images.unlabelled, table3.is_ilsvrc(manifest.classes)
        ),
        members=_compute_member_errors(images, names),
        subsets=_compute_subset_errors(images),
        pairs=_compute_pairwise_diversity(images, names),
        gains=_compute_member_gains(images, names),
        classes=compute_class_errors(images.labels, ensemble_flags, confusions),
        confusions=tuple(confusions[:MAX_CONFUSIONS]),
        calibration=_compute_calibration(images),
        paired=_compare_cells(cells, means),
        scales=_compute_scale_errors(images),
        maximum=_compare_maximum(images),
        averaging=_compare_weight_averaging(images, raw),
        averaged_members=tuple(names[number] for number in raw),
        selection=_select_members_greedily(images, names),
        mistakes=_find_misclassifications(images),
    )


# ------------------------------------------------------------------ classes
def count_confusions(labels: IntArray, predicted: IntArray) -> list[Confusion]:
    """Count the pairs of classes that are confused, of N images; the most frequent first, then by label."""
    num_classes = 1 + int(max(labels.max(), predicted.max()))
    wrong = predicted != labels
    codes, counts = np.unique(labels[wrong] * num_classes + predicted[wrong], return_counts=True)
    order = np.lexsort((codes, -counts))
    return [
        Confusion(code // num_classes, code % num_classes, count)
        for code, count in zip(codes[order].tolist(), counts[order].tolist(), strict=True)
    ]


def compute_class_errors(
    labels: IntArray, flags: ErrorFlags, confusions: Sequence[Confusion]
) -> tuple[ClassErrorRates, ...]:
    """Return the errors of each class that has images, of one model or an ensemble.

    labels: N. flags: N x 2, top-1 and top-5 errors. confusions: all of them, the most frequent first.
    """
    images = np.bincount(labels)
    top1, top5 = (np.bincount(labels, weights=flags[:, rank]) for rank in range(2))
    most_frequent: dict[int, Confusion] = {}
    for pair in confusions:
        most_frequent.setdefault(pair.true, pair)
    rates = []
    for label in np.flatnonzero(images).tolist():
        number, pair = int(images[label]), most_frequent.get(label, Confusion(label, -1, 0))
        errors = 100 * float(top1[label]) / number, 100 * float(top5[label]) / number
        rates.append(ClassErrorRates(label, number, *errors, pair.predicted if pair.images else None, pair.images))
    return tuple(rates)


def _find_misclassifications(images: ImageErrors) -> tuple[Misclassification, ...]:
    """Return the images that are wrong with the highest confidence, the most confident first, then by number."""
    predicted, confidence = images.predicted[-1], images.confidence[-1]
    wrong = np.flatnonzero(predicted != images.labels)
    worst = wrong[np.lexsort((images.ids[wrong], -confidence[wrong]))][:MAX_MISCLASSIFICATIONS]
    columns = (images.ids, images.labels, predicted, confidence)
    return tuple(Misclassification(*row) for row in zip(*(column[worst].tolist() for column in columns), strict=True))


# ------------------------------------------------------------------ calibration
def _compute_calibration(images: ImageErrors) -> tuple[Calibration, ...]:
    """Return those of the single models and of the ensemble; a single member is both."""
    right = images.predicted == images.labels
    singles = [_bin_confidence(images.confidence[member], right[member]) for member in images.all_members]
    calibrations = [_pool_bins(1, np.stack(singles))]
    if images.num_members > 1:
        calibrations.append(_pool_bins(images.num_members, _bin_confidence(images.confidence[-1], right[-1])[None]))
    return tuple(calibrations)


def _bin_confidence(confidence: NDArray[np.float32], right: ImageMask) -> NDArray[np.float64]:
    """Return 3 x BINS: number of images, sum of their confidence, number of those right."""
    # A bin holds its upper end; stored probabilities may be above 1 by their last bit.
    bins = np.ceil(confidence.astype(np.float64) * NUM_CALIBRATION_BINS).astype(np.int64) - 1
    bins = np.clip(bins, 0, NUM_CALIBRATION_BINS - 1)
    weights = (np.ones(len(bins)), confidence, right)
    return np.stack([np.bincount(bins, weights=weight, minlength=NUM_CALIBRATION_BINS) for weight in weights])


def _pool_bins(models: int, binned: NDArray[np.float64]) -> Calibration:
    """Return the mean of the errors of some models and their pooled bins, from 3 x BINS sums of each."""
    images, confidence, right = np.moveaxis(binned, 1, 0)
    ece = float((np.abs(confidence - right).sum(axis=1) / images.sum(axis=1)).mean())
    edges = [number / NUM_CALIBRATION_BINS for number in range(NUM_CALIBRATION_BINS + 1)]
    bins = []
    for low, high, (number, sure, hits) in zip(edges, edges[1:], binned.sum(axis=0).T.tolist(), strict=False):
        mean, accuracy = (sure / number, hits / number) if number else (None, None)
        bins.append(CalibrationBin(low, high, int(number), mean, accuracy))
    return Calibration(models, ece, tuple(bins))


# ------------------------------------------------------------------ comparisons
def _compare_errors(errors: ErrorArray, others: ErrorArray, models: int) -> tuple[ErrorDifference, ErrorDifference]:
    """Return errors less others, top-1 and top-5; each is 0 or 1 or a mean of such over so many models."""
    return _compare_resampled(errors, others, bootstrap.resample_means(np.hstack((errors, others))), models)


def _compare_resampled(
    errors: ErrorArray, others: ErrorArray, means: NDArray[np.float64], models: int
) -> tuple[ErrorDifference, ErrorDifference]:
    """Do the same with given means of the bootstrap, of two columns of `errors` and two of `others`."""
    top1, top5 = (
        ErrorDifference(
            100 * float((errors[:, rank] - others[:, rank]).mean()),
            bootstrap.compute_interval(100 * (means[:, rank] - means[:, rank + 2])),
            bootstrap.compute_sign_flip_p(errors[:, rank] - others[:, rank], models),
        )
        for rank in range(2)
    )
    return top1, top5


def _compare_cells(cells: Mapping[CellKey, ErrorArray], means: NDArray[np.float64]) -> tuple[CellComparison, ...]:
    """Compare every two cells of the table, later less earlier; `means` are the bootstrap's, two columns a cell."""
    models = max(size for size, _ in cells)
    columns = {cell: means[:, 2 * number : 2 * number + 2] for number, cell in enumerate(cells)}
    return tuple(
        CellComparison(
            cell,
            other,
            *_compare_resampled(cells[cell], cells[other], np.hstack((columns[cell], columns[other])), models),
        )
        for other, cell in combinations(cells, 2)
    )


def _compute_scale_errors(images: ImageErrors) -> tuple[ScaleErrorRates, ...]:
    """Return the errors by the crops of each scale alone."""
    return tuple(
        ScaleErrorRates(scale, models, *_compute_percent(images.get_errors((SCALE, scale), models)))
        for models in _list_model_counts(images.num_members)
        for scale in multi_crop.PAPER_SCALES
    )


def _compare_maximum(images: ImageErrors) -> tuple[MaximumComparison, ...]:
    """Compare the maximum over crops with the mean."""
    rows = []
    for models in _list_model_counts(images.num_members):
        highest = images.get_errors((MAXIMUM, multi_crop.NUM_CROPS), models)
        differences = _compare_errors(highest, images.get_errors(ALL_CROPS, models), images.num_members)
        rows.append(MaximumComparison(models, *_compute_percent(highest), *differences))
    return tuple(rows)


def _compare_weight_averaging(images: ImageErrors, members: Subset) -> tuple[WeightAveragingComparison, ...]:
    """Compare raw weights with averaged ones, over the members whose raw weights were scored."""
    rows = []
    for models in _list_model_counts(len(members)) if members else ():
        for count in multi_crop.CROP_SUBSETS:
            raw = images.get_errors((RAW, count), models, tuple(range(len(members))))
            averaged = images.get_errors((CROPS, count), models, members)
            differences = _compare_errors(raw, averaged, len(members))
            percents = (*_compute_percent(raw), *_compute_percent(averaged))
            rows.append(WeightAveragingComparison(models, count, *percents, *differences))
    return tuple(rows)


def _compute_percent(errors: ErrorArray) -> tuple[float, float]:
    """Return top-1 and top-5 error in percent."""
    top1, top5 = (100 * errors.mean(axis=0)).tolist()
    return top1, top5


def _list_model_counts(members: int) -> list[int]:
    """List a single model and the ensemble; a single member is both."""
    return sorted({1, members})


# ------------------------------------------------------------------ members
def _compute_member_errors(images: ImageErrors, names: Sequence[str]) -> tuple[MemberErrorRates, ...]:
    """Return the errors of each member alone at each number of crops."""
    return tuple(
        MemberErrorRates(name, count, *_compute_percent(images.get_errors((CROPS, count), 1, (member,))))
        for member, name in enumerate(names)
        for count in multi_crop.CROP_SUBSETS
    )


def _compute_subset_errors(images: ImageErrors) -> tuple[SubsetErrorRates, ...]:
    """Return the errors over the ensembles of each size at each number of crops."""
    rates = []
    for count, counts in images.error_counts.items():
        for size in range(1, images.num_members + 1):
            wrong = np.array([number for subset, number in counts.items() if len(subset) == size])
            percents = 100 * wrong / len(images.labels)
            spreads = [ErrorSpread(*map(float, (rank.min(), rank.mean(), rank.max()))) for rank in percents.T]
            rates.append(SubsetErrorRates(size, count, len(wrong), math.comb(images.num_members, size), *spreads))
    return tuple(rates)


def _compute_pairwise_diversity(images: ImageErrors, names: Sequence[str]) -> PairwiseDiversity:
    """Return the pairwise disagreement of top-1 classes and the correlation of top-1 errors."""
    predicted = images.predicted[: images.num_members]
    flags = [images.error_flags[ALL_CROPS][(member,)][:, 0] for member in images.all_members]
    wrong = np.stack(flags).astype(np.float64)
    centered = wrong - wrong.mean(axis=1, keepdims=True)
    products = centered @ centered.T
    disagreement, correlation = [], []
    for member in images.all_members:
        disagreement.append(tuple(100 * float((predicted[member] != other).mean()) for other in predicted))
        spreads = [math.sqrt(products[member, member] * products[other, other]) for other in images.all_members]
        correlation.append(
            tuple(
                float(np.clip(products[member, other] / spread, -1, 1)) if spread else None
                for other, spread in enumerate(spreads)
            )
        )
    return PairwiseDiversity(tuple(names), tuple(disagreement), tuple(correlation))


def _compute_member_gains(images: ImageErrors, names: Sequence[str]) -> tuple[MemberGain, ...]:
    """Return the error of the ensemble without each member less that with it; none for a single member."""
    if images.num_members == 1:
        return ()
    flags = {subset: flags.astype(np.float64) for subset, flags in images.error_flags[ALL_CROPS].items()}
    everyone = images.all_members
    without = [tuple(other for other in everyone if other != member) for member in everyone]
    return tuple(
        MemberGain(name, *_compare_errors(flags[others], flags[everyone], 1))
        for name, others in zip(names, without, strict=True)
    )


def _select_members_greedily(images: ImageErrors, names: Sequence[str]) -> tuple[SelectionStep, ...]:
    """Return ensembles of 1 .. K members picked on one half of the images and scored on the other, both ways.

    None for a single member or a single image. The halves are a keyed draw, the same each time.
    """
    num_images = len(images.labels)
    if images.num_members == 1 or num_images == 1:
        return ()
    first = rng.permutation(rng.derive_key(0, "halves"), num_images) < num_images // 2
    known: dict[Subset, ErrorFlags] = {}
    halves = [(_rank_members_greedily(images, half, known), ~half) for half in (first, ~first)]
    steps = []
    for size in range(1, images.num_members + 1):
        wrong = sum(known[_sort_members(picks[:size])][rest].sum(axis=0) for picks, rest in halves)
        top1, top5 = (100 * np.asarray(wrong) / num_images).tolist()
        added = [names[picks[size - 1]] for picks, _ in halves]
        steps.append(SelectionStep(size, (added[0], added[1]), top1, top5))
    return tuple(steps)


def _rank_members_greedily(images: ImageErrors, half: ImageMask, known: dict[Subset, ErrorFlags]) -> list[int]:
    """Rank members: each, with those before it, has the least top-5 (then top-1) error on these images.

    The errors of images by the subsets that are looked at are added to `known`.
    """
    picks: list[int] = []
    while len(picks) < images.num_members:
        wider = {_sort_members([*picks, member]): member for member in images.all_members if member not in picks}
        missing = [subset for subset in wider if subset not in known]
        shards = [dict(shard.iter_errors(missing)) for shard in images.competing_classes]
        known |= {subset: np.concatenate([errors[subset] for errors in shards]) for subset in missing}
        best = min(wider, key=lambda subset: (*known[subset][half].sum(axis=0)[::-1].tolist(), wider[subset]))
        picks.append(wider[best])
    return picks


def _sort_members(members: Sequence[int]) -> Subset:
    return tuple(sorted(members))
