"""Results of `evaluation.analysis.analyze_ensemble`.

Errors are in percent, differences of errors in points (percent less percent). Unless stated otherwise, numbers are of
the mean over 144 crops, and a number of models is 1 (the mean over the single models) or that of all (their ensemble).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.evaluation.table3 import CellKey, Table3

Errors = tuple[float, float]  # top-1 and top-5 error


@dataclass(frozen=True)
class ErrorDifference:
    """Difference of two errors of the same images, in points, and its significance.

    `interval` is the 95% bootstrap interval of the paired difference. `p` is two-sided, of the exact sign-flip test
    over images: McNemar's exact test where both errors of an image are 0 or 1, and its extension to fractions where one
    is a mean over single models. Values below 1e-12 are given as 1e-12.
    """

    points: float
    interval: tuple[float, float]
    p: float


Differences = tuple[ErrorDifference, ErrorDifference]  # of top-1 and of top-5 errors


@dataclass(frozen=True)
class SubsetErrors:
    """Errors of all ensembles of one size."""

    subsets: int
    least: Errors
    mean: Errors
    most: Errors


@dataclass(frozen=True)
class ClassErrorRates:
    """Errors on the images of one class, and the class that they are most often confused with."""

    label: int
    images: int
    top1_error: float
    top5_error: float
    confused_with: int | None  # None without errors
    confused_images: int


@dataclass(frozen=True)
class Confusion:
    """Number of images of one class that are predicted as another."""

    true: int
    predicted: int
    images: int


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error, 0 .. 1, over bins of confidence (the highest mean probability) of equal width.

    For the single models `ece` is the mean of theirs, and all else is of their answers together.
    """

    models: int
    ece: float
    confidence: float  # mean over all answers
    accuracy: float  # share of right answers
    bins: tuple[tuple[int, float, float], ...]  # answers, their mean confidence, share of right ones; zeros if empty


@dataclass(frozen=True)
class Misclassification:
    """Image that the ensemble gets wrong; `image` is its number in the split."""

    image: int
    true: int
    predicted: int
    confidence: float  # mean probability of the predicted class, 0 .. 1


@dataclass(frozen=True)
class Analysis:
    """All results."""

    split: str
    member_names: tuple[str, ...]
    class_names: tuple[str, ...]  # readable, in label order
    table: Table3  # with the number of images, bad images and images without a label
    members: Mapping[tuple[str, int], Errors]  # of each alone, by member and crops
    subsets: Mapping[tuple[int, int], SubsetErrors]  # by crops and size; of more than 10 members 1, K - 1 and K
    disagreement: tuple[tuple[float, ...], ...]  # of two members: percent of the images with different top-1 classes
    # Pearson's correlation of two members' top-1 errors; None where one is right, or wrong, on all images.
    correlation: tuple[tuple[float | None, ...], ...]
    gains: Mapping[str, Differences]  # the ensemble without a member less that with it; none for a single member
    classes: tuple[ClassErrorRates, ...]  # in label order, without those that have no images
    confusions: tuple[Confusion, ...]  # at most 20, the most frequent first
    calibration: tuple[Calibration, ...]  # single models, then the ensemble
    paired: Mapping[tuple[CellKey, CellKey], Differences]  # every two cells of the table, the first less the second
    scales: Mapping[tuple[int, int], Errors]  # by models and scale (the paper's shorter side), of its 36 crops alone
    maximum: Mapping[int, tuple[Errors, Differences]]  # by models: of the maximum over crops, and less that of the mean
    mistakes: tuple[Misclassification, ...]  # at most 24, the most confident first
