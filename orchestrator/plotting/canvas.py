"""The canvas that the report's plots share: one drawing, saved as a PNG and as an SVG whose colours follow the page."""

from __future__ import annotations

import io
import re
import threading
import warnings
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID, SURFACE = "#1f2328", "#656d77", "#d8dee5", "#fefefe"
# Okabe and Ito's colours, told apart by colour-blind readers too; the pale yellow and the black are replaced.
SERIES_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d46")
DASHES = ("solid", "dashed", "dotted", "dashdot")
DPI = 150
# The page's names of these colours: the template gives each a value for a light and for a dark screen.
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface"} | {
    colour: f"--series-{number}" for number, colour in enumerate(SERIES_COLORS, 1)
}
MAX_LABEL_CHARS = 36  # characters of a name in a plot

_warning_lock = threading.Lock()


def create_panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes side by side, in inches, without a background of its own."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04))
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, count, number + 1) for number in range(count)]


def label_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Name an axes' parts, and give all of it the page's colours."""
    axes.set_title(title, color=INK, fontsize=10.5, loc="left")
    axes.set_xlabel(x_label, color=MUTED, fontsize=9.5)
    axes.set_ylabel(y_label, color=MUTED, fontsize=9.5)
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    """The legend of what the axes show, below all axes of the figure, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK)


def escape_label(name: str) -> str:
    """A name as matplotlib shows it letter by letter, shortened: a dollar sign would begin a formula."""
    short = name if len(name) <= MAX_LABEL_CHARS else name[: MAX_LABEL_CHARS - 3].rstrip() + "..."
    return short.replace("$", r"\$")


def render_png(figure: Figure, title: str) -> bytes:
    """The figure under its title, on white. Call it after `svg`: the title stays."""
    figure.suptitle(title, color=INK, fontsize=12)
    return _save_figure(figure, "png", facecolor="white", pil_kwargs={"compress_level": 3})


def render_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page, its identifiers led by `name`, its colours the page's variables."""
    text = _save_figure(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Comments repeat the text of labels, of unknown content; what is seen is the outlines of its letters.
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would be the whole page's
    # All SVGs of a page share its identifiers.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(f"fill: {colour}", f"fill: var({variable})")
        text = text.replace(f"stroke: {colour}", f"stroke: var({variable})")
    # In a page, SVG needs no namespaces; without them nothing in the file looks like an address.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    return re.sub(
        r'<svg\s[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg class="plot plot-{name}" aria-hidden="true" \1>', text, count=1
    )


def _save_figure(figure: Figure, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    # Names may hold letters that the font lacks; boxes stand for them, the report's tables have them right.
    with _warning_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=form, dpi=DPI, **options)
    return buffer.getvalue()
