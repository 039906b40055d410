"""Analysis of an ensemble from stored scores alone; no model runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms import multi_crop
from orchestrator.evaluation import bootstrap, image_errors, score_store, table3
from orchestrator.evaluation.analysis_results import (
    Analysis,
    Calibration,
    ClassErrorRates,
    Confusion,
    Differences,
    ErrorDifference,
    Errors,
    Misclassification,
    SubsetErrors,
)
from orchestrator.evaluation.image_errors import ALL_CROPS, CROPS, MAXIMUM, SCALE, ErrorFlags, ImageErrors
from orchestrator.evaluation.table3 import CellKey, ErrorArray, Table3
from orchestrator.recipe.config import MetricPlugin

NUM_CALIBRATION_BINS = 15
MAX_CONFUSIONS = 20
MAX_MISCLASSIFICATIONS = 24

IntArray = NDArray[np.int64]


def analyze_ensemble(
    scores: Mapping[str, str], manifest: Manifest, split: str, metrics: Sequence[MetricPlugin] = ()
) -> Analysis:
    """Analyze the ensemble whose members' scores lie in these folders, by name, in this order (the order of sums).

    One pass over the scores, shard by shard, so memory is that of two shards of all members and of a few numbers an
    image. `metrics` are computed for each cell of the table. Raises DataError (scores of other images, labels or
    classes, no labelled image), FileNotFoundError (a shard is not scored), CommitError (a damaged shard) and
    ConfigError (a metric that fails).
    """
    names = tuple(scores)
    images, values = _collect_with_metrics(list(scores.values()), manifest, split, metrics)
    counts = sorted({1, len(names)})
    cells = {
        (models, crops): images.get_errors((CROPS, crops), models) for models, crops in table3.list_cells(len(names))
    }
    means = bootstrap.resample_means(np.hstack(list(cells.values())))
    resampled = dict(zip(cells, np.split(means, len(cells), axis=1), strict=True))
    confusions = count_confusions(images.labels, images.predicted[-1])
    number, of_ilsvrc = len(images.labels), table3.is_ilsvrc(manifest.classes)
    rows = table3.build_cells(cells, means, values)
    return Analysis(
        split=split,
        member_names=names,
        class_names=manifest.titles or manifest.classes,
        table=Table3(rows, number, images.bad_images, images.unlabelled, of_ilsvrc),
        members={
            (name, crops): _compute_percent(images.flags[(CROPS, crops), (member,)])
            for member, name in enumerate(names)
            for crops in multi_crop.CROP_SUBSETS
        },
        subsets=_compute_subset_errors(images),
        disagreement=tuple(
            tuple(100 * float((predicted != other).mean()) for other in images.predicted[:-1])
            for predicted in images.predicted[:-1]
        ),
        correlation=_correlate_errors(images),
        gains=_compute_member_gains(images, names),
        classes=compute_class_errors(images.labels, images.flags[ALL_CROPS, images.all_members], confusions),
        confusions=tuple(confusions[:MAX_CONFUSIONS]),
        calibration=tuple(_compute_calibration(images, models) for models in counts),
        paired={
            (cell, other): _compare_errors(
                cells[cell], cells[other], len(names), np.hstack((resampled[cell], resampled[other]))
            )
            for other, cell in combinations(cells, 2)
        },
        scales={
            (models, scale): _compute_percent(images.get_errors((SCALE, scale), models))
            for models in counts
            for scale in multi_crop.PAPER_SCALES
        },
        maximum={models: _compare_maximum(images, models) for models in counts},
        mistakes=_find_misclassifications(images),
    )


def _collect_with_metrics(
    folders: Sequence[str], manifest: Manifest, split: str, metrics: Sequence[MetricPlugin]
) -> tuple[ImageErrors, Mapping[CellKey, Mapping[str, float]]]:
    shards = score_store.iter_shards(folders, manifest, split)
    if not metrics:
        return image_errors.collect_errors(shards, len(folders)), {}
    from orchestrator.evaluation.score_metrics import TableMetrics  # torch, which the analysis does without

    measured = TableMetrics(metrics, len(manifest.classes), len(folders))
    return image_errors.collect_errors(measured.iter_counted(shards), len(folders)), measured.compute()


def count_confusions(labels: IntArray, predicted: IntArray) -> list[Confusion]:
    """Count the pairs of classes that are confused, of N images; the most frequent first, then by label."""
    num_classes = 1 + int(max(labels.max(), predicted.max()))
    wrong = predicted != labels
    codes, counts = np.unique(labels[wrong] * num_classes + predicted[wrong], return_counts=True)
    order = np.lexsort((codes, -counts))
    columns = (*np.divmod(codes[order], num_classes), counts[order])
    return [Confusion(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def compute_class_errors(
    labels: IntArray, flags: ErrorFlags, confusions: Sequence[Confusion]
) -> tuple[ClassErrorRates, ...]:
    """Return the errors of each class that has images, of one model or an ensemble.

    labels: N. flags: N x 2, top-1 and top-5 errors. confusions: all of them, the most frequent first.
    """
    images = np.bincount(labels)
    top1, top5 = (np.bincount(labels, weights=flags[:, rank]) for rank in range(2))
    most_frequent = {pair.true: pair for pair in reversed(confusions)}
    rates = []
    for label in np.flatnonzero(images).tolist():
        number, pair = int(images[label]), most_frequent.get(label)
        confused = (None, 0) if pair is None else (pair.predicted, pair.images)
        errors = 100 * float(top1[label]) / number, 100 * float(top5[label]) / number
        rates.append(ClassErrorRates(label, number, *errors, *confused))
    return tuple(rates)


def _find_misclassifications(images: ImageErrors) -> tuple[Misclassification, ...]:
    predicted, confidence = images.predicted[-1], images.confidence[-1]
    wrong = np.flatnonzero(predicted != images.labels)
    worst = wrong[np.lexsort((images.ids[wrong], -confidence[wrong]))][:MAX_MISCLASSIFICATIONS]
    columns = (images.ids, images.labels, predicted, confidence)
    return tuple(Misclassification(*row) for row in zip(*(column[worst].tolist() for column in columns), strict=True))


def _compute_calibration(images: ImageErrors, models: int) -> Calibration:
    """Return the calibration of all single models (`models` 1), or of their ensemble."""
    rows = slice(0, images.num_members) if models == 1 else slice(-1, None)
    pairs = zip(images.confidence[rows], images.predicted[rows], strict=True)
    binned = np.stack([_bin_confidence(sure, predicted == images.labels) for sure, predicted in pairs])
    answers, confidence, right = np.moveaxis(binned, 1, 0)
    pooled = binned.sum(axis=0)
    number, mean, accuracy = pooled.sum(axis=1).tolist()
    return Calibration(
        models,
        ece=float((np.abs(confidence - right).sum(axis=1) / answers.sum(axis=1)).mean()),
        confidence=mean / number,
        accuracy=accuracy / number,
        bins=tuple((int(count), sure / max(1, count), hits / max(1, count)) for count, sure, hits in pooled.T.tolist()),
    )


def _bin_confidence(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return 3 x BINS: number of answers, sum of their confidence, number of those right."""
    # A bin holds its upper end; stored probabilities may be above 1 by their last bit.
    bins = np.ceil(confidence.astype(np.float64) * NUM_CALIBRATION_BINS).astype(np.int64) - 1
    bins = np.clip(bins, 0, NUM_CALIBRATION_BINS - 1)
    weights = (np.ones(len(bins)), confidence, right)
    return np.stack([np.bincount(bins, weights=weight, minlength=NUM_CALIBRATION_BINS) for weight in weights])


