"""The table for people and for machines: text, Markdown, JSON, picture."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence

from orchestrator.evaluation.table3 import Cell, Table3
from orchestrator.plotting import run_plots
from orchestrator.plotting.run_plots import EnsembleCell
from orchestrator.storage import file_io

PAPER_NOTE = (
    "The paper's figures are of ImageNet's 1,000 classes: they cannot be compared with errors on other classes."
)
MODELS_CROPS = "models crops"
VERSUS = "vs 1x1"
INTERVAL = "95% interval"
HEADER = (
    *(MODELS_CROPS, "cost"),
    *("top-1 %", INTERVAL, VERSUS),
    *("top-5 %", INTERVAL, VERSUS),
    *("paper top-5 %", VERSUS),
)


def build_rows(table: Table3) -> list[tuple[str, ...]]:
    """A row of text for each cell, in the order of HEADER; differences are in points of error."""
    base = table.cells[0]
    return [_build_row(cell, base) for cell in table.cells]


def render_text(table: Table3) -> str:
    """The table in plain text; each row begins with models and crops."""
    body = [HEADER, *build_rows(table)]
    widths = [max(len(row[column]) for row in body) for column in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in body
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def render_markdown(table: Table3) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    lines += ["| " + " | ".join(row) + " |" for row in build_rows(table)]
    return "\n".join(lines) + "\n" + ("" if table.of_ilsvrc else f"\n{PAPER_NOTE}\n")


def build_columns(table: Table3) -> dict[str, list[object]]:
    """The table as columns, for a tracker."""
    base = table.cells[0]
    return {
        "models": [cell.models for cell in table.cells],
        "crops": [cell.crops for cell in table.cells],
        "cost": [cell.cost for cell in table.cells],
        "top1_error": [round(cell.top1_error, 4) for cell in table.cells],
        "top1_low": [round(cell.top1_interval[0], 4) for cell in table.cells],
        "top1_high": [round(cell.top1_interval[1], 4) for cell in table.cells],
        "top5_error": [round(cell.top5_error, 4) for cell in table.cells],
        "top5_low": [round(cell.top5_interval[0], 4) for cell in table.cells],
        "top5_high": [round(cell.top5_interval[1], 4) for cell in table.cells],
        "top1_vs_base": [round(cell.top1_error - base.top1_error, 4) for cell in table.cells],
        "top5_vs_base": [round(cell.top5_error - base.top5_error, 4) for cell in table.cells],
        "paper_top5_error": [cell.paper_top5 for cell in table.cells],
    }


def draw_table(table: Table3, path: str) -> None:
    """The table as a PNG at a local path."""
    run_plots.plot_ensemble_errors(
        [
            EnsembleCell(
                cell.models, cell.crops, cell.top1_error, *cell.top1_interval, cell.top5_error, *cell.top5_interval,
                cell.paper_top5 if table.of_ilsvrc else None,
            )
            for cell in table.cells
        ],
        path,
    )  # fmt: skip


def write_files(
    folder: str, table: Table3, about: dict[str, object], curves: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Write table.json, table.md, table.txt, table.png and, where there are curves, curves.png below `folder`."""
    content = {"about": about, "images": table.images, "bad_images": table.bad_images, "table": build_columns(table)}
    file_io.write_bytes(file_io.join(folder, "table.json"), json.dumps(content, indent=1).encode())
    file_io.write_bytes(file_io.join(folder, "table.md"), render_markdown(table).encode())
    note = "" if table.of_ilsvrc else f"{PAPER_NOTE}\n"
    file_io.write_bytes(file_io.join(folder, "table.txt"), f"{render_text(table)}\n{note}".encode())
    with tempfile.TemporaryDirectory() as scratch:
        draw_table(table, os.path.join(scratch, "table.png"))
        if curves:
            path = os.path.join(scratch, "curves.png")
            run_plots.plot_curves(curves, "Validation error of the members", "epoch", "top-1 error, %", path)
        for name in sorted(os.listdir(scratch)):
            with open(os.path.join(scratch, name), "rb") as file:
                file_io.write_bytes(file_io.join(folder, name), file.read())


def _build_row(cell: Cell, base: Cell) -> tuple[str, ...]:
    paper = (cell.paper_top5, base.paper_top5)
    return (
        f"{cell.models} {cell.crops}",
        str(cell.cost),
        f"{cell.top1_error:.2f}",
        "{:.2f} - {:.2f}".format(*cell.top1_interval),
        "base" if cell is base else f"{cell.top1_error - base.top1_error:+.2f}",
        f"{cell.top5_error:.2f}",
        "{:.2f} - {:.2f}".format(*cell.top5_interval),
        "base" if cell is base else f"{cell.top5_error - base.top5_error:+.2f}",
        "-" if paper[0] is None else f"{paper[0]:.2f}",
        "base" if cell is base else "-" if paper[0] is None or paper[1] is None else f"{paper[0] - paper[1]:+.2f}",
    )
