"""The report's sections on what goes wrong: confidence, classes, the mistakes made most surely."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.ensemble.report_grid import Card, Grid, Section
from orchestrator.ensemble.report_plots import MOST_CLASSES, worst_classes
from orchestrator.ensemble.report_text import class_name, counted, percent
from orchestrator.evaluation.findings import Analysis, Bin

_KINDS = {b"\xff\xd8": "jpeg", b"\x89P": "png"}


def calibration(analysis: Analysis) -> Section:
    """How far confidence is from accuracy."""
    rows = tuple(
        (counted(one.models, "model"), f"{one.ece:.4f}", *(f"{mean:.4f}" for mean in _means(one.bins)))
        for one in analysis.calibration
    )  # fmt: skip
    text = (
        "Confidence is the mean probability, over 144 crops, of the class that is named. The expected calibration "
        "error (ECE) is its mean distance from accuracy over 15 bins of equal width: 0 means that of the answers given "
        "with 80% confidence 80% are right. Averaging models makes them less sure, rightly or not.",
    )
    head = ("", "ECE", "mean confidence", "accuracy")
    return Section("calibration", "Confidence", text, ("reliability",), (Grid("", head, rows),))


def classes(analysis: Analysis) -> Section:
    """Errors by class, and which classes are taken for which."""
    worst = worst_classes(analysis)
    rows = tuple(
        (
            class_name(analysis, one.label),
            "" if one.confused_with is None else f"{class_name(analysis, one.confused_with)} ({one.confused_images:,})",
            f"{one.images:,}",
            percent(one.top1_error),
            percent(one.top5_error),
        )
        for one in worst
    )
    head = ("class", "taken most often for (images)", "images", "top-1, %", "top-5, %")
    caption = (
        "By class, the worst first" if len(worst) == len(analysis.classes) else f"The {MOST_CLASSES} worst classes"
    )
    grids = [Grid(caption, head, rows, 2)]
    if analysis.confusions:
        pairs = tuple(
            (class_name(analysis, one.true), class_name(analysis, one.predicted), f"{one.images:,}")
            for one in analysis.confusions
        )
        grids.append(Grid("Most frequent confusions", ("true class", "named instead", "images"), pairs, 2))
    return Section("classes", "Classes", tuple(_about_classes(analysis)), ("classes",), tuple(grids))


def mistakes(analysis: Analysis, pictures: Mapping[int, bytes]) -> Section:
    """The wrong answers that the ensemble is surest of."""
    cards = tuple(
        Card(
            title=f"{class_name(analysis, one.predicted)}, {100 * one.confidence:.1f}%",
            text=f"true: {class_name(analysis, one.true)} (image {one.image:,})",
            picture=data_uri(pictures.get(one.image, b"")),
        )
        for one in analysis.mistakes
    )
    if not cards:
        return Section("mistakes", "Mistakes", ("There is not one wrong answer.",))
    missing = sum(not card.picture for card in cards)
    text = (
        "The wrong answers that the ensemble is surest of, with the class that it names and its confidence. Images are "
        f"counted from 0 in the split{f'; {missing} of them could not be shown' if missing else ''}. Some of them may "
        "be mistakes of the labels.",
    )
    return Section("mistakes", "Mistakes made most surely", text, cards=cards)


def data_uri(picture: bytes) -> str:
    """A JPEG or PNG as a data URI; empty for anything else."""
    kind = _KINDS.get(picture[:2])
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}" if kind else ""


def _means(bins: Sequence[Bin]) -> tuple[float, float]:
    """Mean confidence and accuracy over all bins."""
    images = sum(one.images for one in bins)
    sure = sum(one.images * one.confidence for one in bins if one.confidence is not None)
    right = sum(one.images * one.accuracy for one in bins if one.accuracy is not None)
    return sure / images, right / images


def _about_classes(analysis: Analysis) -> list[str]:
    found = analysis.classes
    errors = np.array([one.top1_error for one in found])
    faultless = int((errors == 0).sum())
    text = ["Errors are those of the ensemble over 144 crops, of the images of each class."]
    if len(found) > MOST_CLASSES:
        low, middle, high = np.percentile(errors, [25, 50, 75])
        text.append(
            f"Of the {len(found):,} classes the {MOST_CLASSES} worst are shown. Half of all classes have a top-1 error "
            f"of at most {percent(float(middle))}%, a quarter at most {percent(float(low))}%, a quarter at least "
            f"{percent(float(high))}%; classes without an error: {faultless:,}."
        )
    if lacking := len(analysis.class_names) - len(found):
        text.append(f"{lacking:,} of the {len(analysis.class_names):,} classes have no image in this split.")
    return text
