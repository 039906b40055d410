"""Whether a model is right as often as it says: confidence against accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.evaluation.findings import Bin, Calibration
from orchestrator.evaluation.outcomes import Outcomes

BINS = 15


def calibrations(outcomes: Outcomes) -> tuple[Calibration, ...]:
    """Of the single models and of the ensemble; a single member is both."""
    right = outcomes.predicted == outcomes.labels
    singles = [_binned(outcomes.confidence[member], right[member]) for member in outcomes.whole]
    found = [_calibration(1, np.stack(singles))]
    if outcomes.members > 1:
        found.append(_calibration(outcomes.members, _binned(outcomes.confidence[-1], right[-1])[None]))
    return tuple(found)


def _binned(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """3 x BINS: number of images, sum of their confidence, number of those right."""
    # A bin holds its upper end; what is stored may be above 1 by its last bit.
    places = np.clip(np.ceil(confidence.astype(np.float64) * BINS).astype(np.int64) - 1, 0, BINS - 1)
    weights = (np.ones(len(places)), confidence, right)
    return np.stack([np.bincount(places, weights=weight, minlength=BINS) for weight in weights])


def _calibration(models: int, binned: NDArray[np.float64]) -> Calibration:
    """Of each of some models' 3 x BINS sums: the mean of their errors, and their bins pooled."""
    images, confidence, right = np.moveaxis(binned, 1, 0)
    ece = float((np.abs(confidence - right).sum(axis=1) / images.sum(axis=1)).mean())
    bins = []
    for place, (number, sure, hits) in enumerate(binned.sum(axis=0).T.tolist()):
        mean, accuracy = (sure / number, hits / number) if number else (None, None)
        bins.append(Bin(place / BINS, (place + 1) / BINS, int(number), mean, accuracy))
    return Calibration(models, ece, tuple(bins))
