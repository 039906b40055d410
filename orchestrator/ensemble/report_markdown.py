"""The result in Markdown, for a README: the sentences, the table, what it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping

from orchestrator.ensemble import report_sections, report_text, results
from orchestrator.ensemble.report_grid import Grid
from orchestrator.evaluation.findings import Analysis


def markdown(about: Mapping[str, object], analysis: Analysis) -> str:
    """Title, what to beware of, headline, Table 3 with the paper's figures, and what it is computed from."""
    members = len(analysis.member_names)
    title = str(about.get("ensemble", "ensemble"))
    if partial := report_text.partial(about, members):
        title += f" ({partial})"
    parts = [f"# {escaped(title)}"]
    parts += [f"**{escaped(warning)}**" for warning in report_text.warnings(about, members)]
    parts += ["\n".join(escaped(sentence) for sentence in report_text.headline(analysis))]
    parts += [results.markdown(analysis.table).rstrip()]
    parts += [
        "Cost is in forward passes of each image; differences (vs) are in points of error to 1 model and 1 crop, and "
        "intervals are bootstrap intervals over images."
    ]
    facts = report_sections.sources(analysis, about).grids[0]
    parts += [_grid(Grid("", ("computed from", ""), facts.rows, 2))]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: nothing in it ends a cell, marks it up or is HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _grid(grid: Grid) -> str:
    lines = ["| " + " | ".join(grid.head) + " |", "|" + " --- |" * len(grid.head)]
    lines += ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in grid.rows]
    return "\n".join(lines)
