"""The plots of a sweep. Only drivers import this file: matplotlib is heavy."""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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

from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.tuning import parallel
from orchestrator.tuning.param_axes import MAX_VALUE_CHARS, is_log, make_short_names
from orchestrator.tuning.ranking import METRIC_NAMES, find_winner
from orchestrator.tuning.trial import MetricName, State, Trial

PLOT_NAMES = ("errors", "budget", "rates", "parallel", "importance")
_CURVE_POINTS = 800  # of a schedule's curve
_MAX_DECADES = 2.0  # that a logarithmic axis of rates reaches below the least of their peaks: many fall to 0


@dataclass(frozen=True)
class Plot:
    """A plot: its title, a sentence on how to read it, and its PNG file."""

    name: str
    title: str
    note: str
    png: bytes


def draw_plots(trials: Sequence[Trial], metric: MetricName, shares: Mapping[str, float] | None) -> dict[str, Plot]:
    """Every plot that there is something to draw for, by its name, which is one of FILES.

    shares: the importance of the searched paths, None where it is not known.
    """
    trained = [trial for trial in trials if trial.trained_epochs]
    validated = any(math.isfinite(error) for trial in trials for _, error in trial.get_curve(metric))
    searched = any(trial.assignment for trial in trained)
    drawn: list[tuple[str, str, str, Callable[[], Figure], bool]] = [
        (
            "errors",
            "Validation error of every trial",
            "A marker stands where a trial ended.",
            lambda: draw_errors(trials, metric),
            validated,
        ),
        (
            "budget",
            "Error against the budget",
            "A point is a trial where it ended. Trials stand in the order of their numbers; many ran side by side.",
            lambda: draw_budget(trials, metric),
            bool(trained),
        ),
        (
            "rates",
            "Learning rates that were tried",
            "Faint: what would have followed in trials that were ended.",
            lambda: draw_rates(trials, metric),
            bool(trained),
        ),
        (
            "parallel",
            "What was tried, and what came of it",
            parallel.format_note(trained, metric, shares),
            lambda: parallel.draw_parallel_coordinates(trained, metric, shares),
            searched,
        ),
        ("importance", "What the score hangs on", "", lambda: draw_importance(shares or {}), bool(shares)),
    ]
    return {
        name: Plot(name, title, note, render_png(draw(), title)) for name, title, note, draw, wanted in drawn if wanted
    }


def draw_rates(trials: Sequence[Trial], metric: MetricName) -> Figure:
    """The learning rate of each trial that was trained, over all its epochs, coloured by its score."""
    figure, axes = create_figure(9.0, 4.6)
    best, scores = find_winner(trials, metric), _make_score_colors(trials, metric)
    label_axes(axes, "epoch", "learning rate")
    peaks = []
    shown = [trial for trial in trials if trial.trained_epochs]
    for trial in _sort_winner_last(shown, best):
        epochs = trial.recipe.epochs
        done = np.linspace(0.0, float(epochs), _CURVE_POINTS + 1)
        # Just before the end: what a step there would lead to is never used.
        at = np.minimum(done, epochs - 1e-6)
        curve = np.array([compute_lr(trial.recipe.schedule, float(one), 1.0, epochs) for one in at])
        curve[curve <= 0] = math.nan  # a logarithmic axis has no 0
        peaks.append(float(np.nanmax(curve)))
        style = make_line_style(scores.get_color(trial.get_score(metric)), trial is best, len(shown))
        so_far = done <= trial.trained_epochs
        axes.plot(done[so_far], curve[so_far], **style)
        # From where the other ends, so that no gap is left.
        rest = done >= done[so_far][-1]
        axes.plot(done[rest], curve[rest], **{**style, "alpha": 0.22, "linewidth": 1.0, "path_effects": None})
    if is_log(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 10**_MAX_DECADES)
    else:
        axes.set_ylim(bottom=0.0)
    axes.set_xlim(0.0, max(trial.recipe.epochs for trial in shown))
    _add_score_bar(figure, axes, scores, trials, metric)
    _add_line_legend(figure, axes, best, any(trial.get_score(metric) is None for trial in shown))
    return figure


def draw_errors(trials: Sequence[Trial], metric: MetricName) -> Figure:
    """The validation error of each trial against the epoch, coloured by its state."""
    figure, axes = create_figure(9.0, 4.6)
    best = find_winner(trials, metric)
    label_axes(axes, "epoch", f"{METRIC_NAMES[metric]}, %")
    shown = [trial for trial in trials if trial.get_curve(metric)]
    for trial in _sort_winner_last(shown, best):
        curve = trial.get_curve(metric)
        xs = [epoch for epoch, _ in curve]
        ys = [error if math.isfinite(error) else math.nan for _, error in curve]
        colour, marker = STATE_STYLES[trial.state]
        style = make_line_style(colour, trial is best, len(shown))
        axes.plot(xs, ys, **style)
        ends = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if ends:
            axes.plot(
                *ends[-1],
                marker=marker,
                markersize=6,
                color=colour,
                linestyle="none",
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=style["zorder"] + 0.5,
            )
    set_error_scale(axes, [error for trial in shown for _, error in trial.get_curve(metric) if math.isfinite(error)])
    axes.set_xlim(left=0.0)
    _add_state_legend(figure, axes, shown, best, "solid")
    return figure


