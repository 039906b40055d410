"""The plots of an ensemble's report, drawn from its analysis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.ensemble.report.wording import get_error, get_interval
from orchestrator.evaluation.analysis_results import Analysis, Calibration, ClassErrorRates
from orchestrator.plotting.canvas import (
    DASHES,
    INK,
    MUTED,
    SERIES_COLORS,
    SURFACE,
    Plot,
    add_legend,
    annotate_values,
    create_figure,
    escape_label,
    label_axes,
    render_png,
    render_svg,
)
from orchestrator.plotting.report_format import format_count

ErrorCurves = Mapping[str, Sequence[tuple[float, float]]]

PLOT_NAMES = ("table", "error_by_models", "error_by_crops", "disagreement", "reliability", "classes", "curves")
MAX_CLASSES = 25  # rows of classes, the worst
MAX_NAMED_MEMBERS = 16  # members whose names and figures fit into a heat map
MAX_CURVES = 28  # as many as colors and dashes tell apart


def draw_plots(analysis: Analysis, curves: ErrorCurves) -> dict[str, Plot]:
    """Return every plot that there is data for, by name."""
    several = len(analysis.member_names) > 1
    drawn: tuple[tuple[str, str, bool, Callable[[], Figure]], ...] = (
        ("table", "Errors with their 95% intervals", True, lambda: _draw_cells(analysis)),
        ("error_by_models", "Error against the number of models", several, lambda: _draw_error_by_models(analysis)),
        ("error_by_crops", "Error against the number of crops", True, lambda: _draw_error_by_crops(analysis)),
        ("disagreement", "How alike the models are", several, lambda: _draw_disagreement(analysis)),
        ("reliability", "How reliable confidence is", True, lambda: _draw_reliability(analysis)),
        ("classes", _format_classes_title(analysis), True, lambda: _draw_classes(analysis)),
        ("curves", "Validation error while training", any(curves.values()), lambda: _draw_training_curves(curves)),
    )
    plots = {}
    for name, title, has_data, draw in drawn:
        if has_data:
            figure = draw()
            svg = render_svg(figure, name)
            plots[name] = Plot(name, title, render_png(figure, title), svg=svg)
    return plots


def find_worst_classes(analysis: Analysis) -> list[ClassErrorRates]:
    """Return the classes with the largest top-1 error, the worst first; of equals those with more top-5 errors."""
    ordered = sorted(analysis.classes, key=lambda one: (-one.top1_error, -one.top5_error, one.label))
    return ordered[:MAX_CLASSES]


def _format_classes_title(analysis: Analysis) -> str:
    count = len(analysis.classes)
    return "Errors by class" if count <= MAX_CLASSES else f"The {MAX_CLASSES} worst of {count:,} classes"


def _draw_cells(analysis: Analysis) -> Figure:
    """Draw each cell of the table as a point with its interval, and the paper's figure."""
    cells = analysis.table.cells
    figure, axes = create_figure(9.0, 0.42 * len(cells) + 1.3, 2)
    places = list(range(len(cells)))
    for panel, rank in zip(axes, (1, 5), strict=True):
        label_axes(panel, f"Top-{rank} error", "percent", "")
        values = [get_error(cell, rank) for cell in cells]
        intervals = [get_interval(cell, rank) for cell in cells]
        _draw_error_bars(panel, values, intervals, places, SERIES_COLORS[0], upright=False)
        annotate_values(panel, values, places, (0, 6), ".2f", ha="center", fontsize=8.5, color=INK)
        panel.set_ylim(len(cells) - 0.5, -0.7)
        panel.margins(x=0.1)
        panel.grid(axis="y", visible=False)
        names = [f"{format_count(cell.models, 'model')}, {format_count(cell.crops, 'crop')}" for cell in cells]
        panel.set_yticks(places, names if rank == 1 else [""] * len(cells), color=INK)
    paper = [(cell.paper_top5, place) for cell, place in zip(cells, places, strict=True) if cell.paper_top5 is not None]
    if analysis.table.of_ilsvrc:
        label, edge = "the paper's figure (ILSVRC 2014)", SERIES_COLORS[1]
        axes[1].plot(*zip(*paper, strict=True), "D", mfc="none", mec=edge, mew=1.5, label=label)
        add_legend(figure, axes[1], 2)
    return figure


