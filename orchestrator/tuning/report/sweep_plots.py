"""The plots of a sweep. Only drivers import this file: matplotlib is heavy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import optuna
from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import Stroke, withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from orchestrator.plotting.canvas import (
    INK,
    MUTED,
    Plot,
    add_legend,
    annotate_values,
    create_figure,
    escape_label,
    label_axes,
    render_png,
)
from orchestrator.recipe.lr_schedule import compute_lr
from orchestrator.tuning.importance import build_study
from orchestrator.tuning.param_names import is_log, list_paths, make_short_names
from orchestrator.tuning.ranking import find_winner
from orchestrator.tuning.trial import Metric, State, Trial

PLOT_NAMES = ("errors", "budget", "rates", "parallel", "importance")
UNSCORED_COLOR = "#9aa3ac"
WINNER_LINE_WIDTH = 3.2  # points
MAX_AXES = 9  # of parallel coordinates, besides the score's; labels of more overlap
# Okabe and Ito's colours, which colour-blind readers tell apart, each with a marker of its own.
STATE_STYLES: dict[State, tuple[str, str]] = {
    "finished": ("#0072b2", "o"),
    "pruned": ("#e69f00", "v"),
    "stopped": ("#009e73", "s"),
    "running": ("#56b4e9", ">"),
    "diverged": ("#d55e00", "X"),
    "failed": ("#000000", "P"),
    "waiting": (UNSCORED_COLOR, "."),
}
_MARKER: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.6}
_CURVE_POINTS = 800  # of a schedule's curve
_MAX_DECADES = 2.0  # of a logarithmic axis of rates, below the least of their peaks: many fall to 0
_COLORED_SHARE = 0.85  # of the scores, best first, that get colours of their own when the others are far off

Color = str | tuple[float, float, float, float]


def draw_plots(trials: Sequence[Trial], metric: Metric, shares: Mapping[str, float] | None) -> dict[str, Plot]:
    """Return every plot that there is data for, by name.

    shares: the importance of the searched paths; None when it is unknown.
    """
    trained = [trial for trial in trials if trial.trained_epochs]
    scored = [trial for trial in trained if trial.get_score(metric) is not None]
    validated = any(math.isfinite(score) for trial in trials for _, score in trial.get_curve(metric))
    label, compares = metric.label, any(trial.assignment for trial in scored) and len(scored) > 1
    ended = "A point is a trial where it ended. Trials stand in the order of their numbers; many ran side by side."
    drawn: tuple[tuple[str, str, str, bool, Callable[[], Figure]], ...] = (
        ("errors", f"Validation {'error' if metric.is_error else label} of every trial",
         "A marker stands where a trial ended.", validated, lambda: draw_errors(trials, metric)),
        ("budget", f"{'Error' if metric.is_error else label.capitalize()} against the budget", ended, bool(trained),
         lambda: draw_budget(trials, metric)),
        ("rates", "Learning rates that were tried", "Faint: what would have followed in trials that were ended.",
         bool(trained), lambda: draw_rates(trials, metric)),
        ("parallel", "What was tried, and what came of it", format_parallel_note(scored, metric, shares), compares,
         lambda: draw_parallel_coordinates(scored, metric, shares)),
        ("importance", "Importance of the searched paths", "", bool(shares), lambda: draw_importance(shares or {})),
    )  # fmt: skip
    return {
        name: Plot(name, title, render_png(draw(), title), note)
        for name, title, note, has_data, draw in drawn
        if has_data
    }


def draw_rates(trials: Sequence[Trial], metric: Metric) -> Figure:
    """Draw the learning rate of each trained trial over all its epochs, coloured by its score."""
    figure, (axes,) = create_figure(9.0, 4.6)
    label_axes(axes, "", "epoch", "learning rate")
    best, colors = find_winner(trials, metric), _make_score_colors(trials, metric)
    peaks = []
    trained = [trial for trial in trials if trial.trained_epochs]
    for trial in _sort_winner_last(trained, best):
        epochs = trial.recipe.epochs
        epochs_done = np.linspace(0.0, float(epochs), _CURVE_POINTS + 1)
        # Just before the end: the rate after a step there is never used.
        instants = np.minimum(epochs_done, epochs - 1e-6)
        curve = np.array([compute_lr(trial.recipe.schedule, float(instant), 1.0, epochs) for instant in instants])
        curve[curve <= 0] = math.nan  # a logarithmic axis has no 0
        peaks.append(float(np.nanmax(curve)))
        style = _make_line_style(colors.get_color(trial.get_score(metric)), trial is best, len(trained))
        so_far = epochs_done <= trial.trained_epochs
        axes.plot(epochs_done[so_far], curve[so_far], **style)
        # From the last point of the other line, so that no gap is left.
        rest = epochs_done >= epochs_done[so_far][-1]
        axes.plot(epochs_done[rest], curve[rest], **{**style, "alpha": 0.22, "linewidth": 1.0, "path_effects": None})
    if is_log(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 10**_MAX_DECADES)
    else:
        axes.set_ylim(bottom=0.0)
    axes.set_xlim(0.0, max(trial.recipe.epochs for trial in trained))
    if len({trial.get_score(metric) for trial in trials} - {None}) > 1:
        colors.add_color_bar(figure, axes, f"last {metric.axis_label}")
    if best is not None:
        axes.plot([], [], color=INK, linewidth=WINNER_LINE_WIDTH, label=f"{best.name}, the winner")
    if any(trial.get_score(metric) is None for trial in trained):
        axes.plot([], [], color=UNSCORED_COLOR, linewidth=1.3, label="without a score")
    add_legend(figure, axes, 2)
    return figure


def draw_errors(trials: Sequence[Trial], metric: Metric) -> Figure:
    """Draw the score of each trial against the epoch, coloured by the trial's state."""
    figure, (axes,) = create_figure(9.0, 4.6)
    label_axes(axes, "", "epoch", metric.axis_label)
    best = find_winner(trials, metric)
    validated = [trial for trial in trials if trial.get_curve(metric)]
    for trial in _sort_winner_last(validated, best):
        curve = [(epoch, score if math.isfinite(score) else math.nan) for epoch, score in trial.get_curve(metric)]
        color, marker = STATE_STYLES[trial.state]
        style = _make_line_style(color, trial is best, len(validated))
        axes.plot(*zip(*curve, strict=True), **style)
        finite = [point for point in curve if math.isfinite(point[1])]
        if finite:
            axes.plot(*finite[-1], marker, markersize=6, color=color, zorder=style["zorder"] + 0.5, **_MARKER)
    _set_score_scale(
        axes, [score for trial in validated for _, score in trial.get_curve(metric) if math.isfinite(score)]
    )
    axes.set_xlim(left=0.0)
    _add_state_legend(figure, axes, validated, best, "solid")
    return figure


