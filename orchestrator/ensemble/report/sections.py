"""The sections of an ensemble's report."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from orchestrator.config import redaction
from orchestrator.data.transforms.multi_crop import PAPER_INPUT_SIZE, PAPER_SCALES, compute_scale_sides
from orchestrator.ensemble.report import table_files
from orchestrator.ensemble.report.ensemble_plots import MAX_CLASSES, find_worst_classes
from orchestrator.ensemble.report.wording import (
    format_cell,
    format_interval,
    format_p_value,
    format_percent,
    format_points,
    format_points_interval,
)
from orchestrator.evaluation.analysis_results import Analysis, CalibrationBin, ErrorDifference, ErrorSpread
from orchestrator.evaluation.table3 import Cell
from orchestrator.plotting.report_format import TextRow, format_count

MAX_ROWS = 40  # of members, or of numbers of them; more are left to the plots
NO_VALUE = "-"
T = TypeVar("T")
# In the head of the page, or in the table.
_SHOWN_ELSEWHERE = ("ensemble", "members", "members_asked_for")
_WEIGHTS_DESCRIPTIONS = {
    "averaged": "the average over the last part of training (Polyak)",
    "raw": "raw: those of the last step",
    "best": "of the epoch that validated best, so chosen on this split",
}
_DIFFERENCE_HEAD = ("top-1, points", "95% interval", "p", "top-5, points", "95% interval", "p")


def build_table_section(analysis: Analysis) -> Section:
    """Return the paper's Table 3 and the comparisons of its cells."""
    cells, comparable = analysis.table.cells, analysis.table.of_ilsvrc
    rows = tuple(_build_cell_row(cell, cells[0])[: None if comparable else -1] for cell in cells)
    head = ("models", "crops", "cost", "top-1, %", "95% interval", "vs 1x1", "top-5, %", "95% interval", "vs 1x1",
            "paper's top-5, %" if comparable else "paper's top-5 on ImageNet, %", "vs 1x1",
            *(("here less paper",) if comparable else ()))  # fmt: skip
    paired = tuple(
        (format_cell(one.cell), format_cell(one.other), *_format_difference(one.top1), *_format_difference(one.top5))
        for one in analysis.paired
    )
    return Section(
        "table",
        "Models and crops: the paper's Table 3",
        (
            "Cost is in forward passes of each image. A row of 1 model is the mean over the single models. Differences "
            "are in points of error, less is better; the second table has paired differences and their p-values.",
            *(() if comparable else (table_files.PAPER_NOTE,)),
        ),
        ("table",),
        (
            TextTable("Errors by models and crops", head, rows, 0, len(rows) - 1),
            TextTable("Every two rows, compared on the same images", ("cell", "less", *_DIFFERENCE_HEAD), paired, 2),
        ),
    )


def build_sources_section(analysis: Analysis, about: Mapping[str, object]) -> Section:
    """Return the section on what the figures are computed from."""
    table = analysis.table
    facts = [
        ("split", analysis.split),
        ("images with a label, which the figures are of", f"{table.images:,}"),
        ("images that cannot be decoded, left out", f"{table.bad_images:,}"),
        ("images without a label, left out", f"{table.unlabelled:,}"),
        ("classes", f"{len(analysis.class_names):,}"),
        ("models", f"{len(analysis.member_names)} of {about.get('members_asked_for', len(analysis.member_names))}"),
    ]
    listed = {name for name, _ in facts}
    for name, value in about.items():
        if name not in listed and name not in _SHOWN_ELSEWHERE:
            facts.append((name.replace("_", " "), _WEIGHTS_DESCRIPTIONS.get(str(value), "") or _format_value(value)))
    return Section("sources", "What the figures are computed from", tables=(TextTable("", ("", ""), tuple(facts), 2),))


def build_members_section(analysis: Analysis) -> Section:
    """Return the errors of each member alone, and what it adds."""
    counts = sorted({one.crops for one in analysis.members})
    errors = {(one.member, one.crops): one for one in analysis.members}
    shown = analysis.member_names[:MAX_ROWS]
    alone = tuple(
        (
            name,
            *(format_percent(errors[name, count].top1_error) for count in counts),
            *(format_percent(errors[name, count].top5_error) for count in counts),
        )
        for name in shown
    )
    head = ("model", *(f"top-{rank}, {format_count(count, 'crop')}" for rank in (1, 5) for count in counts))
    grids = [TextTable("Errors of each model alone, %", head, alone)]
    text = ["Each model was trained alone, on the whole training split."]
    if left := len(analysis.member_names) - len(shown):
        text.append(f"Of {len(analysis.member_names)} models the first {len(shown)} are listed, {left} are not.")
    if analysis.gains:
        rows = tuple(
            (one.member, *_format_difference(one.top1), *_format_difference(one.top5))
            for one in analysis.gains[:MAX_ROWS]
        )
        grids.append(
            TextTable(
                "What each adds: error of the ensemble without it, less that with it",
                ("model", *_DIFFERENCE_HEAD),
                rows,
            )
        )
        text.append("A positive gain means that the ensemble is better with the model than without it.")
    return Section("members", "The models", tuple(text), ("curves",), tuple(grids))


