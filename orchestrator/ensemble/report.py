"""The report of an ensemble: one HTML file that needs no other, its tables in Markdown, its plots as files."""

from __future__ import annotations

from collections.abc import Mapping

import jinja2

from orchestrator.ensemble import report_markdown, report_mistakes, report_plots, report_sections, report_text
from orchestrator.ensemble.report_grid import Section
from orchestrator.ensemble.report_plots import Curves, Plot
from orchestrator.evaluation.findings import Analysis
from orchestrator.storage import files

HTML, MARKDOWN = "report.html", "report.md"
_TEMPLATE = "report.html.jinja"

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("orchestrator.ensemble"),
    autoescape=True,  # names of classes may hold anything
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write(
    folder: str, about: Mapping[str, object], analysis: Analysis, curves: Curves, pictures: Mapping[int, bytes]
) -> None:
    """Write report.html, report.md and a PNG of each plot below `folder` (a URL).

    about: what the result is of, as recorded.record says it; entries that the report does not know are listed as they
    are. curves: by run, epochs and validation errors in percent. pictures: JPEG or PNG files of mistakes by their
    number in the split; those that are absent are skipped. Raises StorageError.
    """
    plots = report_plots.plots(analysis, curves)
    content = {f"{plot.name}.png": plot.png for plot in plots.values() if plot.png}
    content[MARKDOWN] = report_markdown.markdown(about, analysis).encode()
    content[HTML] = html(about, analysis, plots, pictures).encode()
    _remove_stale(folder, content)
    for name, data in content.items():
        files.write_bytes(files.join(folder, name), data)


def html(
    about: Mapping[str, object], analysis: Analysis, plots: Mapping[str, Plot], pictures: Mapping[int, bytes]
) -> str:
    """The page."""
    members = len(analysis.member_names)
    return _environment.get_template(_TEMPLATE).render(
        title=str(about.get("ensemble", "ensemble")),
        members=members,
        partial=report_text.partial(about, members),
        warnings=list(report_text.warnings(about, members)),
        headline=report_text.headline(analysis),
        tiles=report_text.tiles(analysis),
        sections=sections(about, analysis, pictures),
        plots=plots,
    )


def sections(about: Mapping[str, object], analysis: Analysis, pictures: Mapping[int, bytes]) -> list[Section]:
    """What the page holds, in its order."""
    found = (
        report_sections.table(analysis),
        report_sections.sizes(analysis),
        report_sections.members(analysis),
        report_sections.diversity(analysis),
        report_sections.crops(analysis, about),
        report_sections.averaging(analysis),
        report_mistakes.calibration(analysis),
        report_mistakes.classes(analysis),
        report_mistakes.mistakes(analysis, pictures),
        report_sections.sources(analysis, about),
    )
    return [section for section in found if section is not None]


def _remove_stale(folder: str, content: Mapping[str, bytes]) -> None:
    """Remove plots of an earlier result that this one does not have."""
    there = set(files.list_names(folder))
    for name in report_plots.FILES:
        if f"{name}.png" in there - set(content):
            files.remove(files.join(folder, f"{name}.png"))