def draw_budget(trials: Sequence[Trial], metric: Metric) -> Figure:
    """Draw each trial's last score, and the best finished one's so far, against the epochs trained in the sweep."""
    figure, (axes,) = create_figure(9.0, 4.2)
    label_axes(axes, "", "epochs trained by all trials so far", metric.axis_label)
    trained = [trial for trial in sorted(trials, key=lambda trial: trial.number) if trial.trained_epochs]
    spent = 0
    places: dict[int, int] = {}  # by number, the epochs trained when the trial had ended
    best_so_far: list[tuple[int, float]] = []
    for trial in trained:
        spent += trial.trained_epochs
        places[trial.number] = spent
        score = trial.get_score(metric)
        color, marker = STATE_STYLES[trial.state]
        if score is None:
            # At the upper edge, because it has no score.
            edge = axes.get_xaxis_transform()
            axes.plot(spent, 1.0, marker, markersize=7, color=color, clip_on=False, transform=edge, **_MARKER)
            continue
        axes.plot(spent, score, marker, markersize=7, color=color, zorder=3, **_MARKER)
        if trial.state == "finished":
            scores = [score, *(before for _, before in best_so_far[-1:])]
            best_so_far.append((spent, min(scores, key=metric.to_loss)))
    if best_so_far:
        line = (*best_so_far, (spent, best_so_far[-1][1]))
        style: dict[str, Any] = {"drawstyle": "steps-post", "color": INK, "linewidth": 1.6, "zorder": 2}
        axes.plot(*zip(*line, strict=True), label="best finished so far", **style)
    _set_score_scale(axes, [score for trial in trained if (score := trial.get_score(metric)) is not None])
    axes.set_xlim(0.0, 1.03 * spent)
    _add_state_legend(figure, axes, trained, None, "none")
    if (best := find_winner(trials, metric)) is not None:
        point = (places[best.number], best.get_score(metric) or 0.0)
        style = {"ha": "center", "fontsize": 9, "color": INK, "path_effects": _make_halo(3)}
        axes.annotate(best.name, point, (0, -14), textcoords="offset points", **style)
        axes.margins(y=0.12)
    return figure


