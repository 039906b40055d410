"""The plots of a sweep. Only drivers import this file: matplotlib is heavy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import optuna
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from orchestrator.plotting.canvas import Plot, add_legend, create_figure, escape_label, label_axes, render_png
from orchestrator.tuning.importance import build_study, is_log
from orchestrator.tuning.ranking import find_winner
from orchestrator.tuning.trial import Metric, State, Trial, make_short_names

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
    "waiting": ("#9aa3ac", "."),
}
_MARKER: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.6}


def draw_plots(trials: Sequence[Trial], metric: Metric, shares: Mapping[str, float] | None) -> dict[str, Plot]:
    """Return every plot that there is data for, by name.

    shares: the importance of the searched paths; None when it is unknown.
    """
    plots = []
    if any(math.isfinite(score) for trial in trials for _, score in trial.get_curve(metric)):
        title = f"Validation {'error' if metric.is_error else metric.label} of every trial"
        png = render_png(draw_errors(trials, metric), title)
        plots.append(Plot("errors", title, png, "A marker stands where a trial ended."))
    scored = [trial for trial in trials if trial.get_score(metric) is not None]
    if len(scored) > 1 and (names := make_short_names(scored)):
        note = f"A line is a trial with a score, coloured by its last {metric.label}: the darker, the better."
        if len(names) > MAX_AXES:
            which = "most important" if shares else "first"
            note += f" Of {len(names)} searched paths the {MAX_AXES} {which} are shown."
        title = "What was tried, and what came of it"
        png = render_png(draw_parallel_coordinates(scored, metric, list(shares or names)[:MAX_AXES]), title)
        plots.append(Plot("parallel", title, png, note))
    return {plot.name: plot for plot in plots}


def draw_errors(trials: Sequence[Trial], metric: Metric) -> Figure:
    """Draw the score of each trial against the epoch, coloured by the trial's state."""
    figure, (axes,) = create_figure(9.0, 4.6)
    label_axes(axes, "", "epoch", metric.axis_label)
    best = find_winner(trials, metric)
    validated = [trial for trial in trials if trial.get_curve(metric)]
    all_scores = []
    for trial in sorted(validated, key=lambda trial: trial is best):  # the winner lies above the others
        curve = [(epoch, score if math.isfinite(score) else math.nan) for epoch, score in trial.get_curve(metric)]
        color, marker = STATE_STYLES[trial.state]
        style: dict[str, Any] = {"linewidth": 1.3, "alpha": max(0.4, min(0.95, 1.1 - 0.01 * len(validated)))}
        if trial is best:
            rim = withStroke(linewidth=4.6, foreground="white")
            style = {"linewidth": WINNER_LINE_WIDTH, "path_effects": [rim], "label": f"{best.name}, the winner"}
        axes.plot(*zip(*curve, strict=True), color=color, zorder=4 if trial is best else 2, **style)
        finite = [point for point in curve if math.isfinite(point[1])]
        all_scores += [score for _, score in finite]
        if finite:
            axes.plot(*finite[-1], marker, markersize=6, color=color, zorder=4.5 if trial is best else 2.5, **_MARKER)
    if is_log(all_scores):
        _set_log_scale(axes)
    axes.set_xlim(left=0.0)
    for state, (color, marker) in STATE_STYLES.items():
        if count := sum(trial.state == state for trial in validated):
            axes.plot([], [], color=color, marker=marker, linewidth=1.3, label=f"{state} ({count})")
    add_legend(figure, axes, 6)
    return figure


def draw_parallel_coordinates(scored: Sequence[Trial], metric: Metric, paths: Sequence[str]) -> Figure:
    """Draw Optuna's parallel coordinates of trials with a score: a line for each through its values to its score."""
    names = {path: escape_label(name) for path, name in make_short_names(scored).items()}
    study = build_study([(trial, trial.get_score(metric) or 0.0) for trial in scored], metric, names)
    before = matplotlib.get_backend()
    pyplot.switch_backend("agg")  # Optuna draws with pyplot, which may open a window
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            axes = optuna.visualization.matplotlib.plot_parallel_coordinate(
                study, [names[path] for path in paths], target_name=metric.axis_label
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


def _set_log_scale(axes: Axes) -> None:
    """Give upright axes a logarithmic scale, labelled with 5 and 20 instead of powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
