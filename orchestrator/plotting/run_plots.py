"""Pictures of a run and of the ensemble. Only drivers import this file: matplotlib is heavy.

Drawn with matplotlib's object-oriented interface on the Agg canvas: no display, no global state, so that it
works in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

# Okabe and Ito's colours, told apart by colour-blind readers too; the pale yellow is replaced.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_DASHES = ("solid", "dashed", "dotted", "dashdot")
_GRAY = "#666666"
_DPI = 150


@dataclass(frozen=True)
class EnsembleCell:
    """One cell of the ensemble's table: errors in percent, with the ends of their 95 % intervals.

    models: members joined. crops: per image. paper_top5_error: the paper's figure in percent,
    None for a cell that its table lacks.
    """

    models: int
    crops: int
    top1_error: float
    top1_low: float
    top1_high: float
    top5_error: float
    top5_low: float
    top5_high: float
    paper_top5_error: float | None = None


def plot_curves(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str, path: str
) -> None:
    """Draw one line per member into a PNG at `path` (parents are made); gaps where y is not finite.

    Raises ValueError when there is no series.
    """
    if not series:
        raise ValueError(f"series of the plot {title!r} is empty; give at least one line")
    figure, axes = _make_figure((9.0, 5.0))
    for number, (name, line) in enumerate(series.items()):
        xs = [x for x, _ in line]
        ys = [y if math.isfinite(y) else math.nan for _, y in line]
        axes.plot(
            xs,
            ys,
            label=name,
            color=_COLORS[number % len(_COLORS)],
            # Past the colours the dashes tell lines apart.
            linestyle=_DASHES[number // len(_COLORS) % len(_DASHES)],
            linewidth=1.6,
            marker="o" if len(line) < 2 else None,
        )
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#DDDDDD", linewidth=0.8)
    # Beside the axes, where it can hide no line.
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    _save_figure(figure, path)


def plot_ensemble_errors(rows: Sequence[EnsembleCell], path: str) -> None:
    """Draw the cells (models x crops) as a picture into a PNG at `path` (parents are made).

    Top-1 and top-5 error side by side, a point with whiskers for each cell, the paper's top-5 as a diamond.
    Raises ValueError when there is no row.
    """
    if not rows:
        raise ValueError("rows of the ensemble's picture is empty; give at least one cell")
    ordered = sorted(rows, key=lambda row: (row.models, row.crops))
    figure = Figure(
        figsize=(10.0, 0.62 * len(ordered) + 2.0),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
    )
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    places = [float(-number) for number in range(len(ordered))]
    _draw_error_bars(left, places, [(row.top1_low, row.top1_error, row.top1_high) for row in ordered], _COLORS[0])
    _draw_error_bars(right, places, [(row.top5_low, row.top5_error, row.top5_high) for row in ordered], _COLORS[0])
    paper = [(row.paper_top5_error, place) for row, place in zip(ordered, places, strict=True)]
    if any(error is not None for error, _ in paper):
        right.plot(
            [error for error, _ in paper if error is not None],
            [place for error, place in paper if error is not None],
            linestyle="none",
            marker="D",
            markersize=7,
            markerfacecolor="none",
            markeredgecolor=_COLORS[5],
            markeredgewidth=1.6,
            label="paper (ILSVRC 2014)",
        )
    left.set_yticks(places, [_format_cell_name(row) for row in ordered])
    left.set(title="Top-1 error", xlabel="percent")
    right.set(title="Top-5 error", xlabel="percent")
    for axes in (left, right):
        _style_axes(axes)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _save_figure(figure, path)


def plot_lr_schedule(rates: Sequence[tuple[float, float]], samples_per_epoch: int, title: str, path: str) -> None:
    """Draw a learning rate over a whole training into a PNG at `path` (parents are made).

    rates: pairs of epochs done and rate. Raises ValueError when there is none.
    """
    if not rates:
        raise ValueError(f"rates of the plot {title!r} is empty; give at least one point")
    figure, axes = _make_figure((9.0, 4.5))
    # A rate holds for its step: no slopes where it jumps.
    axes.plot(*zip(*rates, strict=True), color=_COLORS[0], linewidth=1.6, drawstyle="steps-post")
    axes.set(title=title, xlabel="epochs done", ylabel="learning rate")
    axes.set_xlim(0.0, max(epochs for epochs, _ in rates))
    axes.set_ylim(bottom=0.0)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    per_epoch = float(samples_per_epoch)
    seen = (lambda x: np.multiply(x, per_epoch), lambda x: np.divide(x, per_epoch))
    samples = axes.secondary_xaxis("top", functions=seen)
    samples.xaxis.set_major_formatter(EngFormatter(sep=""))
    samples.set_xlabel("samples seen", color=_GRAY)
    samples.tick_params(colors=_GRAY)
    _save_figure(figure, path)


def draw_contact_sheet(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], columns: Sequence[str], title: str, path: str
) -> None:
    """Draw a grid of images, each H x W x 3 uint8 of any size, into a PNG at `path` (parents are made).

    rows: a caption and an image for each of the columns. columns: their captions. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError(f"rows of the contact sheet {title!r} is empty; give at least one")
    cell, caption = 1.15, 1.5  # inches
    figure = Figure(
        figsize=(cell * len(columns) + caption, cell * len(rows) + 0.9),
        dpi=_DPI,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05),
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            height, width = image.shape[:2]
            # Of a unit cell; what is left of it is the gap between images.
            across, down = (0.47 * side / max(height, width) for side in (width, height))
            axes.imshow(image, extent=(column - across, column + across, row + down, row - down))
    # The first column is the original: a line sets it apart.
    axes.axvline(0.5, color=_GRAY, linewidth=1.0)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), title=title)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(rows)), [text for text, _ in rows])
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    _save_figure(figure, path)


def _draw_error_bars(axes: Axes, places: list[float], values: list[tuple[float, float, float]], colour: str) -> None:
    middles = [middle for _, middle, _ in values]
    # A measured value may lie on the end of its interval, and rounding may then put it just outside.
    below = [max(0.0, middle - low) for low, middle, _ in values]
    above = [max(0.0, high - middle) for _, middle, high in values]
    axes.errorbar(
        middles,
        places,
        xerr=[below, above],
        fmt="o",
        color=colour,
        capsize=4,
        label="measured, 95 % interval",
    )
    for middle, place in zip(middles, places, strict=True):
        # Above the point: beside it the paper's marker may stand.
        axes.annotate(f"{middle:.2f}", (middle, place), (0, 7), textcoords="offset points", ha="center", fontsize=9)


def _style_axes(axes: Axes) -> None:
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08, y=0.12)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]) - 0.02 * axes.get_xlim()[1])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _format_cell_name(row: EnsembleCell) -> str:
    return f"{row.models} model{'s' * (row.models != 1)}, {row.crops} crop{'s' * (row.crops != 1)}"


def _make_figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save_figure(figure: Figure, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Photographs hardly get smaller with more: half of the time would go to it.
    figure.savefig(path, dpi=_DPI, pil_kwargs={"compress_level": 3})