def _compare_errors(
    errors: ErrorArray, others: ErrorArray, models: int, means: NDArray[np.float64] | None = None
) -> Differences:
    """Return errors less others, top-1 and top-5; each is 0 or 1 or a mean of such over so many models.

    means: of the bootstrap, of the columns of `errors` and of `others`; drawn for them alone by default.
    """
    means = bootstrap.resample_means(np.hstack((errors, others))) if means is None else means
    top1, top5 = (
        ErrorDifference(
            100 * float((errors[:, rank] - others[:, rank]).mean()),
            bootstrap.compute_interval(100 * (means[:, rank] - means[:, rank + 2])),
            bootstrap.compute_sign_flip_p(errors[:, rank] - others[:, rank], models),
        )
        for rank in range(2)
    )
    return top1, top5


def _compare_maximum(images: ImageErrors, models: int) -> tuple[Errors, Differences]:
    highest = images.get_errors((MAXIMUM, multi_crop.NUM_CROPS), models)
    return _compute_percent(highest), _compare_errors(highest, images.get_errors(ALL_CROPS, models), images.num_members)


def _compute_percent(errors: ErrorArray | ErrorFlags) -> Errors:
    top1, top5 = (100 * errors.mean(axis=0)).tolist()
    return top1, top5


def _compute_subset_errors(images: ImageErrors) -> dict[tuple[int, int], SubsetErrors]:
    rates = {}
    for crops, counts in images.error_counts.items():
        for size in sorted({len(subset) for subset in counts}):
            wrong = np.array([number for subset, number in counts.items() if len(subset) == size])
            percents = 100 * wrong / len(images.labels)
            least, mean, most = (tuple(row.tolist()) for row in (percents.min(0), percents.mean(0), percents.max(0)))
            rates[crops, size] = SubsetErrors(len(wrong), least, mean, most)
    return rates


def _correlate_errors(images: ImageErrors) -> tuple[tuple[float | None, ...], ...]:
    wrong = np.stack([images.flags[ALL_CROPS, (member,)][:, 0] for member in images.all_members])
    centered = wrong - wrong.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # of a member without errors, or with nothing else
        centered /= np.linalg.norm(centered, axis=1, keepdims=True)
        matrix = np.clip(centered @ centered.T, -1, 1)
    return tuple(tuple(value if math.isfinite(value) else None for value in row) for row in matrix.tolist())


def _compute_member_gains(images: ImageErrors, names: Sequence[str]) -> dict[str, Differences]:
    if images.num_members == 1:
        return {}
    together = images.flags[ALL_CROPS, images.all_members].astype(np.float64)
    gains = {}
    for member, name in enumerate(names):
        others = tuple(other for other in images.all_members if other != member)
        gains[name] = _compare_errors(images.flags[ALL_CROPS, others].astype(np.float64), together, 1)
    return gains
