"""The report's sections on the table, on what is averaged (models, crops, weights) and on where figures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from orchestrator.data.crops import PAPER_INPUT, PAPER_SCALES, scale_sides
from orchestrator.ensemble import results
from orchestrator.ensemble.report_grid import Grid, Row, Section
from orchestrator.ensemble.report_text import (
    between,
    cell_name,
    counted,
    p_value,
    percent,
    points,
    points_between,
)
from orchestrator.evaluation.findings import Analysis, Difference, Spread
from orchestrator.evaluation.table3 import Cell
from orchestrator.storage import urls

MOST_ROWS = 40  # of members, or of numbers of them; more are left to the plots
NONE = "-"
T = TypeVar("T")
# Said in the head of the page, or of the whole table.
_SAID_ELSEWHERE = ("ensemble", "members", "members_asked_for")
_WEIGHTS = {
    "averaged": "the average over the last part of training (Polyak)",
    "raw": "raw: those of the last step",
    "best": "of the epoch that validated best, so chosen on this split",
}
_DIFFERENCE = ("top-1, points", "95% interval", "p", "top-5, points", "95% interval", "p")


def table(analysis: Analysis) -> Section:
    """The paper's Table 3 and the comparisons of its cells."""
    cells, comparable = analysis.table.cells, analysis.table.of_ilsvrc
    rows = tuple(_cell_row(cell, cells[0])[: None if comparable else -1] for cell in cells)
    head = ("models", "crops", "cost", "top-1, %", "95% interval", "vs 1x1", "top-5, %", "95% interval", "vs 1x1",
            "paper's top-5, %" if comparable else "paper's top-5 on ImageNet, %", "vs 1x1",
            *(("here less paper",) if comparable else ()))  # fmt: skip
    paired = tuple(
        (cell_name(one.cell), cell_name(one.other), *_difference(one.top1), *_difference(one.top5))
        for one in analysis.paired
    )
    return Section(
        "table",
        "Models and crops: the paper's Table 3",
        (
            "Cost is in forward passes of each image. A row of 1 model is the mean over the single models. Differences "
            "are in points of error, less is better; paired differences and what chance makes of them are in the "
            "second table.",
            *(() if comparable else (results.PAPERS,)),
        ),
        ("cells",),
        (
            Grid("Errors by models and crops", head, rows, 0, len(rows) - 1),
            Grid("Every two rows of it compared on the same images", ("cell", "less", *_DIFFERENCE), paired, 2),
        ),
    )


def sources(analysis: Analysis, about: Mapping[str, object]) -> Section:
    """What the figures are computed from."""
    found = analysis.table
    facts = [
        ("split", analysis.split),
        ("images with a label, which the figures are of", f"{found.images:,}"),
        ("images that no decoder takes, left out", f"{found.bad_images:,}"),
        ("images without a label, left out", f"{found.unlabelled:,}"),
        ("classes", f"{len(analysis.class_names):,}"),
        ("models", f"{len(analysis.member_names)} of {about.get('members_asked_for', len(analysis.member_names))}"),
    ]
    told = {name for name, _ in facts}
    for name, value in about.items():
        if name not in told and name not in _SAID_ELSEWHERE:
            facts.append((name.replace("_", " "), _WEIGHTS.get(str(value), "") or _shown(value)))
    return Section("sources", "What the figures are computed from", grids=(Grid("", ("", ""), tuple(facts), 2),))