def _draw_error_by_models(analysis: Analysis) -> Figure:
    """Draw mean, least and most error of all subsets of each size, a line for each number of crops."""
    figure, axes = create_figure(9.0, 3.7, 2)
    for panel, rank in zip(axes, (1, 5), strict=True):
        label_axes(panel, f"Top-{rank} error", "models in the ensemble", "percent")
        for color, count in zip(SERIES_COLORS, sorted({one.crops for one in analysis.subsets}), strict=False):
            chosen = [one for one in analysis.subsets if one.crops == count]
            sizes = [one.size for one in chosen]
            spreads = [one.top1 if rank == 1 else one.top5 for one in chosen]
            least, mean, most = zip(*((one.least, one.mean, one.most) for one in spreads), strict=True)
            panel.fill_between(sizes, least, most, color=color, alpha=0.13, lw=0)
            panel.plot(sizes, mean, "o-", ms=4, lw=1.8, color=color, label=format_count(count, "crop"))
        if len(sizes) <= 20:
            panel.set_xticks(sizes)
    add_legend(figure, axes[0], 3)
    return figure


def _draw_error_by_crops(analysis: Analysis) -> Figure:
    """Draw errors of a single model and of the ensemble by the number of crops, equally spaced, with intervals."""
    cells = analysis.table.cells
    counts = sorted({cell.crops for cell in cells})
    figure, axes = create_figure(9.0, 3.5, 2)
    for panel, rank in zip(axes, (1, 5), strict=True):
        label_axes(panel, f"Top-{rank} error", "crops of each image", "percent")
        sizes = sorted({cell.models for cell in cells})
        for number, (size, color) in enumerate(zip(sizes, SERIES_COLORS, strict=False)):
            chosen = [cell for cell in cells if cell.models == size]
            # Side by side: intervals that overlap would hide each other.
            places = [counts.index(cell.crops) + 0.06 * (2 * number - len(sizes) + 1) for cell in chosen]
            values = [get_error(cell, rank) for cell in chosen]
            panel.plot(places, values, color=color, lw=1.8, label=format_count(size, "model"))
            intervals = [get_interval(cell, rank) for cell in chosen]
            _draw_error_bars(panel, values, intervals, places, color, upright=True)
            paper = [(place, cell.paper_top5) for place, cell in zip(places, chosen, strict=True)]
            if rank == 5 and analysis.table.of_ilsvrc and all(value is not None for _, value in paper):
                label = f"{format_count(size, 'model')}, the paper"
                panel.plot(*zip(*paper, strict=True), "D--", mfc="none", ms=5, lw=1, color=color, label=label)
        panel.set_xticks(range(len(counts)), [str(count) for count in counts])
        panel.set_xlim(-0.4, len(counts) - 0.6)
    add_legend(figure, axes[1], 4)
    return figure


