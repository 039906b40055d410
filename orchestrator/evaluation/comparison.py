"""Paired comparisons on the same images: of the table's cells, and with what the paper did not choose."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import crops
from orchestrator.evaluation import resampling
from orchestrator.evaluation.findings import AveragingError, Difference, MaximumError, Paired, ScaleError
from orchestrator.evaluation.outcomes import ALL_CROPS, CROPS, MAXIMUM, RAW, SCALE, Outcomes
from orchestrator.evaluation.rivals import Subset
from orchestrator.evaluation.table3 import CellKey

Wrong = NDArray[np.float64]  # N x 2: top-1 and top-5 errors of images, multiples of 1 / models


def compare(errors: Wrong, others: Wrong, models: int) -> tuple[Difference, Difference]:
    """Errors less others, top-1 and top-5; each is 0 or 1 or a mean of such over so many models."""
    means = resampling.bootstrap(np.hstack((errors, others)))
    top1, top5 = (_difference(errors, others, means[:, rank] - means[:, rank + 2], rank, models) for rank in range(2))
    return top1, top5


def between_cells(wrong: Mapping[CellKey, Wrong], means: NDArray[np.float64]) -> tuple[Paired, ...]:
    """Every two cells of the table, later less earlier; `means` are the bootstrap's, two columns a cell."""
    models = max(size for size, _ in wrong)
    found = []
    for (first, other), (second, cell) in combinations(enumerate(wrong), 2):
        top1, top5 = (
            _difference(
                wrong[cell], wrong[other], means[:, 2 * second + rank] - means[:, 2 * first + rank], rank, models
            )
            for rank in range(2)
        )
        found.append(Paired(cell, other, top1, top5))
    return tuple(found)


def scales(outcomes: Outcomes) -> tuple[ScaleError, ...]:
    """Errors by the crops of each scale alone."""
    return tuple(
        ScaleError(scale, models, *percent(wrong))
        for models in sizes(outcomes.members)
        for scale in crops.PAPER_SCALES
        for wrong in [_wrong(outcomes, (SCALE, scale), models, None)]
    )


def maximum(outcomes: Outcomes) -> tuple[MaximumError, ...]:
    """The maximum over crops against the mean."""
    found = []
    for models in sizes(outcomes.members):
        highest = _wrong(outcomes, (MAXIMUM, crops.NUM_CROPS), models, None)
        difference = compare(highest, _wrong(outcomes, ALL_CROPS, models, None), outcomes.members)
        found.append(MaximumError(models, *percent(highest), *difference))
    return tuple(found)


def averaging(outcomes: Outcomes, members: Subset) -> tuple[AveragingError, ...]:
    """Raw weights against averaged ones, over the members whose raw weights were scored."""
    found = []
    for models in sizes(len(members)) if members else ():
        for count in crops.SUBSETS:
            raw = _wrong(outcomes, (RAW, count), models, tuple(range(len(members))))
            averaged = _wrong(outcomes, (CROPS, count), models, members)
            difference = compare(raw, averaged, len(members))
            found.append(AveragingError(models, count, *percent(raw), *percent(averaged), *difference))
    return tuple(found)


def percent(wrong: Wrong) -> tuple[float, float]:
    """Top-1 and top-5 error in percent."""
    top1, top5 = (100 * wrong.mean(axis=0)).tolist()
    return top1, top5


def sizes(members: int) -> list[int]:
    """A single model and the ensemble; a single member is both."""
    return sorted({1, members})


def _wrong(outcomes: Outcomes, view: tuple[str, int], models: int, members: Subset | None) -> Wrong:
    return outcomes.single(view, members) if models == 1 else outcomes.ensemble(view, members)


def _difference(errors: Wrong, others: Wrong, resampled: NDArray[np.float64], rank: int, models: int) -> Difference:
    differences = errors[:, rank] - others[:, rank]
    return Difference(
        100 * float(differences.mean()),
        resampling.interval(100 * resampled),
        resampling.sign_flip(differences, models),
    )
