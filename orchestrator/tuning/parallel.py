"""Parallel coordinates of a sweep: an axis for each searched path and one for the score, a line for each trial."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orchestrator.tuning.param_axes import ParamAxis, build_axes, is_log
from orchestrator.tuning.ranking import METRIC_NAMES, find_winner, rank_trials
from orchestrator.tuning.report.sweep_plots import INK, MUTED, ScoreColors, create_figure, escape_label, make_line_style
from orchestrator.tuning.trial import MetricName, Trial

MAX_AXES = 9  # besides the score's; their labels hardly stand beside each other
_ABSENT = -0.14  # where absent values lie, below the axes, which go from 0 to 1
_SPREAD = 0.06  # most that lines through the same one of few values are set apart, so that each is seen
_FEW = 6  # numbers, to which an axis has a tick at each
_BEHIND = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}  # of a tick's words
_SCORE = "score"  # no path of a recipe


def draw_parallel_coordinates(
    trials: Sequence[Trial], metric: MetricName, shares: Mapping[str, float] | None
) -> Figure:
    """A line for each trial through what it took of each path to its score, which colours it."""
    searched = _select_axes(build_axes(trials), shares)
    found = [trial.get_score(metric) for trial in trials]
    known = [score for score in found if score is not None]
    columns = (*searched, _make_score_axis(metric, known, len(known) < len(found)))
    figure, canvas = create_figure(max(6.0, 1.35 * len(columns) + 0.8), 5.2)
    scores, best = ScoreColors(known), find_winner(trials, metric)
    # The worst first, so that the better ones lie above them.
    for one in reversed(rank_trials(trials, metric)):
        values = {**one.trial.assignment} | ({} if one.score is None else {_SCORE: one.score})
        apart = 2.0 * (one.rank - 1) / (len(trials) - 1) - 1.0 if len(trials) > 1 else 0.0
        heights = [_compute_height(axis, values, apart) for axis in columns]
        canvas.plot(
            range(len(columns)), heights, **make_line_style(scores.get_color(one.score), one.trial is best, len(trials))
        )
    for place, axis in enumerate(columns):
        _draw_axis(canvas, place, axis)
    canvas.set_xticks(range(len(columns)), [_wrap_title(axis) for axis in columns], color=INK, fontsize=9)
    canvas.xaxis.tick_top()
    canvas.tick_params(length=0, pad=8)
    canvas.set_yticks([])
    lowest = _ABSENT - 0.05 if any(axis.has_absent for axis in columns) else -0.06
    canvas.set(xlim=(-0.45, len(columns) - 0.75), ylim=(lowest, 1.08))
    for spine in canvas.spines.values():
        spine.set_visible(False)
    if best is not None:
        canvas.plot(
            [],
            [],
            label=f"{best.name}, the winner",
            **make_line_style(scores.get_color(best.get_score(metric)), True, 1),
        )
        figure.legend(*canvas.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    return figure


def format_note(trials: Sequence[Trial], metric: MetricName, shares: Mapping[str, float] | None) -> str:
    """How to read the plot, and which paths it leaves out."""
    found = build_axes(trials)
    kept = _select_axes(found, shares)
    told = f"A line is a trial, coloured by its last {METRIC_NAMES[metric]}: the darker, the better."
    if len(kept) < len(found):
        told += f" Of {len(found)} searched paths the {len(kept)} {'most important' if shares else 'first'} are shown."
    return told


def _select_axes(found: Sequence[ParamAxis], shares: Mapping[str, float] | None) -> tuple[ParamAxis, ...]:
    """As many axes as there is room for, in the order of the search."""
    if len(found) <= MAX_AXES:
        return tuple(found)
    ordered = sorted(found, key=lambda axis: -(shares or {}).get(axis.path, 0.0))
    kept = {axis.path for axis in ordered[:MAX_AXES]}
    return tuple(axis for axis in found if axis.path in kept)


def _make_score_axis(metric: MetricName, scores: Sequence[float], some_absent: bool) -> ParamAxis:
    numbers = tuple(sorted(set(scores))) or (0.0, 100.0)
    return ParamAxis(
        _SCORE, f"{METRIC_NAMES[metric]}, %", "log" if is_log(scores) else "linear", (), numbers, some_absent
    )


def _compute_height(axis: ParamAxis, values: Mapping[str, object], apart: float) -> float:
    """Where a trial's line crosses the axis; `apart`, from -1 to 1, sets lines through the same value apart."""
    value = axis.get_coordinate(values)
    if value is None:
        return _ABSENT + 0.4 * _SPREAD * apart
    stops = _get_stops(axis)
    return axis.normalize(value) + apart * min(_SPREAD, 0.4 * _get_min_gap(axis, stops)) * bool(stops)


def _get_stops(axis: ParamAxis) -> list[float]:
    """The values, in the axis's scale, of an axis that has but few; none of another, or of the score's."""
    if axis.scale == "choice":
        return [float(place) for place in range(len(axis.choices))]
    stops = [math.log10(one) if axis.scale == "log" else one for one in axis.numbers]
    few = axis.path != _SCORE and len(stops) <= _FEW
    # Words at values closer than that would stand on each other.
    return stops if few and _get_min_gap(axis, stops) > _SPREAD else []


def _get_min_gap(axis: ParamAxis, stops: Sequence[float]) -> float:
    """The least distance between values on the axis, whose length is 1."""
    return min((axis.normalize(after) - axis.normalize(before) for before, after in pairwise(stops)), default=1.0)


def _draw_axis(canvas: Axes, place: int, axis: ParamAxis) -> None:
    """An upright axis with its ticks."""
    canvas.plot([place, place], [0.0, 1.0], color=MUTED, linewidth=1.0, zorder=5)
    ticks = [(axis.normalize(value), words) for value, words in _get_ticks(axis)]
    if axis.has_absent:
        ticks.append((_ABSENT, "none" if axis.path == _SCORE else "absent"))
    for height, words in ticks:
        canvas.plot(place, height, marker="_", markersize=7, color=MUTED, zorder=5)
        canvas.annotate(words, (place, height), (-6, 0), textcoords="offset points", ha="right", va="center",
                        fontsize=8.5, color=INK, zorder=6, bbox=_BEHIND)  # fmt: skip


def _get_ticks(axis: ParamAxis) -> list[tuple[float, str]]:
    """Values of the axis's scale, and what is written there."""
    if axis.scale == "choice":
        return [(float(place), escape_label(words)) for place, words in enumerate(axis.choices)]
    if stops := _get_stops(axis):
        return [(value, f"{one:.4g}") for value, one in zip(stops, axis.numbers, strict=True)]
    low, high = axis.bounds
    if axis.scale == "linear":
        whole = all(one.is_integer() for one in axis.numbers)
        found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
        return [(value, f"{value:.4g}") for value in found if low <= value <= high]
    for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        marks = [power + math.log10(step) for power in powers for step in steps]
        inside = [value for value in marks if low - 1e-9 <= value <= high + 1e-9]
        if len(inside) <= 7:
            break
    return [(value, f"{10**value:.4g}") for value in inside]


def _wrap_title(axis: ParamAxis) -> str:
    """A path's name in lines that fit between its neighbours."""
    lines = [""]
    for part in re.findall(r"[^_. ]*[_. ]?", escape_label(axis.name)):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > 14:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
