"""The plots of a sweep. Only drivers import this file: matplotlib is heavy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.recipe.schedule import rate_at
from orchestrator.tuning import parallel
from orchestrator.tuning.plot_canvas import (
    INK,
    MUTED,
    NONE,
    STATES,
    WINNER_WIDTH,
    Scores,
    figure_of,
    halo,
    label,
    legend,
    line,
    log_errors,
    plain,
    png,
)
from orchestrator.tuning.ranking import METRIC_NAMES, winner
from orchestrator.tuning.searched import is_log, short_names
from orchestrator.tuning.trials import Metric, Trial

FILES = ("errors", "budget", "rates", "parallel", "importance")
_POINTS = 800  # of a schedule's curve
_DECADES = 2.0  # that a logarithmic axis of rates reaches below the least of their peaks: many fall to 0


@dataclass(frozen=True)
class Plot:
    """A plot: its title, a sentence on how to read it, and its PNG file."""

    name: str
    title: str
    note: str
    png: bytes


def plots(trials: Sequence[Trial], metric: Metric, shares: Mapping[str, float] | None) -> dict[str, Plot]:
    """Every plot that there is something to draw for, by its name, which is one of FILES.

    shares: the importance of the searched paths, None where it is not known.
    """
    trained = [trial for trial in trials if trial.trained_epochs]
    validated = any(math.isfinite(error) for trial in trials for _, error in trial.curve(metric))
    searched = any(trial.assignment for trial in trained)
    drawn: list[tuple[str, str, str, Callable[[], Figure], bool]] = [
        (
            "errors", "Validation error of every trial", "A marker stands where a trial ended.",
            lambda: errors(trials, metric), validated,
        ),
        (
            "budget", "Error against the budget",
            "A point is a trial where it ended. Trials stand in the order of their numbers; many ran side by side.",
            lambda: budget(trials, metric), bool(trained),
        ),
        (
            "rates", "Learning rates that were tried", "Faint: what would have followed in trials that were ended.",
            lambda: rates(trials, metric), bool(trained),
        ),
        ("parallel", "What was tried, and what came of it", parallel.note(trained, metric, shares),
         lambda: parallel.parallel(trained, metric, shares), searched),
        ("importance", "What the score hangs on", "", lambda: bars(shares or {}), bool(shares)),
    ]  # fmt: skip
    return {name: Plot(name, title, note, png(draw(), title)) for name, title, note, draw, wanted in drawn if wanted}


def rates(trials: Sequence[Trial], metric: Metric) -> Figure:
    """The learning rate of each trial that was trained, over all its epochs, coloured by its score."""
    figure, axes = figure_of(9.0, 4.6)
    best, scores = winner(trials, metric), _scores(trials, metric)
    label(axes, "epoch", "learning rate")
    peaks = []
    shown = [trial for trial in trials if trial.trained_epochs]
    for trial in _winner_last(shown, best):
        epochs = trial.recipe.epochs
        done = np.linspace(0.0, float(epochs), _POINTS + 1)
        # Just before the end: what a step there would lead to is never used.
        at = np.minimum(done, epochs - 1e-6)
        curve = np.array([rate_at(trial.recipe.schedule, float(one), 1.0, epochs) for one in at])
        curve[curve <= 0] = math.nan  # a logarithmic axis has no 0
        peaks.append(float(np.nanmax(curve)))
        style = line(scores.colour(trial.score(metric)), trial is best, len(shown))
        so_far = done <= trial.trained_epochs
        axes.plot(done[so_far], curve[so_far], **style)
        # From where the other ends, so that no gap is left.
        rest = done >= done[so_far][-1]
        axes.plot(done[rest], curve[rest], **{**style, "alpha": 0.22, "linewidth": 1.0, "path_effects": None})
    if is_log(peaks):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 10**_DECADES)
    else:
        axes.set_ylim(bottom=0.0)
    axes.set_xlim(0.0, max(trial.recipe.epochs for trial in shown))
    _bar(figure, axes, scores, trials, metric)
    _name_lines(figure, axes, best, any(trial.score(metric) is None for trial in shown))
    return figure


def errors(trials: Sequence[Trial], metric: Metric) -> Figure:
    """The validation error of each trial against the epoch, coloured by its state."""
    figure, axes = figure_of(9.0, 4.6)
    best = winner(trials, metric)
    label(axes, "epoch", f"{METRIC_NAMES[metric]}, %")
    shown = [trial for trial in trials if trial.curve(metric)]
    for trial in _winner_last(shown, best):
        curve = trial.curve(metric)
        xs = [epoch for epoch, _ in curve]
        ys = [error if math.isfinite(error) else math.nan for _, error in curve]
        colour, marker = STATES[trial.state]
        style = line(colour, trial is best, len(shown))
        axes.plot(xs, ys, **style)
        ends = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if ends:
            axes.plot(*ends[-1], marker=marker, markersize=6, color=colour, linestyle="none", markeredgecolor="white",
                      markeredgewidth=0.6, zorder=style["zorder"] + 0.5)  # fmt: skip
    log_errors(axes, [error for trial in shown for _, error in trial.curve(metric) if math.isfinite(error)])
    axes.set_xlim(left=0.0)
    _name_states(figure, axes, shown, best, "solid")
    return figure


def budget(trials: Sequence[Trial], metric: Metric) -> Figure:
    """Each trial's last error, and the best finished one's so far, against the epochs trained in the whole sweep."""
    figure, axes = figure_of(9.0, 4.2)
    best = winner(trials, metric)
    label(axes, "epochs trained by all trials so far", f"{METRIC_NAMES[metric]}, %")
    shown = [trial for trial in sorted(trials, key=lambda one: one.number) if trial.trained_epochs]
    spent = 0
    steps: list[tuple[int, float]] = []
    scored = []
    for trial in shown:
        spent += trial.own_epochs
        score = trial.score(metric)
        colour, marker = STATES[trial.state]
        if score is None:
            # At the upper edge: it has no error, and none is worse.
            axes.plot(spent, 1.0, marker=marker, markersize=7, color=colour, linestyle="none", clip_on=False,
                      markeredgecolor="white", markeredgewidth=0.6, transform=axes.get_xaxis_transform())  # fmt: skip
            continue
        scored.append(score)
        axes.plot(spent, score, marker=marker, markersize=7, color=colour, linestyle="none", markeredgecolor="white",
                  markeredgewidth=0.6, zorder=3)  # fmt: skip
        if trial.state == "finished":
            steps.append((spent, min(score, steps[-1][1]) if steps else score))
    if steps:
        axes.plot(*zip(*steps, (spent, steps[-1][1]), strict=True), drawstyle="steps-post", color=INK, linewidth=1.6,
                  label="best finished so far", zorder=2)  # fmt: skip
    log_errors(axes, scored)
    axes.set_xlim(0.0, 1.03 * spent)
    _name_states(figure, axes, shown, None, "none")
    if best is not None:
        place = sum(trial.own_epochs for trial in shown if trial.number <= best.number)
        axes.annotate(best.name, (place, best.score(metric) or 0.0), (0, -14), textcoords="offset points", ha="center",
                      fontsize=9, color=INK, path_effects=halo(3))  # fmt: skip
        axes.margins(y=0.12)
    return figure


def bars(shares: Mapping[str, float]) -> Figure:
    """The importance of each searched path, in percent."""
    figure, axes = figure_of(9.0, 0.34 * len(shares) + 1.1)
    label(axes, "share of the importance, %", "")
    names = short_names(shares)
    places = list(range(len(shares)))
    values = [100 * share for share in shares.values()]
    axes.barh(places, values, height=0.62, color=STATES["finished"][0])
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.0f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=9,
                      color=MUTED)  # fmt: skip
    axes.set_yticks(places, [plain(names[path]) for path in shares], color=INK)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.08 * max(values))
    axes.grid(axis="y", visible=False)
    return figure


def _scores(trials: Iterable[Trial], metric: Metric) -> Scores:
    return Scores([score for trial in trials if (score := trial.score(metric)) is not None])


def _bar(figure: Figure, axes: Axes, scores: Scores, trials: Sequence[Trial], metric: Metric) -> None:
    if len({trial.score(metric) for trial in trials} - {None}) > 1:
        scores.bar(figure, axes, f"last {METRIC_NAMES[metric]}, %")


def _winner_last(trials: Sequence[Trial], best: Trial | None) -> list[Trial]:
    """In the order of drawing: the winner hides others, not they it."""
    return sorted(trials, key=lambda trial: trial is best)


def _name_lines(figure: Figure, axes: Axes, best: Trial | None, some_unscored: bool) -> None:
    """Say below what a bold line is, and a grey one."""
    if best is not None:
        axes.plot([], [], color=INK, linewidth=WINNER_WIDTH, label=f"{best.name}, the winner")
    if some_unscored:
        axes.plot([], [], color=NONE, linewidth=1.3, label="without a score")
    legend(figure, axes, 2)


def _name_states(figure: Figure, axes: Axes, trials: Sequence[Trial], best: Trial | None, style: str) -> None:
    """Say below what the colours and markers are, and how many trials there are of each."""
    if best is not None:
        axes.plot([], [], color=STATES[best.state][0], linewidth=WINNER_WIDTH, label=f"{best.name}, the winner")
    for state, (colour, marker) in STATES.items():
        if count := sum(trial.state == state for trial in trials):
            axes.plot([], [], color=colour, marker=marker, linewidth=1.3, linestyle=style, label=f"{state} ({count})")
    legend(figure, axes, 6)
