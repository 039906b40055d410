"""The report of an ensemble: one self-contained HTML file, its tables in Markdown and JSON, and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.config import redaction
from orchestrator.data.transforms.multi_crop import CROP_SUBSETS, PAPER_INPUT_SIZE, PAPER_SCALES, compute_scale_sides
from orchestrator.ensemble.report import ensemble_plots, wording
from orchestrator.ensemble.report.ensemble_plots import ErrorCurves
from orchestrator.ensemble.report.wording import format_difference
from orchestrator.evaluation.analysis_results import Analysis, Errors
from orchestrator.plotting.canvas import Plot
from orchestrator.plotting.report_format import (
    TextRow,
    escape_markdown,
    format_count,
    format_markdown_table,
    render_page,
    write_report_files,
)

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
MAX_CLASSES = 25  # rows of classes, the worst
MAX_PAIRED_MEMBERS = 16  # members whose pairs fit into a table
# In the head of the page, or in the table.
_SHOWN_ELSEWHERE = ("ensemble", "members", "members_asked_for", "split")
_WEIGHTS_DESCRIPTIONS = {
    "averaged": "the average over the last part of training (Polyak)",
    "raw": "raw: those of the last step",
    "best": "of the epoch that validated best, so chosen on this split",
}
_DIFFERENCE_HEAD = ("top-1, points", "95% interval", "p", "top-5, points", "95% interval", "p")


@dataclass(frozen=True)
class TextTable:
    """A table of text with the names of its columns; the first `text_columns` hold words, the others numbers."""

    caption: str
    head: TextRow
    rows: Sequence[TextRow]
    text_columns: int = 1
    bold_row: int | None = None  # the row that matters most


@dataclass(frozen=True)
class Section:
    """A part of the report under a title; of `plots`, by name, those that exist are shown."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    plots: tuple[str, ...] = ()
    tables: tuple[TextTable, ...] = ()


def write_report(folder: str, about: Mapping[str, object], analysis: Analysis, curves: ErrorCurves) -> None:
    """Write report.html, report.md, table.json, table.md, table.txt and a PNG of each plot below `folder` (a URL).

    about: what the result is of; unknown entries are listed as they are. curves: by run, pairs of epoch and validation
    error in percent. Raises StorageError.
    """
    plots = ensemble_plots.draw_plots(analysis, curves)
    content = {f"{plot.name}.png": plot.png for plot in plots.values()}
    content |= wording.build_table_files(analysis.table, about)
    content[MARKDOWN_FILE] = render_markdown(about, analysis).encode()
    content[HTML_FILE] = render_html(about, analysis, plots).encode()
    write_report_files(folder, content, ensemble_plots.PLOT_NAMES)


def render_html(about: Mapping[str, object], analysis: Analysis, plots: Mapping[str, Plot]) -> str:
    """Return the page."""
    members = len(analysis.member_names)
    several = members > 1
    sections = (
        _build_table_section(analysis),
        *((_build_sizes_section(analysis),) if several else ()),
        _build_members_section(analysis),
        *((_build_diversity_section(analysis),) if several else ()),
        _build_crops_section(analysis, about),
        _build_calibration_section(analysis),
        _build_classes_section(analysis),
        Section("sources", "What the figures are computed from", tables=(_build_sources_table(analysis, about),)),
    )
    return render_page(
        "orchestrator.ensemble",
        "report.html.jinja",
        title=str(about.get("ensemble", "ensemble")),
        partial=wording.describe_partial(about, members),
        warnings=list(wording.compose_warnings(about, members)),
        headline=wording.compose_headline(analysis),
        sections=sections,
        plots=plots,
    )


def render_markdown(about: Mapping[str, object], analysis: Analysis) -> str:
    """Return title, warnings, headline, Table 3 with the paper's figures, and what it is computed from."""
    members = len(analysis.member_names)
    title = str(about.get("ensemble", "ensemble"))
    if partial := wording.describe_partial(about, members):
        title += f" ({partial})"
    parts = [f"# {escape_markdown(title)}"]
    parts += [f"**{escape_markdown(warning)}**" for warning in wording.compose_warnings(about, members)]
    parts += ["\n".join(escape_markdown(sentence) for sentence in wording.compose_headline(analysis))]
    parts += [wording.render_markdown(analysis.table).rstrip()]
    parts += [
        "Cost is in forward passes of each image; differences (vs) are in points of error to 1 model and 1 crop, and "
        "intervals are bootstrap intervals over images."
    ]
    parts += [format_markdown_table(("computed from", ""), _build_sources_table(analysis, about).rows)]
    return "\n\n".join(parts)