def draw_budget(trials: Sequence[Trial], metric: MetricName) -> Figure:
    """Each trial's last error, and the best finished one's so far, against the epochs trained in the whole sweep."""
    figure, axes = create_figure(9.0, 4.2)
    best = find_winner(trials, metric)
    label_axes(axes, "epochs trained by all trials so far", f"{METRIC_NAMES[metric]}, %")
    shown = [trial for trial in sorted(trials, key=lambda one: one.number) if trial.trained_epochs]
    spent = 0
    steps: list[tuple[int, float]] = []
    scored = []
    for trial in shown:
        spent += trial.trained_epochs
        score = trial.get_score(metric)
        colour, marker = STATE_STYLES[trial.state]
        if score is None:
            # At the upper edge: it has no error, and none is worse.
            axes.plot(
                spent,
                1.0,
                marker=marker,
                markersize=7,
                color=colour,
                linestyle="none",
                clip_on=False,
                markeredgecolor="white",
                markeredgewidth=0.6,
                transform=axes.get_xaxis_transform(),
            )
            continue
        scored.append(score)
        axes.plot(
            spent,
            score,
            marker=marker,
            markersize=7,
            color=colour,
            linestyle="none",
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3,
        )
        if trial.state == "finished":
            steps.append((spent, min(score, steps[-1][1]) if steps else score))
    if steps:
        axes.plot(
            *zip(*steps, (spent, steps[-1][1]), strict=True),
            drawstyle="steps-post",
            color=INK,
            linewidth=1.6,
            label="best finished so far",
            zorder=2,
        )
    set_error_scale(axes, scored)
    axes.set_xlim(0.0, 1.03 * spent)
    _add_state_legend(figure, axes, shown, None, "none")
    if best is not None:
        place = sum(trial.trained_epochs for trial in shown if trial.number <= best.number)
        axes.annotate(
            best.name,
            (place, best.get_score(metric) or 0.0),
            (0, -14),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
            path_effects=make_halo(3),
        )
        axes.margins(y=0.12)
    return figure


def draw_importance(shares: Mapping[str, float]) -> Figure:
    """The importance of each searched path, in percent."""
    figure, axes = create_figure(9.0, 0.34 * len(shares) + 1.1)
    label_axes(axes, "share of the importance, %", "")
    names = make_short_names(shares)
    places = list(range(len(shares)))
    values = [100 * share for share in shares.values()]
    axes.barh(places, values, height=0.62, color=STATE_STYLES["finished"][0])
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:.0f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9, color=MUTED
        )
    axes.set_yticks(places, [escape_label(names[path]) for path in shares], color=INK)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.08 * max(values))
    axes.grid(axis="y", visible=False)
    return figure


def _make_score_colors(trials: Iterable[Trial], metric: MetricName) -> ScoreColors:
    return ScoreColors([score for trial in trials if (score := trial.get_score(metric)) is not None])


def _add_score_bar(
    figure: Figure, axes: Axes, scores: ScoreColors, trials: Sequence[Trial], metric: MetricName
) -> None:
    if len({trial.get_score(metric) for trial in trials} - {None}) > 1:
        scores.add_color_bar(figure, axes, f"last {METRIC_NAMES[metric]}, %")


def _sort_winner_last(trials: Sequence[Trial], best: Trial | None) -> list[Trial]:
    """In the order of drawing: the winner hides others, not they it."""
    return sorted(trials, key=lambda trial: trial is best)


def _add_line_legend(figure: Figure, axes: Axes, best: Trial | None, some_unscored: bool) -> None:
    """Say below what a bold line is, and a grey one."""
    if best is not None:
        axes.plot([], [], color=INK, linewidth=WINNER_LINE_WIDTH, label=f"{best.name}, the winner")
    if some_unscored:
        axes.plot([], [], color=UNSCORED_COLOR, linewidth=1.3, label="without a score")
    add_legend(figure, axes, 2)


def _add_state_legend(figure: Figure, axes: Axes, trials: Sequence[Trial], best: Trial | None, style: str) -> None:
    """Say below what the colours and markers are, and how many trials there are of each."""
    if best is not None:
        axes.plot(
            [], [], color=STATE_STYLES[best.state][0], linewidth=WINNER_LINE_WIDTH, label=f"{best.name}, the winner"
        )
    for state, (colour, marker) in STATE_STYLES.items():
        if count := sum(trial.state == state for trial in trials):
            axes.plot([], [], color=colour, marker=marker, linewidth=1.3, linestyle=style, label=f"{state} ({count})")
    add_legend(figure, axes, 6)