def members(analysis: Analysis) -> Section:
    """Each member alone, and what it adds."""
    counts = sorted({one.crops for one in analysis.members})
    errors = {(one.member, one.crops): one for one in analysis.members}
    shown = analysis.member_names[:MOST_ROWS]
    alone = tuple(
        (
            name,
            *(percent(errors[name, count].top1_error) for count in counts),
            *(percent(errors[name, count].top5_error) for count in counts),
        )
        for name in shown
    )
    head = ("model", *(f"top-{rank}, {counted(count, 'crop')}" for rank in (1, 5) for count in counts))
    grids = [Grid("Errors of each model alone, %", head, alone)]
    text = ["Each model was trained by itself, on the whole training split."]
    if left := len(analysis.member_names) - len(shown):
        text.append(f"Of {len(analysis.member_names)} models the first {len(shown)} are listed, {left} are not.")
    if analysis.gains:
        rows = tuple((one.member, *_difference(one.top1), *_difference(one.top5)) for one in analysis.gains[:MOST_ROWS])
        grids.append(
            Grid("What each adds: error of the ensemble without it, less that with it", ("model", *_DIFFERENCE), rows)
        )
        text.append("A positive gain means that the ensemble is better with the model than without it.")
    return Section("members", "The models", tuple(text), ("training",), tuple(grids))


def sizes(analysis: Analysis) -> Section | None:
    """How many models are worth it; nothing of a single one."""
    if len(analysis.member_names) < 2:
        return None
    counts = sorted({one.crops for one in analysis.subsets})
    rows = []
    for size in _thinned(sorted({one.size for one in analysis.subsets})):
        alike = [one for count in counts for one in analysis.subsets if (one.size, one.crops) == (size, count)]
        spreads = [_spread(spread) for one in alike for spread in (one.top1, one.top5)]
        rows.append((str(size), f"{alike[0].looked_at:,}", *spreads))
    head = ("models", "subsets", *(f"top-{rank}, {_short(count)}" for count in counts for rank in (1, 5)))
    text = [
        "The mean over all choices of so many of the models, and below it the least and the most. So a line is not the "
        "luck of one order of the models."
    ]
    if any(one.looked_at < one.possible for one in analysis.subsets):
        text.append("Where there are very many choices, a sample of them is looked at; their number is in the table.")
    if len(analysis.member_names) > MOST_ROWS:
        text.append("The tables leave out some numbers of models.")
    picked = tuple(
        (str(step.size), *step.added, percent(step.top1_error), percent(step.top5_error))
        for step in _thinned(analysis.selection)
    )
    grids = [Grid("Error by the number of models, %", head, tuple(rows), 0)]
    if picked:
        head = ("models", "added by one half", "added by the other", "top-1, %", "top-5, %")
        grids.append(
            Grid(
                "Picked one by one for least top-5 error, on one half of the images and scored on the other",
                head,
                picked,
                3,
            )
        )
    return Section("sizes", "How many models", tuple(text), ("error_by_models",), tuple(grids))


def diversity(analysis: Analysis) -> Section | None:
    """How alike the models are; nothing of a single one."""
    count = len(analysis.member_names)
    if count < 2:
        return None
    pairs = [(row, column) for row in range(count) for column in range(row)]
    apart = [analysis.pairs.disagreement[row][column] for row, column in pairs]
    known = [value for row, column in pairs if (value := analysis.pairs.correlation[row][column]) is not None]
    text = [
        f"Two of the models name different classes for {percent(sum(apart) / len(apart))}% of the images on average "
        f"(from {percent(min(apart))}% to {percent(max(apart))}%, {counted(len(apart), 'pair')}), over 144 crops. "
        "Averaging helps as far as models err on different images."
    ]
    if known:
        text.append(
            f"The correlation of their errors is {sum(known) / len(known):.3f} on average, from {min(known):.3f} to "
            f"{max(known):.3f}; 1 would mean that they miss the same images."
        )
    return Section("diversity", "How alike the models are", tuple(text), ("disagreement",))