def _build_table_section(analysis: Analysis) -> Section:
    paired = [
        (wording.format_cell(cell), wording.format_cell(other), *format_difference(top1), *format_difference(top5))
        for (cell, other), (top1, top5) in analysis.paired.items()
    ]
    rows = wording.build_rows(analysis.table)
    return Section(
        "table",
        "Models and crops: the paper's Table 3",
        (
            "Cost is in forward passes of each image. A row of 1 model is the mean over the single models. Differences "
            "are in points of error, less is better; the second table has paired differences and their p-values.",
            *(() if analysis.table.of_ilsvrc else (wording.PAPER_NOTE,)),
        ),
        ("table",),
        (
            TextTable("Errors by models and crops", wording.build_header(analysis.table), rows, 0, len(rows) - 1),
            TextTable("Every two rows, compared on the same images", ("cell", "less", *_DIFFERENCE_HEAD), paired, 2),
        ),
    )


def _build_sources_table(analysis: Analysis, about: Mapping[str, object]) -> TextTable:
    table, members = analysis.table, len(analysis.member_names)
    facts = [
        ("split", analysis.split),
        ("images with a label, which the figures are of", f"{table.images:,}"),
        ("images that cannot be decoded, left out", f"{table.bad_images:,}"),
        ("images without a label, left out", f"{table.unlabelled:,}"),
        ("classes", f"{len(analysis.class_names):,}"),
        ("models", f"{members} of {about.get('members_asked_for', members)}"),
    ]
    facts += [
        (name.replace("_", " "), _WEIGHTS_DESCRIPTIONS.get(str(value), "") or _format_value(value))
        for name, value in about.items()
        if name not in _SHOWN_ELSEWHERE
    ]
    return TextTable("", ("", ""), facts, 2)


def _format_value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_format_value(one)}" for name, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_format_value(one) for one in value)
    return redaction.redact(str(value))


def _format_percents(*errors: Errors) -> TextRow:
    return tuple(f"{value:.2f}" for pair in errors for value in pair)


def _name_columns(counts: Sequence[int], noun: str) -> TextRow:
    """Return the heads of columns of top-1 and top-5 errors, in percent, for each number of models or crops."""
    return tuple(f"top-{rank}, {format_count(count, noun)}, %" for count in counts for rank in (1, 5))


def _build_members_section(analysis: Analysis) -> Section:
    alone = [
        (name, *_format_percents(*(analysis.members[name, crops] for crops in CROP_SUBSETS)))
        for name in analysis.member_names
    ]
    tables = [TextTable("Errors of each model alone", ("model", *_name_columns(list(CROP_SUBSETS), "crop")), alone)]
    text = ["Each model was trained alone, on the whole training split."]
    if analysis.gains:
        caption = "What each adds: error of the ensemble without it, less that with it"
        rows = [
            (name, *format_difference(top1), *format_difference(top5)) for name, (top1, top5) in analysis.gains.items()
        ]
        tables.append(TextTable(caption, ("model", *_DIFFERENCE_HEAD), rows))
        text.append("A positive gain means that the ensemble is better with the model than without it.")
    return Section("members", "The models", tuple(text), ("curves",), tuple(tables))


def _build_sizes_section(analysis: Analysis) -> Section:
    crops = sorted({crops for crops, _ in analysis.subsets})
    rows = []
    for size in sorted({size for _, size in analysis.subsets}):
        found = [analysis.subsets[count, size] for count in crops]
        spreads = (
            f"{one.mean[rank]:.2f}\n{one.least[rank]:.2f} to {one.most[rank]:.2f}" for one in found for rank in (0, 1)
        )
        rows.append((str(size), f"{found[0].subsets:,}", *spreads))
    text = (
        "The mean over all choices of so many of the models, and below it the least and the most, so that no line "
        "depends on the order of the models."
    )
    head = ("models", "subsets", *_name_columns(crops, "crop"))
    table = TextTable("Error by the number of models", head, rows, 0)
    return Section("sizes", "How many models", (text,), ("error_by_models",), (table,))


def _build_diversity_section(analysis: Analysis) -> Section:
    count = len(analysis.member_names)
    pairs = [(row, column) for row in range(count) for column in range(row)]
    apart = [analysis.disagreement[row][column] for row, column in pairs]
    known = [value for row, column in pairs if (value := analysis.correlation[row][column]) is not None]
    text = [
        f"Two of the models name different classes for {sum(apart) / len(apart):.2f}% of the images on average "
        f"(from {min(apart):.2f}% to {max(apart):.2f}%, {format_count(len(apart), 'pair')}), over 144 crops. "
        "Averaging helps as far as models err on different images."
    ]
    if known:
        text.append(
            f"The correlation of their errors is {sum(known) / len(known):.3f} on average, from {min(known):.3f} to "
            f"{max(known):.3f}; 1 would mean that they miss the same images."
        )
    tables = []
    if count <= MAX_PAIRED_MEMBERS:
        rows: list[TextRow] = []
        for row, name in enumerate(analysis.member_names):
            values = zip(analysis.disagreement[row][:row], analysis.correlation[row], strict=False)
            cells = [f"{share:.2f}\n{'-' if alike is None else f'{alike:.3f}'}" for share, alike in values]
            rows.append((f"{row + 1} {name}", *cells, *[""] * (count - 1 - row)))
        head = ("", *map(str, range(1, count)))
        caption = "Images with different answers, %, and below it the correlation of errors"
        tables.append(TextTable(caption, head, rows))
    return Section("diversity", "How alike the models are", tuple(text), (), tuple(tables))