def draw_parallel_coordinates(scored: Sequence[Trial], metric: Metric, shares: Mapping[str, float] | None) -> Figure:
    """Draw Optuna's parallel coordinates of trials with a score: a line for each through its values to its score."""
    names = make_short_names(list_paths(scored))
    renamed = {path: escape_label(name) for path, name in names.items()}
    study = build_study([(trial, trial.get_score(metric) or 0.0) for trial in scored], metric, renamed)
    before = matplotlib.get_backend()
    pyplot.switch_backend("agg")  # Optuna draws with pyplot, which may open a window
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            axes = optuna.visualization.matplotlib.plot_parallel_coordinate(
                study, [renamed[path] for path in _select_paths(names, shares)], target_name=metric.axis_label
            )
        figure = axes.get_figure(root=True)
        assert isinstance(figure, Figure)
        pyplot.close(figure)
    finally:
        pyplot.switch_backend(before)
    axes.set_title("")
    axes.tick_params(axis="x", labelsize=9)
    figure.set_size_inches(max(8.0, 1.35 * len(names) + 2.0), 5.2)
    figure.set_layout_engine("tight")
    return figure


def format_parallel_note(scored: Sequence[Trial], metric: Metric, shares: Mapping[str, float] | None) -> str:
    """Return how to read the parallel coordinates, and which paths they leave out."""
    paths = list_paths(scored)
    note = f"A line is a trial with a score, coloured by its last {metric.label}: the darker, the better."
    if len(paths) > MAX_AXES:
        note += f" Of {len(paths)} searched paths the {MAX_AXES} {'most important' if shares else 'first'} are shown."
    return note


def _select_paths(paths: Iterable[str], shares: Mapping[str, float] | None) -> list[str]:
    """Return as many paths as there is room for, in their order."""
    ordered = list(paths)
    chosen = sorted(ordered, key=lambda path: -(shares or {}).get(path, 0.0))[:MAX_AXES]
    return [path for path in ordered if path in chosen]


def draw_importance(shares: Mapping[str, float]) -> Figure:
    """Draw the importance of each searched path, in percent."""
    figure, (axes,) = create_figure(9.0, 0.34 * len(shares) + 1.1)
    label_axes(axes, "", "share of the importance, %", "")
    names = make_short_names(shares)
    places = list(range(len(shares)))
    values = [100 * share for share in shares.values()]
    axes.barh(places, values, height=0.62, color=STATE_STYLES["finished"][0])
    annotate_values(axes, values, places, (4, 0), ".0f", va="center", color=MUTED)
    axes.set_yticks(places, [escape_label(names[path]) for path in shares], color=INK)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.08 * max(values))
    axes.grid(axis="y", visible=False)
    return figure


