"""Results of `evaluation.analysis.analyze_ensemble` as plain values.

Errors are in percent, differences of errors in points (percent less percent). Unless stated otherwise, numbers are of
the mean over 144 crops, and `models` is 1 (the mean over the single models) or the number of members (their ensemble).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.evaluation.table3 import Table3


@dataclass(frozen=True)
class ErrorSpread:
    """Least, mean and most error of some subsets, in percent."""

    least: float
    mean: float
    most: float


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

    `looked_at` of the `possible` subsets: all of them unless there are too many, then a keyed sample.
    """

    size: int
    crops: int
    looked_at: int
    possible: int
    top1: ErrorSpread
    top5: ErrorSpread


@dataclass(frozen=True)
class PairwiseDiversity:
    """Similarity of the members, K x K in the order of `members`; symmetric."""

    members: tuple[str, ...]
    disagreement: tuple[tuple[float, ...], ...]  # percent of the images with different top-1 classes
    # Pearson's correlation of the top-1 errors of images; None where a member is right, or wrong, on all of them.
    correlation: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class MemberGain:
    """Contribution of a member: error of the ensemble without it less that with it; positive when it helps."""

    member: str
    top1: ErrorDifference
    top5: ErrorDifference


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
class CalibrationBin:
    """Images with a confidence (the highest mean probability) above `low` and at most `high`."""

    low: float
    high: float
    images: int  # of all single models together for `models` 1
    confidence: float | None  # mean, 0 .. 1; None without images
    accuracy: float | None  # share of right ones, 0 .. 1; None without images


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error, 0 .. 1, over 15 bins of equal width.

    For the single models `ece` is the mean of theirs, while their bins are pooled.
    """

    models: int
    ece: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True)
class CellComparison:
    """Error of one cell of the table less that of another; cells are (models, crops)."""

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
    """Errors with the maximum over the 144 crops (then the mean over models), worse in the paper's section 7.

    `top1` and `top5` are the differences to the mean over crops: positive when the maximum is worse.
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
    """Ensemble of `size` members, picked one by one for least top-5 error, with its error on images not used to pick.

    Members are picked on one half of the split and scored on the other, both ways. `added` are the members that the
    first and the second half pick at this step.
    """

    size: int
    added: tuple[str, str]
    top1_error: float
    top5_error: float


@dataclass(frozen=True)
class Misclassification:
    """Image that the ensemble gets wrong; `image` is its number in the split."""

    image: int
    true: int
    predicted: int
    confidence: float  # mean probability of the predicted class, 0 .. 1


@dataclass(frozen=True)
class Analysis:
    """All results. `gains` and `selection` of a single member are empty."""

    split: str
    member_names: tuple[str, ...]
    class_names: tuple[str, ...]  # readable, in label order
    table: Table3  # with the number of images, bad images and images without a label
    members: tuple[MemberErrorRates, ...]  # by member, then by crops
    subsets: tuple[SubsetErrorRates, ...]  # by crops, then by size
    pairs: PairwiseDiversity
    gains: tuple[MemberGain, ...]
    classes: tuple[ClassErrorRates, ...]  # in label order, without those that have no images
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
        """Return all results as plain values for JSON, without NaN."""
        return asdict(self)