def _draw_disagreement(analysis: Analysis) -> Figure:
    """Draw two heat maps, members by members: disagreement, and correlation of errors."""
    pairs = analysis.pairs
    named = len(pairs.members) <= MAX_NAMED_MEMBERS
    side = min(4.6, 2.3 + 0.33 * len(pairs.members))
    figure, axes = create_figure(2 * side + 1.4, side + 0.6, 2)
    correlation = [[math.nan if value is None else value for value in row] for row in pairs.correlation]
    _draw_heat_map(
        axes[0], np.array(pairs.disagreement, dtype=np.float64), "Disagreement, % of images", "{:.1f}", named
    )
    _draw_heat_map(axes[1], np.array(correlation, dtype=np.float64), "Correlation of errors", "{:.2f}", named)
    count = len(pairs.members)
    for number, panel in enumerate(axes):
        places = range(count) if named else range(0, count, -(-count // 10))
        panel.set_xticks(places, [str(place + 1) for place in places])
        rows = [f"{escape_label(pairs.members[place])}  {place + 1}" if named else str(place + 1) for place in places]
        panel.set_yticks(places, rows if number == 0 or not named else [str(place + 1) for place in places])
    return figure


def _draw_heat_map(
    axes: Axes, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], title: str, form: str, named: bool
) -> None:
    """Draw a heat map of a symmetric matrix without its diagonal, which says nothing."""
    shown = values.copy()
    np.fill_diagonal(shown, math.nan)
    label_axes(axes, title, "", "")
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    known = shown[np.isfinite(shown)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    # Without the palest colors, which a page hardly shows.
    lowest = low - 0.25 * (high - low) - 1e-9
    image = axes.imshow(shown, cmap="Blues", vmin=lowest, vmax=high + 1e-9, interpolation="none")
    if not named:
        return
    for (row, column), value in np.ndenumerate(shown):
        if math.isfinite(value):
            dark = np.dot(image.to_rgba(np.array([value]))[0, :3], (0.3, 0.59, 0.11)) < 0.55
            text_color = "#ffffff" if dark else "#111111"
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=8, color=text_color)
    for edge in np.arange(0.5, len(shown) - 1):
        axes.axhline(edge, color=SURFACE, lw=1.5)
        axes.axvline(edge, color=SURFACE, lw=1.5)


def _draw_reliability(analysis: Analysis) -> Figure:
    """Draw accuracy against confidence by bins, and the share of images in each bin."""
    figure, axes = create_figure(9.0, 3.7, 2)
    label_axes(axes[0], "Accuracy by confidence", "confidence", "share that is right")
    label_axes(axes[1], "Confidence of the answers", "confidence", "share of the images, %")
    axes[0].plot([0, 1], [0, 1], color=MUTED, lw=1, ls="dashed", label="confidence is right")
    width = 0.8 / len(analysis.calibration)
    for number, (calibration, color) in enumerate(zip(analysis.calibration, SERIES_COLORS, strict=False)):
        points = [(one.confidence or 0.0, one.accuracy or 0.0) for one in calibration.bins if one.images]
        label = format_count(calibration.models, "model")
        axes[0].plot(*zip(*points, strict=True), "o-", ms=4, lw=1.6, color=color, label=label)
        _draw_confidence_histogram(axes[1], calibration, color, number, width)
    axes[0].set(xlim=(0, 1), ylim=(0, 1.02), aspect="auto")
    axes[1].set(xlim=(0, 1))
    axes[1].grid(axis="x", visible=False)
    add_legend(figure, axes[0], 3)
    return figure


def _draw_confidence_histogram(axes: Axes, calibration: Calibration, color: str, number: int, width: float) -> None:
    images = max(1, sum(one.images for one in calibration.bins))
    for one in calibration.bins:
        across = one.high - one.low
        left = one.low + across * (0.1 + number * width)
        axes.bar(left, 100 * one.images / images, width=across * width, align="edge", color=color)


def _draw_classes(analysis: Analysis) -> Figure:
    """Draw top-1 and top-5 error of the worst classes."""
    chosen = find_worst_classes(analysis)
    figure, (axes,) = create_figure(9.0, 0.24 * len(chosen) + 1.3)
    label_axes(axes, "", "error, %", "")
    places = list(range(len(chosen)))
    top1, top5 = [one.top1_error for one in chosen], [one.top5_error for one in chosen]
    axes.barh(places, top1, height=0.62, color=SERIES_COLORS[0], alpha=0.85, label="top-1")
    axes.plot(top5, places, "D", ms=5, clip_on=False, mfc=SURFACE, mec=SERIES_COLORS[1], mew=1.5, label="top-5")
    axes.set_yticks(places, [escape_label(analysis.class_names[one.label]) for one in chosen], color=INK)
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    add_legend(figure, axes, 2)
    return figure


def _draw_training_curves(curves: ErrorCurves) -> Figure:
    """Draw the validation error of each member during training, with gaps where it is not finite."""
    figure, (axes,) = create_figure(9.0, 3.8)
    label_axes(axes, "", "epoch", "top-1 error, %")
    shown = [(name, line) for name, line in curves.items() if line][:MAX_CURVES]
    for number, (name, line) in enumerate(shown):
        points = [(epoch, error if math.isfinite(error) else math.nan) for epoch, error in line]
        color, dashes = SERIES_COLORS[number % len(SERIES_COLORS)], DASHES[number // len(SERIES_COLORS) % len(DASHES)]
        marker = "o" if len(line) < 2 else None
        axes.plot(*zip(*points, strict=True), label=escape_label(name), lw=1.5, color=color, ls=dashes, marker=marker)
    add_legend(figure, axes, 4)
    return figure


def _draw_error_bars(
    axes: Axes, values: Sequence[float], bounds: Sequence[tuple[float, float]], places: Sequence[float], color: str,
    upright: bool,
) -> None:  # fmt: skip
    # Rounding may move a value at the end of its interval just outside.
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
    style: dict[str, Any] = {"fmt": "o", "ms": 5, "capsize": 3, "color": color}
    if upright:
        axes.errorbar(places, values, yerr=[below, above], **style)
    else:
        axes.errorbar(values, places, xerr=[below, above], label="here, 95% interval", **style)
