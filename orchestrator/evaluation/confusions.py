"""What the ensemble gets wrong: by class, by pair of classes, by image."""

from __future__ import annotations

import numpy as np

from orchestrator.evaluation.findings import ClassErrors, Confusion, Mistake
from orchestrator.evaluation.outcomes import ALL_CROPS, Outcomes

MOST_CONFUSIONS = 20
MOST_MISTAKES = 24


def confusions(outcomes: Outcomes) -> list[Confusion]:
    """All pairs of classes that are confused, the most frequent first, then by label."""
    classes = 1 + int(max(outcomes.labels.max(), outcomes.predicted[-1].max()))
    wrong = outcomes.predicted[-1] != outcomes.labels
    codes, counts = np.unique(outcomes.labels[wrong] * classes + outcomes.predicted[-1][wrong], return_counts=True)
    order = np.lexsort((codes, -counts))
    return [
        Confusion(code // classes, code % classes, count)
        for code, count in zip(codes[order].tolist(), counts[order].tolist(), strict=True)
    ]


def classes(outcomes: Outcomes, confused: list[Confusion]) -> tuple[ClassErrors, ...]:
    """Errors of each class that has images; `confused` are all confusions, the most frequent first."""
    wrong = outcomes.wrong[ALL_CROPS][outcomes.whole]
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
        found.append(ClassErrors(label, number, *errors, confused_with, times))
    return tuple(found)


def mistakes(outcomes: Outcomes) -> tuple[Mistake, ...]:
    """The images that are wrong with the highest confidence, the most confident first, then by number."""
    predicted, confidence = outcomes.predicted[-1], outcomes.confidence[-1]
    wrong = np.flatnonzero(predicted != outcomes.labels)
    worst = wrong[np.lexsort((outcomes.ids[wrong], -confidence[wrong]))][:MOST_MISTAKES]
    return tuple(
        Mistake(int(outcomes.ids[image]), int(outcomes.labels[image]), int(predicted[image]), float(confidence[image]))
        for image in worst
    )