def build_sizes_section(analysis: Analysis) -> Section | None:
    """Return the errors by the number of models; None for a single one."""
    if len(analysis.member_names) < 2:
        return None
    counts = sorted({one.crops for one in analysis.subsets})
    rows = []
    for size in _thin_rows(sorted({one.size for one in analysis.subsets})):
        alike = [one for count in counts for one in analysis.subsets if (one.size, one.crops) == (size, count)]
        spreads = [_format_spread(spread) for one in alike for spread in (one.top1, one.top5)]
        rows.append((str(size), f"{alike[0].looked_at:,}", *spreads))
    head = ("models", "subsets", *(f"top-{rank}, {format_count(count, 'crop')}" for count in counts for rank in (1, 5)))
    text = [
        "The mean over all choices of so many of the models, and below it the least and the most, so that no line "
        "depends on the order of the models."
    ]
    if any(one.looked_at < one.possible for one in analysis.subsets):
        text.append("Of very many choices a sample is used; its size is in the table.")
    if len(analysis.member_names) > MAX_ROWS:
        text.append("The tables leave out some numbers of models.")
    picked = tuple(
        (str(step.size), *step.added, format_percent(step.top1_error), format_percent(step.top5_error))
        for step in _thin_rows(analysis.selection)
    )
    grids = [TextTable("Error by the number of models, %", head, tuple(rows), 0)]
    if picked:
        head = ("models", "added by one half", "added by the other", "top-1, %", "top-5, %")
        grids.append(
            TextTable(
                "Picked one by one for least top-5 error, on one half of the images and scored on the other",
                head,
                picked,
                3,
            )
        )
    return Section("sizes", "How many models", tuple(text), ("error_by_models",), tuple(grids))


def build_diversity_section(analysis: Analysis) -> Section | None:
    """Return how alike the models are; None for a single one."""
    count = len(analysis.member_names)
    if count < 2:
        return None
    pairs = [(row, column) for row in range(count) for column in range(row)]
    apart = [analysis.pairs.disagreement[row][column] for row, column in pairs]
    known = [value for row, column in pairs if (value := analysis.pairs.correlation[row][column]) is not None]
    text = [
        f"Two of the models name different classes for {format_percent(sum(apart) / len(apart))}% of the "
        "images on average "
        f"(from {format_percent(min(apart))}% to {format_percent(max(apart))}%, "
        f"{format_count(len(apart), 'pair')}), over 144 crops. "
        "Averaging helps as far as models err on different images."
    ]
    if known:
        text.append(
            f"The correlation of their errors is {sum(known) / len(known):.3f} on average, from {min(known):.3f} to "
            f"{max(known):.3f}; 1 would mean that they miss the same images."
        )
    return Section("diversity", "How alike the models are", tuple(text), ("disagreement",))


def build_crops_section(analysis: Analysis, about: Mapping[str, object]) -> Section:
    """Return the errors by crops and scales, and of the maximum over crops."""
    inputs = _get_input_sizes(about)
    of_inputs = [compute_scale_sides(size) for size in inputs]
    sides = {paper: " / ".join(str(of[place]) for of in of_inputs) for place, paper in enumerate(PAPER_SCALES)}
    by_scale = {
        scale: [one for one in analysis.scales if one.scale == scale]
        for scale in sorted({one.scale for one in analysis.scales})
    }
    scales = tuple(
        (sides[scale], *(format_percent(value) for one in found for value in (one.top1_error, one.top5_error)))
        for scale, found in by_scale.items()
    )
    sizes = sorted({one.models for one in analysis.scales})
    head = ("shorter side", *(f"top-{rank}, {format_count(size, 'model')}, %" for size in sizes for rank in (1, 5)))
    highest = tuple(
        (
            format_count(one.models, "model"),
            format_percent(one.top1_error),
            format_percent(one.top5_error),
            *_format_difference(one.top1),
            *_format_difference(one.top5),
        )
        for one in analysis.maximum
    )
    return Section(
        "crops",
        "Crops, scales and the maximum",
        (
            "The 144 crops are 36 of each of four sizes of the image, whose shorter side is "
            f"{', '.join(sides.values())} pixels for networks that see {' / '.join(map(str, inputs))}; the paper's are "
            f"{', '.join(map(str, PAPER_SCALES))} for {PAPER_INPUT_SIZE}.",
            "The paper also tried the maximum over crops, and found it worse than the mean.",
        ),
        ("error_by_crops",),
        (
            TextTable("By the 36 crops of one scale alone", head, scales, 0),
            TextTable(
                "The maximum over 144 crops, and its difference to the mean",
                ("", "top-1, %", "top-5, %", *_DIFFERENCE_HEAD),
                highest,
            ),
        ),
    )


