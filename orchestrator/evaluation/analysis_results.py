"""What can be said of an ensemble from its stored scores, as values: `evaluation.analysis.analyse` makes them.

Errors are in percent and differences of errors in points (percent less percent). "Single" figures are means over the
single models. Where nothing else is said, figures are of the mean over 144 crops, and `models` is 1 (the mean over the
single models) or the number of members (their ensemble).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.evaluation.table3 import Table3


@dataclass(frozen=True)
class ErrorSpread:
    """The least, mean and most error of some subsets, in percent."""

    least: float
    mean: float
    most: float


@dataclass(frozen=True)
class ErrorDifference:
    """A difference of two errors of the same images, in points, and whether chance explains it.

    `interval` is the 95% bootstrap interval of the paired difference. `p` is two-sided, of the exact sign-flip test
    over images: McNemar's exact test where both errors of an image are 0 or 1, and its extension to fractions where
    one is a mean over single models. Values below 1e-12 are given as 1e-12.
    """

    points: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class MemberErrorRates:
    """Errors of one member at a number of crops (1, 10 or 144)."""

    member: str
    crops: int
    top1_error: float
    top5_error: float


@dataclass(frozen=True)
class SubsetErrorRates:
    """Errors of the ensembles of `size` members at a number of crops, over subsets of the members.

    `looked_at` subsets of the `possible` ones: all of them unless there are too many, then a keyed sample.
    """

    size: int
    crops: int
    looked_at: int
    possible: int
    top1: ErrorSpread
    top5: ErrorSpread


@dataclass(frozen=True)
class PairwiseDiversity:
    """How alike the members are, K x K in the order of `members`; symmetric."""

    members: tuple[str, ...]
    disagreement: tuple[tuple[float, ...], ...]  # percent of the images for which the two name different classes
    # Pearson's correlation of the top-1 errors of images; None where a member is right, or wrong, on all of them.
    correlation: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class MemberGain:
    """What a member adds: the error of the ensemble without it less that with it; positive when it helps."""

    member: str
    top1: ErrorDifference
    top5: ErrorDifference


@dataclass(frozen=True)
class ClassErrorRates:
    """Errors of the ensemble on the images of one class, and what it takes them for most often when it is wrong."""

    label: int
    images: int
    top1_error: float
    top5_error: float
    confused_with: int | None  # None when none is wrong
    confused_images: int


@dataclass(frozen=True)
class Confusion:
    """How many images of one class the ensemble takes for another."""

    true: int
    predicted: int
    images: int


@dataclass(frozen=True)
class CalibrationBin:
    """Images whose confidence (the highest mean probability) is above `low` and at most `high`."""

    low: float
    high: float
    images: int  # of all single models together, when they are the single ones'
    confidence: float | None  # mean, 0 .. 1; None without images
    accuracy: float | None  # share that is right, 0 .. 1; None without images


@dataclass(frozen=True)
class Calibration:
    """How far confidence is from accuracy.

    `ece` is the expected calibration error, 0 .. 1, over 15 bins of equal width; for the single models the mean of
    theirs, while their bins are pooled.
    """

    models: int
    ece: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class CellComparison:
    """The error of one cell of the table less that of another; cells are (models, crops)."""

    cell: tuple[int, int]
    other: tuple[int, int]
    top1: ErrorDifference
    top5: ErrorDifference


@dataclass(frozen=True)
class ScaleErrorRates:
    """Errors by the 36 crops of one scale alone; `scale` is the paper's shorter side for 224 (256, 288, 320 or 352)."""

    scale: int
    models: int
    top1_error: float
    top5_error: float


@dataclass(frozen=True)
class MaximumComparison:
    """Errors with the maximum over the 144 crops (then the mean over models) instead of the mean.

    The paper's section 7 found it worse. `top1` and `top5` are the differences to the mean: positive when it is worse.
    """

    models: int
    top1_error: float
    top5_error: float
    top1: ErrorDifference
    top5: ErrorDifference


@dataclass(frozen=True)
class WeightAveragingComparison:
    """Errors with the raw weights instead of their Polyak average, over the members whose raw weights were scored.

    `models` is 1 or the number of those members. `top1` and `top5` are the differences to the averaged weights:
    positive when averaging helps.
    """

    models: int
    crops: int
    raw_top1_error: float
    raw_top5_error: float
    averaged_top1_error: float
    averaged_top5_error: float
    top1: ErrorDifference
    top5: ErrorDifference


@dataclass(frozen=True)
class SelectionStep:
    """The ensemble of `size` members, picked one by one for least top-5 error: error on images not used to pick.

    The split is cut in two halves; members are picked on one and scored on the other, both ways. `added` are the
    members that the first and the second half's picks add at this step.
    """

    size: int
    added: tuple[str, str]
    top1_error: float
    top5_error: float


@dataclass(frozen=True)
class Misclassification:
    """An image that the ensemble gets wrong; `image` is its number in the split."""

    image: int
    true: int
    predicted: int
    confidence: float  # mean probability of the predicted class, 0 .. 1


@dataclass(frozen=True)
class Analysis:
    """All of it. Tuples are empty where there is nothing to tell (pairs, gains and selection of a single member)."""

    split: str
    member_names: tuple[str, ...]
    class_names: tuple[str, ...]  # readable, in label order
    table: Table3  # also the number of images, bad images and images without a label
    members: tuple[MemberErrorRates, ...]  # by member, then by crops
    subsets: tuple[SubsetErrorRates, ...]  # by crops, then by size
    pairs: PairwiseDiversity
    gains: tuple[MemberGain, ...]
    classes: tuple[ClassErrorRates, ...]  # in label order, those without images left out
    confusions: tuple[Confusion, ...]  # at most 20, the most frequent first
    calibration: tuple[Calibration, ...]  # single models, then the ensemble
    paired: tuple[CellComparison, ...]  # every two cells of the table
    scales: tuple[ScaleErrorRates, ...]  # by models, then by scale
    maximum: tuple[MaximumComparison, ...]  # single models, then the ensemble
    averaging: tuple[WeightAveragingComparison, ...]  # empty without scores of raw weights; by models, then by crops
    averaged_members: tuple[str, ...]  # the members whose raw weights were scored, too
    selection: tuple[SelectionStep, ...]
    mistakes: tuple[Misclassification, ...]  # at most 24, the most confident first

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values that JSON can hold (no NaN among them)."""
        return asdict(self)
