"""The sentences, numbers and the table of an ensemble's report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from orchestrator.evaluation.analysis_results import Analysis, ErrorDifference
from orchestrator.evaluation.bootstrap import MIN_P_VALUE
from orchestrator.evaluation.table3 import PAPER_TOP5, Cell, CellKey, Table3
from orchestrator.plotting.report_format import TextRow, format_count, format_markdown_table, format_text_table

MINUS = "\N{MINUS SIGN}"
FEW_CLASSES = 100  # with fewer the top-5 error hardly separates models, so the top-1 error comes first
PAPER_MODELS = 7
SIGNIFICANCE_LEVEL = 0.05
PAPER_NOTE = (
    "The paper's figures are of ImageNet's 1,000 classes: they cannot be compared with errors on other classes."
)
HEADER = (
    *("models crops", "cost"),
    *("top-1 %", "95% interval", "vs 1x1"),
    *("top-5 %", "95% interval", "vs 1x1"),
    *("paper top-5 %", "vs 1x1"),
)


def format_points(value: float) -> str:
    """Return a difference of errors in points, with its sign."""
    shown = f"{value:+.2f}"
    return "0.00" if float(shown) == 0 else shown.replace("-", MINUS)


def format_p_value(p: float) -> str:
    """Return a p-value to two digits."""
    if p <= MIN_P_VALUE:
        return f"< {MIN_P_VALUE:.0e}".replace("-", MINUS)
    if p >= 0.001:
        return f"{p:.2f}" if p >= 0.0995 else f"{p:#.2g}"
    digits, exponent = f"{p:.1e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", MINUS)


def format_difference(difference: ErrorDifference) -> tuple[str, str, str]:
    """Return a difference in points, its interval, and p."""
    low, high = map(format_points, difference.interval)
    return format_points(difference.points), f"{low} to {high}", format_p_value(difference.p)


def format_cell(cell: CellKey) -> str:
    """Return the models and crops of a cell of the table."""
    return f"{format_count(cell[0], 'model')} x {format_count(cell[1], 'crop')}"


# ------------------------------------------------------------------ the table
def build_header(table: Table3) -> TextRow:
    """Return the heads of the columns; the user's metrics are the last."""
    return (*HEADER, *table.cells[0].metrics)


def build_rows(table: Table3) -> list[TextRow]:
    """Return a row of text for each cell, in the order of the header; differences are in points of error."""
    return [
        (*_build_row(cell, table.cells[0]), *(f"{value:#.4g}" for value in cell.metrics.values()))
        for cell in table.cells
    ]


def render_text(table: Table3) -> str:
    """Return the table in plain text; each row begins with models and crops."""
    lines = [line.rstrip() for line in format_text_table([build_header(table), *build_rows(table)], left=(0,))]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def render_markdown(table: Table3) -> str:
    """Return the table in Markdown."""
    return format_markdown_table(build_header(table), build_rows(table)) + (
        "" if table.of_ilsvrc else f"\n{PAPER_NOTE}\n"
    )


def build_columns(table: Table3) -> dict[str, list[object]]:
    """Return the table as columns, for a tracker."""
    cells, base = table.cells, table.cells[0]
    errors = {
        "top1_error": [cell.top1_error for cell in cells],
        "top1_low": [cell.top1_interval[0] for cell in cells],
        "top1_high": [cell.top1_interval[1] for cell in cells],
        "top5_error": [cell.top5_error for cell in cells],
        "top5_low": [cell.top5_interval[0] for cell in cells],
        "top5_high": [cell.top5_interval[1] for cell in cells],
        "top1_vs_base": [cell.top1_error - base.top1_error for cell in cells],
        "top5_vs_base": [cell.top5_error - base.top5_error for cell in cells],
    }
    return {
        "models": [cell.models for cell in cells],
        "crops": [cell.crops for cell in cells],
        "cost": [cell.cost for cell in cells],
        **{name: [round(value, 4) for value in values] for name, values in errors.items()},
        "paper_top5_error": [cell.paper_top5 for cell in cells],
        **{name: [cell.metrics[name] for cell in cells] for name in base.metrics},
    }