def _build_crops_section(analysis: Analysis, about: Mapping[str, object]) -> Section:
    sizes = about.get("input_sizes")
    inputs = [int(size) for size in sizes] if isinstance(sizes, list) and sizes else [PAPER_INPUT_SIZE]
    sides = [" / ".join(map(str, of_scale)) for of_scale in zip(*map(compute_scale_sides, inputs), strict=True)]
    models = sorted(analysis.maximum)
    scales = [
        (side, *_format_percents(*(analysis.scales[count, scale] for count in models)))
        for side, scale in zip(sides, PAPER_SCALES, strict=True)
    ]
    highest = [
        (format_count(count, "model"), *_format_percents(errors), *format_difference(top1), *format_difference(top5))
        for count, (errors, (top1, top5)) in analysis.maximum.items()
    ]
    text = (
        f"The 144 crops are 36 of each of four sizes of the image, whose shorter side is {', '.join(sides)} pixels for "
        f"networks that see {' / '.join(map(str, inputs))}; the paper's are {', '.join(map(str, PAPER_SCALES))} for "
        f"{PAPER_INPUT_SIZE}.",
        "The paper also tried the maximum over crops, and found it worse than the mean.",
    )
    tables = (
        TextTable("By the 36 crops of one scale alone", ("shorter side", *_name_columns(models, "model")), scales, 0),
        TextTable(
            "The maximum over 144 crops, and its difference to the mean",
            ("", "top-1, %", "top-5, %", *_DIFFERENCE_HEAD),
            highest,
        ),
    )
    return Section("crops", "Scales and the maximum", text, (), tables)


def _build_calibration_section(analysis: Analysis) -> Section:
    rows = [
        (format_count(one.models, "model"), f"{one.ece:.4f}", f"{one.confidence:.4f}", f"{one.accuracy:.4f}")
        for one in analysis.calibration
    ]
    text = (
        "Confidence is the mean probability, over 144 crops, of the class that is named. The expected calibration "
        "error (ECE) is its mean distance from accuracy over 15 bins of equal width: 0 means that of the answers given "
        "with 80% confidence 80% are right. Averaging models lowers the confidence, rightly or not.",
    )
    head = ("", "ECE", "mean confidence", "accuracy")
    return Section("calibration", "Confidence", text, ("reliability",), (TextTable("", head, rows),))


def _build_classes_section(analysis: Analysis) -> Section:
    names = analysis.class_names
    ordered = sorted(analysis.classes, key=lambda one: (-one.top1_error, -one.top5_error, one.label))
    rows = [
        (
            names[one.label],
            "" if one.confused_with is None else f"{names[one.confused_with]} ({one.confused_images:,})",
            f"{one.images:,}",
            *_format_percents((one.top1_error, one.top5_error)),
        )
        for one in ordered[:MAX_CLASSES]
    ]
    head = ("class", "taken most often for (images)", "images", "top-1, %", "top-5, %")
    pairs = [(names[one.true], names[one.predicted], f"{one.images:,}") for one in analysis.confusions]
    mistakes = [
        (names[one.true], names[one.predicted], f"{100 * one.confidence:.1f}", f"{one.image:,}")
        for one in analysis.mistakes
    ]
    tables = [
        TextTable("By class, the worst first", head, rows, 2),
        TextTable("Most frequent confusions", ("true class", "named instead", "images"), pairs, 2),
        TextTable(
            "Wrong answers with the highest confidence (images counted from 0 in the split)",
            ("true class", "answer", "confidence, %", "image"),
            mistakes,
            2,
        ),
    ]
    text = ["Errors are those of the ensemble over 144 crops, of the images of each class."]
    errors = np.array([one.top1_error for one in analysis.classes])
    if len(errors) > MAX_CLASSES:
        low, middle, high = np.percentile(errors, [25, 50, 75])
        text.append(
            f"Of the {len(errors):,} classes the {MAX_CLASSES} worst are shown. Half of all classes have a top-1 error "
            f"of at most {middle:.2f}%, a quarter at most {low:.2f}%, a quarter at least {high:.2f}%; classes without "
            f"an error: {int((errors == 0).sum()):,}."
        )
    if lacking := len(names) - len(errors):
        text.append(f"{lacking:,} of the {len(names):,} classes have no image in this split.")
    return Section("classes", "Classes", tuple(text), (), tuple(table for table in tables if table.rows))
