"""The report of an ensemble: one self-contained HTML file, its tables in Markdown and JSON, and the plots."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.ensemble.report import ensemble_plots, sections, table_files, wording
from orchestrator.ensemble.report.ensemble_plots import ErrorCurves
from orchestrator.ensemble.report.sections import Section
from orchestrator.evaluation.analysis_results import Analysis
from orchestrator.plotting.canvas import Plot
from orchestrator.plotting.report_format import escape_markdown, format_markdown_table, render_page, write_report_files

HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"


def write_report(
    folder: str, about: Mapping[str, object], analysis: Analysis, curves: ErrorCurves, pictures: Mapping[int, bytes]
) -> None:
    """Write report.html, report.md, table.json, table.md, table.txt and a PNG of each plot below `folder` (a URL).

    about: what the result is of, as `result_writer` describes it; unknown entries are listed as they are. curves: by
    run, pairs of epoch and validation error in percent. pictures: JPEG or PNG files of mistakes by their number in the
    split; absent ones are skipped. Raises StorageError.
    """
    plots = ensemble_plots.draw_plots(analysis, curves)
    content = {f"{plot.name}.png": plot.png for plot in plots.values()}
    content |= table_files.build_files(analysis.table, about)
    content[MARKDOWN_FILE] = render_markdown(about, analysis).encode()
    content[HTML_FILE] = render_html(about, analysis, plots, pictures).encode()
    write_report_files(folder, content, ensemble_plots.PLOT_NAMES)


def render_html(
    about: Mapping[str, object], analysis: Analysis, plots: Mapping[str, Plot], pictures: Mapping[int, bytes]
) -> str:
    """Return the page."""
    members = len(analysis.member_names)
    return render_page(
        "orchestrator.ensemble",
        "report.html.jinja",
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
    """Return the sections of the page, in order."""
    built = (
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
    return [section for section in built if section is not None]


def render_markdown(about: Mapping[str, object], analysis: Analysis) -> str:
    """Return title, warnings, headline, Table 3 with the paper's figures, and what it is computed from."""
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
    parts += [format_markdown_table(("computed from", ""), facts.rows)]
    return "\n\n".join(parts)