class ScoreColors:
    """Colours of scores, darker for better; `is_clipped` when the worst ones share the palest colour."""

    def __init__(self, scores: Sequence[float], maximize: bool = False) -> None:
        ordered = sorted(scores, reverse=maximize) or [0.0, 1.0]
        best, worst = ordered[0], ordered[-1]
        last = ordered[math.ceil(_COLORED_SHARE * (len(ordered) - 1))]
        self.is_clipped = last != best and abs(worst - best) > 2 * abs(last - best)
        low, high = sorted((best, last if self.is_clipped else worst))
        if high <= low:
            high = low + 1.0  # one colour for all
        self.is_log_scale = is_log([low, high])
        self._clipped_end = "min" if maximize else "max"
        # The end of viridis is too pale on white.
        colors = ListedColormap([colormaps["viridis"](0.9 * step / 255) for step in range(256)])
        norm = LogNorm(low, high) if self.is_log_scale else Normalize(low, high)
        self.mappable = ScalarMappable(norm, colors.reversed() if maximize else colors)

    def get_color(self, score: float | None) -> Color:
        """Return the colour of a trial with this score; grey without one."""
        if score is None:
            return UNSCORED_COLOR
        red, green, blue, opacity = self.mappable.to_rgba(np.array([score]))[0]
        return float(red), float(green), float(blue), float(opacity)

    def add_color_bar(self, figure: Figure, axes: Axes, label: str) -> None:
        """Add a colour bar at the right of the axes."""
        extend = self._clipped_end if self.is_clipped else "neither"
        bar = figure.colorbar(self.mappable, ax=axes, extend=extend, pad=0.02, aspect=30)
        bar.set_label(label, color=MUTED, fontsize=9.5)
        if self.is_log_scale:
            _set_plain_log_ticks(bar.ax)
        bar.ax.tick_params(colors=MUTED, labelsize=9)
        bar.outline.set_visible(False)


def _make_score_colors(trials: Iterable[Trial], metric: Metric) -> ScoreColors:
    scores = [score for trial in trials if (score := trial.get_score(metric)) is not None]
    return ScoreColors(scores, metric.maximize)


def _sort_winner_last(trials: Sequence[Trial], best: Trial | None) -> list[Trial]:
    """Return the trials in the order of drawing: the winner lies above the others."""
    return sorted(trials, key=lambda trial: trial is best)


def _add_state_legend(figure: Figure, axes: Axes, trials: Sequence[Trial], best: Trial | None, style: str) -> None:
    """Add a legend of the colours and markers, with the number of trials of each state."""
    if best is not None:
        color = STATE_STYLES[best.state][0]
        axes.plot([], [], color=color, linewidth=WINNER_LINE_WIDTH, label=f"{best.name}, the winner")
    for state, (color, marker) in STATE_STYLES.items():
        if count := sum(trial.state == state for trial in trials):
            axes.plot([], [], color=color, marker=marker, linewidth=1.3, linestyle=style, label=f"{state} ({count})")
    add_legend(figure, axes, 6)


def _set_score_scale(axes: Axes, scores: Sequence[float]) -> None:
    """Give scores that span more than a decade a logarithmic axis, with plain numbers."""
    if is_log(scores):
        axes.set_yscale("log")
        _set_plain_log_ticks(axes)


def _make_halo(width: float) -> list[Stroke]:
    """Return a white rim for a line or letters, so that they stand out from what lies below."""
    return [withStroke(linewidth=width, foreground="white")]


def _make_line_style(color: Color, is_winner: bool, trials: int) -> dict[str, Any]:
    """Return the style of the line of one of so many trials."""
    if is_winner:
        wide = {"linewidth": WINNER_LINE_WIDTH, "path_effects": _make_halo(4.6)}
        return {"color": color, "alpha": 1.0, "zorder": 4, **wide}
    return {"color": color, "linewidth": 1.3, "alpha": max(0.4, min(0.95, 1.1 - 0.01 * trials)), "zorder": 2}


def _set_plain_log_ticks(axes: Axes) -> None:
    """Label an upright logarithmic axis with 5 and 20 instead of powers of ten."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