def build_table_files(table: Table3, about: Mapping[str, object]) -> dict[str, bytes]:
    """Return the content of table.json, table.md and table.txt, by name."""
    record = {
        "about": dict(about), "images": table.images, "bad_images": table.bad_images, "table": build_columns(table)
    }  # fmt: skip
    note = "" if table.of_ilsvrc else f"{PAPER_NOTE}\n"
    return {
        "table.json": json.dumps(record, indent=1).encode(),
        "table.md": render_markdown(table).encode(),
        "table.txt": f"{render_text(table)}\n{note}".encode(),
    }


def _build_row(cell: Cell, base: Cell) -> TextRow:
    def compare(value: float | None, reference: float | None) -> str:
        if cell is base:
            return "base"
        return "-" if value is None or reference is None else f"{value - reference:+.2f}"

    columns = [f"{cell.models} {cell.crops}", str(cell.cost)]
    for error, (low, high), reference in (
        (cell.top1_error, cell.top1_interval, base.top1_error),
        (cell.top5_error, cell.top5_interval, base.top5_error),
    ):
        columns += [f"{error:.2f}", f"{low:.2f} - {high:.2f}", compare(error, reference)]
    paper = "-" if cell.paper_top5 is None else f"{cell.paper_top5:.2f}"
    return (*columns, paper, compare(cell.paper_top5, base.paper_top5))


# ------------------------------------------------------------------ sentences
def compose_headline(analysis: Analysis) -> list[str]:
    """Return sentences on what the ensemble gains, or of a single model what its crops gain."""
    table, models = analysis.table, len(analysis.member_names)
    crops = max(cell.crops for cell in table.cells)
    together = table.get_cell(models, crops)
    base = table.get_cell(1, crops) if models > 1 else table.cells[0]
    differences = analysis.paired[(models, crops), (base.models, base.crops)]
    sentences = []
    for rank in (1, 5) if len(analysis.class_names) < FEW_CLASSES else (5, 1):
        error, reference = (cell.top1_error if rank == 1 else cell.top5_error for cell in (together, base))
        difference = differences[0 if rank == 1 else 1]
        relation = "more" if difference.points > 0 else "less"
        subject, other = (
            (f"The {models} models together have a top-{rank} error of", "one of them alone has on average")
            if models > 1
            else (f"With {crops} crops the model has a top-{rank} error of", "it has with a single crop")
        )
        sentences.append(
            f"{subject} {error:.2f}%, {abs(difference.points):.2f} points {relation} than the {reference:.2f}% that "
            f"{other}: {compose_verdict(difference)}."
        )
    if models == PAPER_MODELS and table.of_ilsvrc:
        paper = PAPER_TOP5[PAPER_MODELS, crops]
        sentences.append(
            f"The paper's seven have a top-5 error of {paper:.2f}% on ILSVRC 2014's 50,000 validation images."
        )
    return sentences


def compose_verdict(difference: ErrorDifference) -> str:
    """Return whether chance explains a difference."""
    _, interval, p = format_difference(difference)
    facts = f"95% interval {interval} points, exact paired test p {p if p.startswith('<') else f'= {p}'}"
    low, high = difference.interval
    covered, chance = low <= 0 <= high, difference.p >= SIGNIFICANCE_LEVEL
    if covered and chance:
        return f"the interval covers 0, so these images do not show a difference ({facts})"
    if covered or chance:
        return f"interval and test disagree on whether it is more than chance, so treat it with care ({facts})"
    return f"more than chance explains ({facts})"


def describe_partial(about: Mapping[str, object], members: int) -> str:
    """Return how much of the requested models a partial ensemble has, as in "5 of 7 models"; else an empty text."""
    requested = about.get("members_asked_for", members)
    return "" if requested == members else f"{members} of {requested} models"


def compose_warnings(about: Mapping[str, object], members: int) -> Iterator[str]:
    """Yield what a reader must know before the figures."""
    if short := describe_partial(about, members):
        yield f"This is a partial ensemble: {short}. It does not stand for the whole one; the others have no scores."
    if about.get("weights") == "best":
        yield (
            "The weights of each model are those of the epoch with its least validation error: they were chosen on the "
            "images that they are scored on here. The errors tend to be too low; compare them with no others."
        )
    if about.get("weights") == "raw":
        yield "The weights are those of the last step of training (raw), not the average that the paper uses."
