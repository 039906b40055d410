"""The plots of an ensemble's report, drawn from its analysis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orchestrator.evaluation.analysis_results import Analysis, Calibration, ClassErrorRates
from orchestrator.evaluation.table3 import Cell
from orchestrator.plotting.canvas import (
    DASHES,
    INK,
    MUTED,
    SERIES_COLORS,
    SURFACE,
    add_legend,
    create_panels,
    escape_label,
    label_axes,
    render_png,
    render_svg,
)

ErrorCurves = Mapping[str, Sequence[tuple[float, float]]]

PLOT_NAMES = ("error_by_models", "error_by_crops", "disagreement", "reliability", "classes")
# The page shows these two as well; results.write has their like, table.png and curves.png.
PAGE_ONLY_PLOTS = ("cells", "training")
MAX_CLASSES = 25  # rows of classes, the worst
MAX_NAMED_MEMBERS = 16  # members whose names and figures fit into a heat map
MAX_CURVES = 28  # as many as colours and dashes tell apart


@dataclass(frozen=True)
class Plot:
    """A plot for the page and, unless it is only for that, for a file (else empty)."""

    name: str
    title: str
    svg: str
    png: bytes


def draw_plots(analysis: Analysis, curves: ErrorCurves) -> dict[str, Plot]:
    """Every plot that there is something to draw for, by name."""
    several = len(analysis.member_names) > 1
    drawn: list[tuple[str, str, Callable[[], Figure], bool]] = [
        ("cells", "Errors with their 95% intervals", lambda: _draw_cells(analysis), True),
        ("error_by_models", "Error against the number of models", lambda: _draw_error_by_models(analysis), several),
        ("error_by_crops", "Error against the number of crops", lambda: _draw_error_by_crops(analysis), True),
        ("disagreement", "How alike the models are", lambda: _draw_disagreement(analysis), several),
        ("reliability", "How far confidence can be trusted", lambda: _draw_reliability(analysis), True),
        ("classes", _format_classes_title(analysis), lambda: _draw_classes(analysis), True),
        ("training", "Validation error while training", lambda: _draw_training_curves(curves), any(curves.values())),
    ]
    found = {}
    for name, title, draw, wanted in drawn:
        if wanted:
            figure = draw()
            found[name] = Plot(
                name, title, render_svg(figure, name), b"" if name in PAGE_ONLY_PLOTS else render_png(figure, title)
            )
    return found


def find_worst_classes(analysis: Analysis) -> list[ClassErrorRates]:
    """The classes with the largest top-1 error, the worst first; of equal ones those with more top-5 errors."""
    ordered = sorted(analysis.classes, key=lambda one: (-one.top1_error, -one.top5_error, one.label))
    return ordered[:MAX_CLASSES]


def _format_classes_title(analysis: Analysis) -> str:
    count = len(analysis.classes)
    return "Errors by class" if count <= MAX_CLASSES else f"The {MAX_CLASSES} worst of {count:,} classes"


def _draw_cells(analysis: Analysis) -> Figure:
    """Each cell of the table as a point with its interval, the paper's figure beside it."""
    cells = analysis.table.cells
    figure, axes = create_panels(2, 9.0, 0.42 * len(cells) + 1.3)
    places = list(range(len(cells)))
    for panel, rank in zip(axes, (1, 5), strict=True):
        label_axes(panel, f"Top-{rank} error", "percent", "")
        values = [_get_error(cell, rank) for cell in cells]
        _draw_error_bars(
            panel, values, [_get_interval(cell, rank) for cell in cells], places, SERIES_COLORS[0], upright=False
        )
        for place, value in zip(places, values, strict=True):
            panel.annotate(
                f"{value:.2f}", (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8.5, color=INK
            )
        panel.set_ylim(len(cells) - 0.5, -0.7)
        panel.margins(x=0.1)
        panel.grid(axis="y", visible=False)
        names = [f"{_format_models(cell.models)}, {_format_crops(cell.crops)}" for cell in cells]
        panel.set_yticks(places, names if rank == 1 else [""] * len(cells), color=INK)
    paper = [(cell.paper_top5, place) for cell, place in zip(cells, places, strict=True) if cell.paper_top5 is not None]
    if analysis.table.of_ilsvrc:
        axes[1].plot(
            [value for value, _ in paper],
            [place for _, place in paper],
            "D",
            mfc="none",
            mec=SERIES_COLORS[1],
            mew=1.5,
            label="the paper's figure (ILSVRC 2014)",
        )
        add_legend(figure, axes[1], 2)
    return figure


def _draw_error_by_models(analysis: Analysis) -> Figure:
    """Mean, least and most error of all subsets of each size, a line for each number of crops."""
    figure, axes = create_panels(2, 9.0, 3.7)
    for panel, rank in zip(axes, (1, 5), strict=True):
        label_axes(panel, f"Top-{rank} error", "models in the ensemble", "percent")
        for colour, count in zip(SERIES_COLORS, sorted({one.crops for one in analysis.subsets}), strict=False):
            chosen = [one for one in analysis.subsets if one.crops == count]
            sizes = [one.size for one in chosen]
            spreads = [one.top1 if rank == 1 else one.top5 for one in chosen]
            panel.fill_between(
                sizes, [one.least for one in spreads], [one.most for one in spreads], color=colour, alpha=0.13, lw=0
            )
            panel.plot(
                sizes, [one.mean for one in spreads], "o-", ms=4, lw=1.8, color=colour, label=_format_crops(count)
            )
        if len(sizes) <= 20:
            panel.set_xticks(sizes)
    add_legend(figure, axes[0], 3)
    return figure


def _draw_error_by_crops(analysis: Analysis) -> Figure:
    """Errors of a single model and of the ensemble for each number of crops, equally spaced, with intervals."""
    cells = analysis.table.cells
    counts = sorted({cell.crops for cell in cells})
    figure, axes = create_panels(2, 9.0, 3.5)
    for panel, rank in zip(axes, (1, 5), strict=True):
        label_axes(panel, f"Top-{rank} error", "crops of each image", "percent")
        sizes = sorted({cell.models for cell in cells})
        for number, (size, colour) in enumerate(zip(sizes, SERIES_COLORS, strict=False)):
            chosen = [cell for cell in cells if cell.models == size]
            # Beside each other: intervals that overlap would hide one another.
            places = [counts.index(cell.crops) + 0.06 * (2 * number - len(sizes) + 1) for cell in chosen]
            values = [_get_error(cell, rank) for cell in chosen]
            panel.plot(places, values, color=colour, lw=1.8, label=_format_models(size))
            _draw_error_bars(
                panel, values, [_get_interval(cell, rank) for cell in chosen], places, colour, upright=True
            )
            paper = [(place, cell.paper_top5) for place, cell in zip(places, chosen, strict=True)]
            if rank == 5 and analysis.table.of_ilsvrc and all(value is not None for _, value in paper):
                panel.plot(
                    *zip(*paper, strict=True),
                    "D--",
                    mfc="none",
                    ms=5,
                    lw=1,
                    color=colour,
                    label=f"{_format_models(size)}, the paper",
                )
        panel.set_xticks(range(len(counts)), [str(count) for count in counts])
        panel.set_xlim(-0.4, len(counts) - 0.6)
    add_legend(figure, axes[1], 4)
    return figure


def _draw_disagreement(analysis: Analysis) -> Figure:
    """Two heat maps, members by members: disagreement, and correlation of errors."""
    pairs = analysis.pairs
    named = len(pairs.members) <= MAX_NAMED_MEMBERS
    side = min(4.6, 2.3 + 0.33 * len(pairs.members))
    figure, axes = create_panels(2, 2 * side + 1.4, side + 0.6)
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
    """A heat map of a symmetric matrix; what a model has with itself says nothing and is left out."""
    shown = values.copy()
    np.fill_diagonal(shown, math.nan)
    label_axes(axes, title, "", "")
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    known = shown[np.isfinite(shown)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    # The palest colours are left out: on a page they would look like nothing.
    image = axes.imshow(
        shown, cmap="Blues", vmin=low - 0.25 * (high - low) - 1e-9, vmax=high + 1e-9, interpolation="none"
    )
    if not named:
        return
    for (row, column), value in np.ndenumerate(shown):
        if math.isfinite(value):
            dark = np.dot(image.to_rgba(np.array([value]))[0, :3], (0.3, 0.59, 0.11)) < 0.55
            axes.text(
                column,
                row,
                form.format(value),
                ha="center",
                va="center",
                fontsize=8,
                color="#ffffff" if dark else "#111111",
            )
    for edge in np.arange(0.5, len(shown) - 1):
        axes.axhline(edge, color=SURFACE, lw=1.5)
        axes.axvline(edge, color=SURFACE, lw=1.5)


def _draw_reliability(analysis: Analysis) -> Figure:
    """Accuracy against confidence by bins, and how many images each bin has."""
    figure, axes = create_panels(2, 9.0, 3.7)
    label_axes(axes[0], "Accuracy by confidence", "confidence", "share that is right")
    label_axes(axes[1], "Confidence of the answers", "confidence", "share of the images, %")
    axes[0].plot([0, 1], [0, 1], color=MUTED, lw=1, ls="dashed", label="confidence is right")
    width = 0.8 / len(analysis.calibration)
    for number, (found, colour) in enumerate(zip(analysis.calibration, SERIES_COLORS, strict=False)):
        filled = [one for one in found.bins if one.images]
        axes[0].plot(
            [one.confidence or 0.0 for one in filled],
            [one.accuracy or 0.0 for one in filled],
            "o-",
            ms=4,
            lw=1.6,
            color=colour,
            label=_format_models(found.models),
        )
        _draw_confidence_histogram(axes[1], found, colour, number, width)
    axes[0].set(xlim=(0, 1), ylim=(0, 1.02), aspect="auto")
    axes[1].set(xlim=(0, 1))
    axes[1].grid(axis="x", visible=False)
    add_legend(figure, axes[0], 3)
    return figure


def _draw_confidence_histogram(axes: Axes, found: Calibration, colour: str, number: int, width: float) -> None:
    images = max(1, sum(one.images for one in found.bins))
    for one in found.bins:
        across = one.high - one.low
        left = one.low + across * (0.1 + number * width)
        axes.bar(left, 100 * one.images / images, width=across * width, align="edge", color=colour)


def _draw_classes(analysis: Analysis) -> Figure:
    """Top-1 and top-5 error of the worst classes."""
    chosen = find_worst_classes(analysis)
    figure, (axes,) = create_panels(1, 9.0, 0.24 * len(chosen) + 1.3)
    label_axes(axes, "", "error, %", "")
    places = list(range(len(chosen)))
    axes.barh(
        places, [one.top1_error for one in chosen], height=0.62, color=SERIES_COLORS[0], alpha=0.85, label="top-1"
    )
    axes.plot(
        [one.top5_error for one in chosen],
        places,
        "D",
        ms=5,
        clip_on=False,
        mfc=SURFACE,
        mec=SERIES_COLORS[1],
        mew=1.5,
        label="top-5",
    )
    axes.set_yticks(places, [escape_label(analysis.class_names[one.label]) for one in chosen], color=INK)
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    add_legend(figure, axes, 2)
    return figure


def _draw_training_curves(curves: ErrorCurves) -> Figure:
    """Validation error of each member while it was trained; gaps where it is no number."""
    figure, (axes,) = create_panels(1, 9.0, 3.8)
    label_axes(axes, "", "epoch", "top-1 error, %")
    shown = [(name, line) for name, line in curves.items() if line][:MAX_CURVES]
    for number, (name, line) in enumerate(shown):
        axes.plot(
            [x for x, _ in line],
            [y if math.isfinite(y) else math.nan for _, y in line],
            label=escape_label(name),
            lw=1.5,
            color=SERIES_COLORS[number % len(SERIES_COLORS)],
            ls=DASHES[number // len(SERIES_COLORS) % len(DASHES)],
            marker="o" if len(line) < 2 else None,
        )
    add_legend(figure, axes, 4)
    return figure


def _draw_error_bars(
    axes: Axes,
    values: Sequence[float],
    bounds: Sequence[tuple[float, float]],
    places: Sequence[float],
    colour: str,
    upright: bool,
) -> None:
    # Rounding may put a value that lies on the end of its interval just outside.
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
    if upright:
        axes.errorbar(places, values, yerr=[below, above], fmt="o", ms=5, capsize=3, color=colour)
    else:
        axes.errorbar(
            values, places, xerr=[below, above], fmt="o", ms=5, capsize=3, color=colour, label="here, 95% interval"
        )


def _get_error(cell: Cell, rank: int) -> float:
    return cell.top1_error if rank == 1 else cell.top5_error


def _get_interval(cell: Cell, rank: int) -> tuple[float, float]:
    return cell.top1_interval if rank == 1 else cell.top5_interval


def _format_models(count: int) -> str:
    return "1 model" if count == 1 else f"{count} models"


def _format_crops(count: int) -> str:
    return "1 crop" if count == 1 else f"{count} crops"
