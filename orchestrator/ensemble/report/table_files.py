"""The table of an ensemble as text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping

from orchestrator.evaluation.table3 import Cell, Table3
from orchestrator.plotting.report_format import TextRow, format_markdown_table, format_text_table

PAPER_NOTE = (
    "The paper's figures are of ImageNet's 1,000 classes: they cannot be compared with errors on other classes."
)
HEADER = (
    *("models crops", "cost"),
    *("top-1 %", "95% interval", "vs 1x1"),
    *("top-5 %", "95% interval", "vs 1x1"),
    *("paper top-5 %", "vs 1x1"),
)


def build_rows(table: Table3) -> list[TextRow]:
    """Return a row of text for each cell, in the order of HEADER; differences are in points of error."""
    return [_build_row(cell, table.cells[0]) for cell in table.cells]


def render_text(table: Table3) -> str:
    """Return the table in plain text; each row begins with models and crops."""
    lines = [line.rstrip() for line in format_text_table([HEADER, *build_rows(table)], left=(0,))]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def render_markdown(table: Table3) -> str:
    """Return the table in Markdown."""
    return format_markdown_table(HEADER, build_rows(table)) + ("" if table.of_ilsvrc else f"\n{PAPER_NOTE}\n")


def build_columns(table: Table3) -> dict[str, list[object]]:
    """Return the table as columns, for a tracker."""
    cells, base = table.cells, table.cells[0]
    return {
        "models": [cell.models for cell in cells],
        "crops": [cell.crops for cell in cells],
        "cost": [cell.cost for cell in cells],
        "top1_error": [round(cell.top1_error, 4) for cell in cells],
        "top1_low": [round(cell.top1_interval[0], 4) for cell in cells],
        "top1_high": [round(cell.top1_interval[1], 4) for cell in cells],
        "top5_error": [round(cell.top5_error, 4) for cell in cells],
        "top5_low": [round(cell.top5_interval[0], 4) for cell in cells],
        "top5_high": [round(cell.top5_interval[1], 4) for cell in cells],
        "top1_vs_base": [round(cell.top1_error - base.top1_error, 4) for cell in cells],
        "top5_vs_base": [round(cell.top5_error - base.top5_error, 4) for cell in cells],
        "paper_top5_error": [cell.paper_top5 for cell in cells],
    }


def build_files(table: Table3, about: Mapping[str, object]) -> dict[str, bytes]:
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

    return (
        f"{cell.models} {cell.crops}",
        str(cell.cost),
        f"{cell.top1_error:.2f}",
        "{:.2f} - {:.2f}".format(*cell.top1_interval),
        compare(cell.top1_error, base.top1_error),
        f"{cell.top5_error:.2f}",
        "{:.2f} - {:.2f}".format(*cell.top5_interval),
        compare(cell.top5_error, base.top5_error),
        "-" if cell.paper_top5 is None else f"{cell.paper_top5:.2f}",
        compare(cell.paper_top5, base.paper_top5),
    )