def crops(analysis: Analysis, about: Mapping[str, object]) -> Section:
    """What of an image is looked at, and what is made of it."""
    inputs = _inputs(about)
    of_inputs = [scale_sides(size) for size in inputs]
    sides = {paper: " / ".join(str(of[place]) for of in of_inputs) for place, paper in enumerate(PAPER_SCALES)}
    by_scale = {
        scale: [one for one in analysis.scales if one.scale == scale]
        for scale in sorted({one.scale for one in analysis.scales})
    }
    scales = tuple(
        (sides[scale], *(percent(value) for one in found for value in (one.top1_error, one.top5_error)))
        for scale, found in by_scale.items()
    )
    sizes = sorted({one.models for one in analysis.scales})
    head = ("shorter side", *(f"top-{rank}, {_models(size)}, %" for size in sizes for rank in (1, 5)))
    highest = tuple(
        (
            _models(one.models),
            percent(one.top1_error),
            percent(one.top5_error),
            *_difference(one.top1),
            *_difference(one.top5),
        )
        for one in analysis.maximum
    )
    return Section(
        "crops",
        "Crops, scales and the maximum",
        (
            "The 144 crops are 36 of each of four sizes of the image, whose shorter side is "
            f"{', '.join(sides.values())} pixels for networks that see {' / '.join(map(str, inputs))}; the paper's are "
            f"{', '.join(map(str, PAPER_SCALES))} for {PAPER_INPUT}.",
            "The paper tried the maximum over crops, too, and found it worse than the mean.",
        ),
        ("error_by_crops",),
        (
            Grid("By the 36 crops of one scale alone", head, scales, 0),
            Grid(
                "The maximum over 144 crops, and its difference to the mean",
                ("", "top-1, %", "top-5, %", *_DIFFERENCE),
                highest,
            ),
        ),
    )


def _inputs(about: Mapping[str, object]) -> Sequence[int]:
    """Return the sizes of the networks' inputs, in pixels; the paper's where nothing says."""
    sizes = about.get("input_sizes")
    return [int(size) for size in sizes] if isinstance(sizes, list) and sizes else [PAPER_INPUT]


def averaging(analysis: Analysis) -> Section | None:
    """Raw against averaged weights; nothing where raw ones were not scored."""
    if not analysis.averaging:
        return None
    rows = tuple(
        (
            cell_name((one.models, one.crops)),
            *(percent(one.raw_top1_error), percent(one.averaged_top1_error), *_difference(one.top1)),
            *(percent(one.raw_top5_error), percent(one.averaged_top5_error), *_difference(one.top5)),
        )
        for one in analysis.averaging
    )
    head = ("", "raw top-1, %", "averaged", *_DIFFERENCE[:3], "raw top-5, %", "averaged", *_DIFFERENCE[3:])
    text = (
        "The paper averages the weights over the last part of training (Polyak). Here the weights of the last step "
        "(raw) are set against that average; a positive difference means that averaging helps. Models scored with "
        f"both: {len(analysis.averaged_members)} of {len(analysis.member_names)}.",
    )
    return Section("averaging", "Raw against averaged weights", text, (), (Grid("Raw less averaged", head, rows),))


def _cell_row(cell: Cell, base: Cell) -> Row:
    paper = cell.paper_top5
    is_base = cell is base
    against = "base" if is_base else NONE
    if not is_base and paper is not None and base.paper_top5 is not None:
        against = points(paper - base.paper_top5)
    return (
        str(cell.models),
        str(cell.crops),
        f"{cell.cost:,}",
        percent(cell.top1_error),
        between(cell.top1_interval),
        "base" if is_base else points(cell.top1_error - base.top1_error),
        percent(cell.top5_error),
        between(cell.top5_interval),
        "base" if is_base else points(cell.top5_error - base.top5_error),
        NONE if paper is None else percent(paper),
        against,
        NONE if paper is None else points(cell.top5_error - paper),
    )


def _difference(found: Difference) -> tuple[str, str, str]:
    return points(found.points), points_between(found.interval), p_value(found.p)


def _thinned(rows: Sequence[T]) -> list[T]:
    """At most MOST_ROWS of some rows, evenly spread, the first and the last among them."""
    most = min(MOST_ROWS, len(rows))
    return [rows[number * (len(rows) - 1) // max(1, most - 1)] for number in range(most)]


def _spread(spread: Spread) -> str:
    return f"{percent(spread.mean)}\n{between((spread.least, spread.most))}"


def _models(count: int) -> str:
    return counted(count, "model")


def _short(count: int) -> str:
    return counted(count, "crop")


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(one)}" for name, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_shown(one) for one in value)
    return urls.redact(str(value))
