"""The plots of an ensemble's report, drawn from its analysis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from orchestrator.evaluation.analysis_results import Analysis
from orchestrator.plotting import canvas
from orchestrator.plotting.report_format import format_count

ErrorCurves = Mapping[str, Sequence[tuple[float, float]]]

PLOT_NAMES = ("table", "error_by_models", "reliability", "curves")
MAX_CURVES = 28  # as many as colors and dashes tell apart


def draw_plots(analysis: Analysis, curves: ErrorCurves) -> dict[str, canvas.Plot]:
    """Return every plot that there is data for, by name."""
    figures = {"table": ("Errors with their 95% intervals", _draw_cells(analysis))}
    if len(analysis.member_names) > 1:
        figures["error_by_models"] = ("Error against the number of models", _draw_error_by_models(analysis))
    figures["reliability"] = ("How reliable confidence is", _draw_reliability(analysis))
    if any(curves.values()):
        figures["curves"] = ("Validation error while training", _draw_training_curves(curves))
    plots = {}
    for name, (title, figure) in figures.items():
        svg = canvas.render_svg(figure, name)
        plots[name] = canvas.Plot(name, title, canvas.render_png(figure, title), svg=svg)
    return plots


def _draw_cells(analysis: Analysis) -> Figure:
    """Draw each cell of the table as a point with its interval, and the paper's figure."""
    cells = analysis.table.cells
    figure, axes = canvas.create_figure(9.0, 0.42 * len(cells) + 1.3, 2)
    places = list(range(len(cells)))
    top1 = [(cell.top1_error, *cell.top1_interval) for cell in cells]
    top5 = [(cell.top5_error, *cell.top5_interval) for cell in cells]
    for panel, rank, errors in zip(axes, (1, 5), (top1, top5), strict=True):
        canvas.label_axes(panel, f"Top-{rank} error", "percent", "")
        values = [value for value, _, _ in errors]
        # Rounding may move a value at the end of its interval just outside.
        below, above = ([max(0.0, sign * (row[0] - row[end])) for row in errors] for end, sign in ((1, 1), (2, -1)))
        label = "here, 95% interval"
        panel.errorbar(
            values, places, xerr=[below, above], fmt="o", ms=5, capsize=3, color=canvas.SERIES_COLORS[0], label=label
        )
        canvas.annotate_values(panel, values, places, (0, 6), ".2f", ha="center", fontsize=8.5, color=canvas.INK)
        panel.set_ylim(len(cells) - 0.5, -0.7)
        panel.margins(x=0.1)
        panel.grid(axis="y", visible=False)
        names = [f"{format_count(cell.models, 'model')}, {format_count(cell.crops, 'crop')}" for cell in cells]
        panel.set_yticks(places, names if rank == 1 else [""] * len(cells), color=canvas.INK)
    if analysis.table.of_ilsvrc:
        paper = [math.nan if cell.paper_top5 is None else cell.paper_top5 for cell in cells]
        label, edge = "the paper's figure (ILSVRC 2014)", canvas.SERIES_COLORS[1]
        axes[1].plot(paper, places, "D", mfc="none", mec=edge, mew=1.5, label=label)
        canvas.add_legend(figure, axes[1], 2)
    return figure


def _draw_error_by_models(analysis: Analysis) -> Figure:
    """Draw mean, least and most error of all subsets of each size, a line for each number of crops."""
    figure, axes = canvas.create_figure(9.0, 3.7, 2)
    for rank, panel in enumerate(axes):
        canvas.label_axes(panel, f"Top-{(1, 5)[rank]} error", "models in the ensemble", "percent")
        for color, count in zip(canvas.SERIES_COLORS, sorted({crops for crops, _ in analysis.subsets}), strict=False):
            rows = {size: errors for (crops, size), errors in analysis.subsets.items() if crops == count}
            least, most = [row.least[rank] for row in rows.values()], [row.most[rank] for row in rows.values()]
            panel.fill_between(list(rows), least, most, color=color, alpha=0.13, lw=0)
            mean = [row.mean[rank] for row in rows.values()]
            panel.plot(list(rows), mean, "o-", ms=4, lw=1.8, color=color, label=format_count(count, "crop"))
        panel.set_xticks(list(rows))
    canvas.add_legend(figure, axes[0], 3)
    return figure


def _draw_reliability(analysis: Analysis) -> Figure:
    """Draw accuracy against confidence by bins, and the share of images in each bin."""
    figure, axes = canvas.create_figure(9.0, 3.7, 2)
    canvas.label_axes(axes[0], "Accuracy by confidence", "confidence", "share that is right")
    canvas.label_axes(axes[1], "Confidence of the answers", "confidence", "share of the images, %")
    axes[0].plot([0, 1], [0, 1], color=canvas.MUTED, lw=1, ls="dashed", label="confidence is right")
    for number, (calibration, color) in enumerate(zip(analysis.calibration, canvas.SERIES_COLORS, strict=False)):
        points = [(confidence, accuracy) for answers, confidence, accuracy in calibration.bins if answers]
        label = format_count(calibration.models, "model")
        axes[0].plot(*zip(*points, strict=True), "o-", ms=4, lw=1.6, color=color, label=label)
        total = sum(answers for answers, _, _ in calibration.bins)
        shares = [100 * answers / total for answers, _, _ in calibration.bins]
        width = 0.8 / len(shares) / len(analysis.calibration)
        left = [(place + 0.1) / len(shares) + number * width for place in range(len(shares))]
        axes[1].bar(left, shares, width=width, align="edge", color=color)
    axes[0].set(xlim=(0, 1), ylim=(0, 1.02), aspect="auto")
    axes[1].set(xlim=(0, 1))
    axes[1].grid(axis="x", visible=False)
    canvas.add_legend(figure, axes[0], 3)
    return figure


def _draw_training_curves(curves: ErrorCurves) -> Figure:
    """Draw the validation error of each member during training, with gaps where it is not finite."""
    figure, (axes,) = canvas.create_figure(9.0, 3.8)
    canvas.label_axes(axes, "", "epoch", "top-1 error, %")
    shown = [(name, line) for name, line in curves.items() if line][:MAX_CURVES]
    for number, (name, line) in enumerate(shown):
        points = [(epoch, error if math.isfinite(error) else math.nan) for epoch, error in line]
        turn, place = divmod(number, len(canvas.SERIES_COLORS))
        color, dashes = canvas.SERIES_COLORS[place], canvas.DASHES[turn % len(canvas.DASHES)]
        marker = "o" if len(line) < 2 else None
        axes.plot(
            *zip(*points, strict=True), label=canvas.escape_label(name), lw=1.5, color=color, ls=dashes, marker=marker
        )
    canvas.add_legend(figure, axes, 4)
    return figure
