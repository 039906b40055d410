"""Pages, tables and files of the reports of ensembles and sweeps."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache

import jinja2

from orchestrator.storage import file_io

TextRow = tuple[str, ...]


def render_page(package: str, template: str, **values: object) -> str:
    """Return the page that a template in the folder `templates` of a package gives for these values."""
    return _get_environment(package).get_template(template).render(values)


@cache
def _get_environment(package: str) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,  # names and reasons may hold anything
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def format_count(count: int, noun: str) -> str:
    """Return a number of things, as in "1 epoch" and "1,000 epochs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def escape_markdown(text: str) -> str:
    """Return text as one line that Markdown shows as it is: nothing in it ends a cell, is markup or HTML."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


def format_markdown_table(head: TextRow, rows: Sequence[TextRow], right: Collection[int] = ()) -> str:
    """Return a table in Markdown; `right` are the columns, from 0, that are aligned to the right."""
    rule = "|" + "".join(f" {'---:' if column in right else '---'} |" for column in range(len(head)))
    lines = ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def format_text_table(rows: Sequence[TextRow], left: Collection[int]) -> list[str]:
    """Return the lines of a plain table, all equally long; `left` are the columns, from 0, aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def write_report_files(folder: str, content: Mapping[str, bytes], plot_names: Sequence[str]) -> None:
    """Write the files of a report below a URL; remove those of `plot_names` (without .png) that it lacks."""
    for name in {f"{plot}.png" for plot in plot_names} - content.keys():
        file_io.remove(file_io.join(folder, name))
    for name, data in content.items():
        file_io.write_bytes(file_io.join(folder, name), data)
