"""The canvas that the plots of a sweep share: figures as PNG files, colours of states and of scores."""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from orchestrator.tuning.searched import LONGEST, is_log
from orchestrator.tuning.trials import State

INK, MUTED, GRID, NONE = "#1f2328", "#5b636c", "#d8dee5", "#9aa3ac"
DPI = 150
WINNER_WIDTH = 3.2  # points
# Okabe and Ito's colours, told apart by colour-blind readers too, each with a marker of its own.
STATES: dict[State, tuple[str, str]] = {
    "finished": ("#0072b2", "o"),
    "pruned": ("#e69f00", "v"),
    "stopped": ("#009e73", "s"),
    "running": ("#56b4e9", ">"),
    "diverged": ("#d55e00", "X"),
    "failed": ("#000000", "P"),
    "waiting": (NONE, "."),
}
# Where scores reach far up, as of trials that never learnt, the colours tell the better ones apart.
_COLOURED_SHARE = 0.85

Colour = str | tuple[float, float, float, float]

_warning_lock = threading.Lock()


class Scores:
    """Colours of scores in percent, darker for better; `clipped` where the worst share the palest colour."""

    def __init__(self, scores: Sequence[float]) -> None:
        ordered = sorted(scores) or [0.0, 1.0]
        low, high = ordered[0], ordered[-1]
        most = ordered[math.ceil(_COLOURED_SHARE * (len(ordered) - 1))]
        self.clipped = most > low and high - low > 2 * (most - low)
        high = most if self.clipped else high
        if high <= low:
            high = low + 1.0  # one colour for all
        self.log = is_log([low, high])
        # The end of viridis is too pale on white.
        colours = ListedColormap([colormaps["viridis"](0.9 * step / 255) for step in range(256)])
        norm = LogNorm(low, high) if self.log else Normalize(low, high)
        self.mappable = ScalarMappable(norm, colours)

    def colour(self, score: float | None) -> Colour:
        """Of a trial with this score; grey without one."""
        if score is None:
            return NONE
        red, green, blue, opacity = self.mappable.to_rgba(np.array([score]))[0]
        return float(red), float(green), float(blue), float(opacity)

    def bar(self, figure: Figure, axes: Axes, name: str) -> None:
        """A colour bar at the right of the axes."""
        bar = figure.colorbar(self.mappable, ax=axes, extend="max" if self.clipped else "neither", pad=0.02, aspect=30)
        bar.set_label(name, color=MUTED, fontsize=9.5)
        if self.log:
            _plain_log(bar.ax)
        bar.ax.tick_params(colors=MUTED, labelsize=9)
        bar.outline.set_visible(False)


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one axes, in inches."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(1, 1, 1)


def label(axes: Axes, x_label: str, y_label: str) -> None:
    """Name an axes' sides and make all but its data quiet."""
    axes.set_xlabel(x_label, color=MUTED, fontsize=9.5)
    axes.set_ylabel(y_label, color=MUTED, fontsize=9.5)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def log_errors(axes: Axes, scores: Sequence[float]) -> None:
    """Give errors a logarithmic axis where they reach over more than a decade, with plain numbers."""
    if is_log(scores):
        axes.set_yscale("log")
        _plain_log(axes)


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """What the axes show, below all of the figure, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
        )


def halo(width: float) -> list[Stroke]:
    """A white rim around a line or letters, so that they stand out from what is below."""
    return [withStroke(linewidth=width, foreground="white")]


def plain(words: str) -> str:
    """Text that matplotlib shows letter by letter, shortened: a dollar sign would begin a formula."""
    short = words if len(words) <= LONGEST else words[: LONGEST - 3] + "..."
    return short.replace("$", r"\$")


def line(colour: Colour, strong: bool, trials: int) -> dict[str, Any]:
    """How the line of one of so many trials is drawn; a strong one is the winner's."""
    if strong:
        return {"color": colour, "linewidth": WINNER_WIDTH, "alpha": 1.0, "zorder": 4, "path_effects": halo(4.6)}
    return {"color": colour, "linewidth": 1.3, "alpha": max(0.4, min(0.95, 1.1 - 0.01 * trials)), "zorder": 2}


def png(figure: Figure, title: str) -> bytes:
    """The figure under its title, on white."""
    figure.suptitle(title, color=INK, fontsize=12)
    buffer = io.BytesIO()
    # Names may hold letters that the font lacks; boxes stand for them, the report's tables have them right.
    with _warning_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def _plain_log(axes: Axes) -> None:
    """5 and 20 instead of powers of ten, on an upright logarithmic axis."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