def _get_input_sizes(about: Mapping[str, object]) -> Sequence[int]:
    """Return the sizes of the networks' inputs, in pixels; by default the paper's."""
    sizes = about.get("input_sizes")
    return [int(size) for size in sizes] if isinstance(sizes, list) and sizes else [PAPER_INPUT_SIZE]


def build_averaging_section(analysis: Analysis) -> Section | None:
    """Return raw against averaged weights; None when raw ones were not scored."""
    if not analysis.averaging:
        return None
    rows = tuple(
        (
            format_cell((one.models, one.crops)),
            *(
                format_percent(one.raw_top1_error),
                format_percent(one.averaged_top1_error),
                *_format_difference(one.top1),
            ),
            *(
                format_percent(one.raw_top5_error),
                format_percent(one.averaged_top5_error),
                *_format_difference(one.top5),
            ),
        )
        for one in analysis.averaging
    )
    head = ("", "raw top-1, %", "averaged", *_DIFFERENCE_HEAD[:3], "raw top-5, %", "averaged", *_DIFFERENCE_HEAD[3:])
    text = (
        "The paper averages the weights over the last part of training (Polyak). Here the weights of the last step "
        "(raw) are set against that average; a positive difference means that averaging helps. Models scored with "
        f"both: {len(analysis.averaged_members)} of {len(analysis.member_names)}.",
    )
    return Section("averaging", "Raw against averaged weights", text, (), (TextTable("Raw less averaged", head, rows),))


def _build_cell_row(cell: Cell, base: Cell) -> TextRow:
    paper = cell.paper_top5
    is_base = cell is base
    against = "base" if is_base else NO_VALUE
    if not is_base and paper is not None and base.paper_top5 is not None:
        against = format_points(paper - base.paper_top5)
    return (
        str(cell.models),
        str(cell.crops),
        f"{cell.cost:,}",
        format_percent(cell.top1_error),
        format_interval(cell.top1_interval),
        "base" if is_base else format_points(cell.top1_error - base.top1_error),
        format_percent(cell.top5_error),
        format_interval(cell.top5_interval),
        "base" if is_base else format_points(cell.top5_error - base.top5_error),
        NO_VALUE if paper is None else format_percent(paper),
        against,
        NO_VALUE if paper is None else format_points(cell.top5_error - paper),
    )


def _format_difference(difference: ErrorDifference) -> tuple[str, str, str]:
    interval = format_points_interval(difference.interval)
    return format_points(difference.points), interval, format_p_value(difference.p)


