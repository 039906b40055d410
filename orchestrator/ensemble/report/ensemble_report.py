"""The report of an ensemble: one HTML file that needs no other, its tables in Markdown, its plots as files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jinja2

from orchestrator.ensemble.report import ensemble_plots, sections, table_files, wording
from orchestrator.ensemble.report.ensemble_plots import ErrorCurves, Plot
from orchestrator.ensemble.report.sections import Section, TextTable
from orchestrator.evaluation.analysis_results import Analysis
from orchestrator.storage import file_io

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
_TEMPLATE = "report.html.jinja"

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("orchestrator.ensemble"),
    autoescape=True,  # names of classes may hold anything
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    folder: str, about: Mapping[str, object], analysis: Analysis, curves: ErrorCurves, pictures: Mapping[int, bytes]
) -> None:
    """Write report.html, report.md and a PNG of each plot below `folder` (a URL).

    about: what the result is of, as recorded.record says it; entries that the report does not know are listed as they
    are. curves: by run, epochs and validation errors in percent. pictures: JPEG or PNG files of mistakes by their
    number in the split; those that are absent are skipped. Raises StorageError.
    """
    plots = ensemble_plots.draw_plots(analysis, curves)
    content = {f"{plot.name}.png": plot.png for plot in plots.values() if plot.png}
    content[MARKDOWN_FILE] = render_markdown(about, analysis).encode()
    content[HTML_FILE] = render_html(about, analysis, plots, pictures).encode()
    _remove_stale_plots(folder, content)
    for name, data in content.items():
        file_io.write_bytes(file_io.join(folder, name), data)


def render_html(
    about: Mapping[str, object], analysis: Analysis, plots: Mapping[str, Plot], pictures: Mapping[int, bytes]
) -> str:
    """The page."""
    members = len(analysis.member_names)
    return _environment.get_template(_TEMPLATE).render(
        title=str(about.get("ensemble", "ensemble")),
        members=members,
        partial=wording.describe_partial(about, members),
        warnings=list(wording.compose_warnings(about, members)),
        headline=wording.compose_headline(analysis),
        tiles=wording.build_tiles(analysis),
        sections=build_sections(about, analysis, pictures),
        plots=plots,
    )


def build_sections(about: Mapping[str, object], analysis: Analysis, pictures: Mapping[int, bytes]) -> list[Section]:
    """What the page holds, in its order."""
    found = (
        sections.build_table_section(analysis),
        sections.build_sizes_section(analysis),
        sections.build_members_section(analysis),
        sections.build_diversity_section(analysis),
        sections.build_crops_section(analysis, about),
        sections.build_averaging_section(analysis),
        sections.build_calibration_section(analysis),
        sections.build_classes_section(analysis),
        sections.build_mistakes_section(analysis, pictures),
        sections.build_sources_section(analysis, about),
    )
    return [section for section in found if section is not None]


def _remove_stale_plots(folder: str, content: Mapping[str, bytes]) -> None:
    """Remove plots of an earlier result that this one does not have."""
    there = set(file_io.list_names(folder))
    for name in ensemble_plots.PLOT_NAMES:
        if f"{name}.png" in there - set(content):
            file_io.remove(file_io.join(folder, f"{name}.png"))


def render_markdown(about: Mapping[str, object], analysis: Analysis) -> str:
    """Title, what to beware of, headline, Table 3 with the paper's figures, and what it is computed from."""
    members = len(analysis.member_names)
    title = str(about.get("ensemble", "ensemble"))
    if partial := wording.describe_partial(about, members):
        title += f" ({partial})"
    parts = [f"# {escape_markdown(title)}"]
    parts += [f"**{escape_markdown(warning)}**" for warning in wording.compose_warnings(about, members)]
    parts += ["\n".join(escape_markdown(sentence) for sentence in wording.compose_headline(analysis))]
    parts += [table_files.render_markdown(analysis.table).rstrip()]
    parts += [
        "Cost is in forward passes of each image; differences (vs) are in points of error to 1 model and 1 crop, and "
        "intervals are bootstrap intervals over images."
    ]
    facts = sections.build_sources_section(analysis, about).tables[0]
    parts += [_render_table(TextTable("", ("computed from", ""), facts.rows, 2))]
    return "\n\n".join(parts) + "\n"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: nothing in it ends a cell, marks it up or is HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _render_table(grid: TextTable) -> str:
    lines = ["| " + " | ".join(grid.head) + " |", "|" + " --- |" * len(grid.head)]
    lines += ["| " + " | ".join(escape_markdown(cell) for cell in row) + " |" for row in grid.rows]
    return "\n".join(lines)