INK, MUTED, GRID, UNSCORED_COLOR = "#1f2328", "#5b636c", "#d8dee5", "#9aa3ac"
DPI = 150
WINNER_LINE_WIDTH = 3.2  # points
# Okabe and Ito's colours, told apart by colour-blind readers too, each with a marker of its own.
STATE_STYLES: dict[State, tuple[str, str]] = {
    "finished": ("#0072b2", "o"),
    "pruned": ("#e69f00", "v"),
    "stopped": ("#009e73", "s"),
    "running": ("#56b4e9", ">"),
    "diverged": ("#d55e00", "X"),
    "failed": ("#000000", "P"),
    "waiting": (UNSCORED_COLOR, "."),
}
# Where scores reach far up, as of trials that never learnt, the colours tell the better ones apart.
_COLORED_SHARE = 0.85

Color = str | tuple[float, float, float, float]

_warning_lock = threading.Lock()


class ScoreColors:
    """Colours of scores in percent, darker for better; `clipped` where the worst share the palest colour."""

    def __init__(self, scores: Sequence[float]) -> None:
        ordered = sorted(scores) or [0.0, 1.0]
        low, high = ordered[0], ordered[-1]
        most = ordered[math.ceil(_COLORED_SHARE * (len(ordered) - 1))]
        self.is_clipped = most > low and high - low > 2 * (most - low)
        high = most if self.is_clipped else high
        if high <= low:
            high = low + 1.0  # one colour for all
        self.is_log_scale = is_log([low, high])
        # The end of viridis is too pale on white.
        colours = ListedColormap([colormaps["viridis"](0.9 * step / 255) for step in range(256)])
        norm = LogNorm(low, high) if self.is_log_scale else Normalize(low, high)
        self.mappable = ScalarMappable(norm, colours)

    def get_color(self, score: float | None) -> Color:
        """Of a trial with this score; grey without one."""
        if score is None:
            return UNSCORED_COLOR
        red, green, blue, opacity = self.mappable.to_rgba(np.array([score]))[0]
        return float(red), float(green), float(blue), float(opacity)

    def add_color_bar(self, figure: Figure, axes: Axes, name: str) -> None:
        """A colour bar at the right of the axes."""
        bar = figure.colorbar(
            self.mappable, ax=axes, extend="max" if self.is_clipped else "neither", pad=0.02, aspect=30
        )
        bar.set_label(name, color=MUTED, fontsize=9.5)
        if self.is_log_scale:
            _set_plain_log_ticks(bar.ax)
        bar.ax.tick_params(colors=MUTED, labelsize=9)
        bar.outline.set_visible(False)


def create_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one axes, in inches."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(1, 1, 1)


def label_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Name an axes' sides and make all but its data quiet."""
    axes.set_xlabel(x_label, color=MUTED, fontsize=9.5)
    axes.set_ylabel(y_label, color=MUTED, fontsize=9.5)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, which="both")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def set_error_scale(axes: Axes, scores: Sequence[float]) -> None:
    """Give errors a logarithmic axis where they reach over more than a decade, with plain numbers."""
    if is_log(scores):
        axes.set_yscale("log")
        _set_plain_log_ticks(axes)


def add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    """What the axes show, below all of the figure, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
        )


def make_halo(width: float) -> list[Stroke]:
    """A white rim around a line or letters, so that they stand out from what is below."""
    return [withStroke(linewidth=width, foreground="white")]


def escape_label(words: str) -> str:
    """Text that matplotlib shows letter by letter, shortened: a dollar sign would begin a formula."""
    short = words if len(words) <= MAX_VALUE_CHARS else words[: MAX_VALUE_CHARS - 3] + "..."
    return short.replace("$", r"\$")


def make_line_style(colour: Color, strong: bool, trials: int) -> dict[str, Any]:
    """How the line of one of so many trials is drawn; a strong one is the winner's."""
    if strong:
        return {
            "color": colour,
            "linewidth": WINNER_LINE_WIDTH,
            "alpha": 1.0,
            "zorder": 4,
            "path_effects": make_halo(4.6),
        }
    return {"color": colour, "linewidth": 1.3, "alpha": max(0.4, min(0.95, 1.1 - 0.01 * trials)), "zorder": 2}


def render_png(figure: Figure, title: str) -> bytes:
    """The figure under its title, on white."""
    figure.suptitle(title, color=INK, fontsize=12)
    buffer = io.BytesIO()
    # Names may hold letters that the font lacks; boxes stand for them, the report's tables have them right.
    with _warning_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def _set_plain_log_ticks(axes: Axes) -> None:
    """5 and 20 instead of powers of ten, on an upright logarithmic axis."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
