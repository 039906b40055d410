"""The canvas that all plots share: figures, axes, legends, files as PNG or SVG; and the pictures of a run's start.

Any thread may draw: without pyplot, matplotlib has neither a display nor global state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from orchestrator.storage import file_io

INK, MUTED, GRID, SURFACE = "#1f2328", "#656d77", "#d8dee5", "#fefefe"
# Okabe and Ito's colours, which colour-blind readers tell apart; the pale yellow and the black are replaced.
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d46")
DASHES = ("solid", "dashed", "dotted", "dashdot")
# Variables of the page's style sheet: the template gives each a value for a light and for a dark screen.
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES_COLORS, 1)
}
DPI = 150
MAX_LABEL_CHARS = 36  # characters of a name in a plot
_CELL, _CAPTION = 1.15, 1.5  # inches

# The font may lack letters of a name: the plot then shows boxes, the report's tables the letters.
warnings.filterwarnings("ignore", message="Glyph .* missing from")


@dataclass(frozen=True)
class Plot:
    """A plot of a report: its title, a sentence on how to read it, and its files."""

    name: str
    title: str
    png: bytes
    note: str = ""
    svg: str = ""  # an element for a page


def create_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of `columns` axes side by side, in inches, without a background of its own."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04))
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def label_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Set the title and the labels of axes, and their colours."""
    axes.set_title(title, color=INK, fontsize=10.5, loc="left")
    axes.set_xlabel(x_label, color=MUTED, fontsize=9.5)
    axes.set_ylabel(y_label, color=MUTED, fontsize=9.5)
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set(visible=False, color=GRID)
    axes.spines["bottom"].set_visible(True)


def add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Add the legend of the axes, if it has entries, below all axes of the figure, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
        )


def annotate_values(
    axes: Axes, values: Sequence[float], places: Sequence[float], offset: tuple[float, float], form: str, **style: Any
) -> None:
    """Write each value beside its point (value, place), `offset` points away."""
    for value, place in zip(values, places, strict=True):
        text = format(value, form)
        axes.annotate(text, (value, place), offset, textcoords="offset points", **{"fontsize": 9, **style})


def escape_label(name: str) -> str:
    """Return a name, shortened, that matplotlib shows as it is: a dollar sign would begin a formula."""
    short = name if len(name) <= MAX_LABEL_CHARS else name[: MAX_LABEL_CHARS - 3].rstrip() + "..."
    return short.replace("$", r"\$")


def render_png(figure: Figure, title: str) -> bytes:
    """Return the figure as a PNG, under its title, on white. Call it after `render_svg`: the title stays."""
    figure.suptitle(title, color=INK, fontsize=12)
    # Photographs hardly get smaller with a higher level, which takes twice as long.
    return _save_figure(figure, "png", facecolor="white", pil_kwargs={"compress_level": 3})


def render_svg(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element; its identifiers begin with `name`, its colours are the page's variables."""
    text = _save_figure(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    # Comments repeat the text of labels, which may hold anything; the visible letters are outlines. A style would apply
    # to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    # All SVGs of a page share one set of identifiers.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in CSS_VARIABLES.items():
        text = text.replace(f"fill: {color}", f"fill: var({variable})")
        text = text.replace(f"stroke: {color}", f"stroke: var({variable})")
    # In a page, SVG needs no namespaces; without them nothing in the file looks like an address.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    return re.sub(
        r'<svg\s[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg class="plot plot-{name}" aria-hidden="true" \1>', text, count=1
    )


def plot_lr_schedule(rates: Sequence[tuple[float, float]], samples_per_epoch: int, title: str, path: str) -> None:
    """Draw learning rates, at least one pair of epochs done and rate, over a whole training into a PNG at `path`."""
    figure, (axes,) = create_figure(9.0, 4.5)
    label_axes(axes, "", "epochs done", "learning rate")
    # A rate holds for a whole step: no slopes where it jumps.
    axes.plot(*zip(*rates, strict=True), color=SERIES_COLORS[0], linewidth=1.6, drawstyle="steps-post")
    axes.set_xlim(0.0, max(epochs for epochs, _ in rates))
    axes.set_ylim(bottom=0.0)
    to_samples = (lambda x: np.multiply(x, samples_per_epoch), lambda x: np.divide(x, samples_per_epoch))
    samples = axes.secondary_xaxis("top", functions=to_samples)
    samples.xaxis.set_major_formatter(EngFormatter(sep=""))
    samples.set_xlabel("samples seen", color=MUTED)
    samples.tick_params(colors=MUTED)
    file_io.write_bytes(path, render_png(figure, title))


def draw_contact_sheet(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], columns: Sequence[str], title: str, path: str
) -> None:
    """Draw a grid of images, each H x W x 3 uint8 of any size, into a PNG at `path`.

    rows: at least one, a caption and an image for each of the columns. columns: their captions.
    """
    figure, (axes,) = create_figure(_CELL * len(columns) + _CAPTION, _CELL * len(rows) + 0.9)
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            height, width = image.shape[:2]
            # In units of a cell; the rest of it is the gap between images.
            across, down = (0.47 * side / max(height, width) for side in (width, height))
            axes.imshow(image, extent=(column - across, column + across, row + down, row - down))
    # A line separates the original, in the first column, from the rest.
    axes.axvline(0.5, color=MUTED, linewidth=1.0)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(rows)), [caption for caption, _ in rows])
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, labelsize=9)
    axes.spines[:].set_visible(False)
    file_io.write_bytes(path, render_png(figure, title))


def _save_figure(figure: Figure, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=DPI, **options)
    return buffer.getvalue()