def _thin_rows(rows: Sequence[T]) -> list[T]:
    """Return at most MAX_ROWS rows, evenly spread, with the first and the last."""
    most = min(MAX_ROWS, len(rows))
    return [rows[number * (len(rows) - 1) // max(1, most - 1)] for number in range(most)]


def _format_spread(spread: ErrorSpread) -> str:
    return f"{format_percent(spread.mean)}\n{format_interval((spread.least, spread.most))}"


def _format_value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_format_value(one)}" for name, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_format_value(one) for one in value)
    return redaction.redact(str(value))


@dataclass(frozen=True)
class TextTable:
    """A table of text with the names of its columns; the first `text_columns` hold words, the others numbers."""

    caption: str
    head: TextRow
    rows: tuple[TextRow, ...]
    text_columns: int = 1
    bold_row: int | None = None  # the row that matters most


@dataclass(frozen=True)
class Card:
    """A picture, as a data URI or empty, with a caption."""

    title: str
    text: str
    picture: str


@dataclass(frozen=True)
class Section:
    """A part of the report under a title; of `plots`, by name, those that exist are shown."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    tables: tuple[TextTable, ...] = ()
    cards: tuple[Card, ...] = ()


_IMAGE_TYPES = {b"\xff\xd8": "jpeg", b"\x89P": "png"}


def build_calibration_section(analysis: Analysis) -> Section:
    """Return how far confidence is from accuracy."""
    rows = tuple(
        (format_count(one.models, "model"), f"{one.ece:.4f}", *(f"{mean:.4f}" for mean in _compute_means(one.bins)))
        for one in analysis.calibration
    )  # fmt: skip
    text = (
        "Confidence is the mean probability, over 144 crops, of the class that is named. The expected calibration "
        "error (ECE) is its mean distance from accuracy over 15 bins of equal width: 0 means that of the answers given "
        "with 80% confidence 80% are right. Averaging models lowers the confidence, rightly or not.",
    )
    head = ("", "ECE", "mean confidence", "accuracy")
    return Section("calibration", "Confidence", text, ("reliability",), (TextTable("", head, rows),))


def build_classes_section(analysis: Analysis) -> Section:
    """Return errors by class, and which classes are confused."""
    worst, names = find_worst_classes(analysis), analysis.class_names
    rows = tuple(
        (
            names[one.label],
            "" if one.confused_with is None else f"{names[one.confused_with]} ({one.confused_images:,})",
            f"{one.images:,}",
            format_percent(one.top1_error),
            format_percent(one.top5_error),
        )
        for one in worst
    )
    head = ("class", "taken most often for (images)", "images", "top-1, %", "top-5, %")
    caption = "By class, the worst first" if len(worst) == len(analysis.classes) else f"The {MAX_CLASSES} worst classes"
    grids = [TextTable(caption, head, rows, 2)]
    if analysis.confusions:
        pairs = tuple((names[one.true], names[one.predicted], f"{one.images:,}") for one in analysis.confusions)
        grids.append(TextTable("Most frequent confusions", ("true class", "named instead", "images"), pairs, 2))
    return Section("classes", "Classes", tuple(_describe_classes(analysis)), ("classes",), tuple(grids))


def build_mistakes_section(analysis: Analysis, pictures: Mapping[int, bytes]) -> Section:
    """Return the wrong answers with the highest confidence."""
    names = analysis.class_names
    cards = tuple(
        Card(
            title=f"{names[one.predicted]}, {100 * one.confidence:.1f}%",
            text=f"true: {names[one.true]} (image {one.image:,})",
            picture=encode_data_uri(pictures.get(one.image, b"")),
        )
        for one in analysis.mistakes
    )
    if not cards:
        return Section("mistakes", "Mistakes", ("There are no wrong answers.",))
    missing = sum(not card.picture for card in cards)
    text = (
        "The wrong answers with the highest confidence, with the class that the ensemble names. Images are counted "
        f"from 0 in the split{f'; {missing} of them could not be shown' if missing else ''}. Some of the labels may be "
        "wrong.",
    )
    return Section("mistakes", "Most confident mistakes", text, cards=cards)


def encode_data_uri(picture: bytes) -> str:
    """Return a JPEG or PNG as a data URI; empty for anything else."""
    kind = _IMAGE_TYPES.get(picture[:2])
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}" if kind else ""


def _compute_means(bins: Sequence[CalibrationBin]) -> tuple[float, float]:
    """Return mean confidence and accuracy over all bins."""
    images = sum(one.images for one in bins)
    confidence = sum(one.images * one.confidence for one in bins if one.confidence is not None)
    accuracy = sum(one.images * one.accuracy for one in bins if one.accuracy is not None)
    return confidence / images, accuracy / images


def _describe_classes(analysis: Analysis) -> list[str]:
    classes = analysis.classes
    errors = np.array([one.top1_error for one in classes])
    faultless = int((errors == 0).sum())
    text = ["Errors are those of the ensemble over 144 crops, of the images of each class."]
    if len(classes) > MAX_CLASSES:
        low, middle, high = np.percentile(errors, [25, 50, 75])
        text.append(
            f"Of the {len(classes):,} classes the {MAX_CLASSES} worst are shown. Half of all classes have a top-1 "
            f"error of at most {format_percent(float(middle))}%, a quarter at most {format_percent(float(low))}%, a "
            f"quarter at least {format_percent(float(high))}%; classes without an error: {faultless:,}."
        )
    if lacking := len(analysis.class_names) - len(classes):
        text.append(f"{lacking:,} of the {len(analysis.class_names):,} classes have no image in this split.")
    return text
