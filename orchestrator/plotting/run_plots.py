"""Pictures of a run before it is trained: its learning rate, and images as training sees them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from orchestrator.plotting.canvas import MUTED, SERIES_COLORS, create_figure, label_axes, render_png
from orchestrator.storage import file_io

_CELL, _CAPTION = 1.15, 1.5  # inches


def plot_lr_schedule(rates: Sequence[tuple[float, float]], samples_per_epoch: int, title: str, path: str) -> None:
    """Draw a learning rate over a whole training into a PNG at `path`.

    rates: pairs of epochs done and rate. Raises ValueError when there is none.
    """
    if not rates:
        raise ValueError(f"rates of the plot {title!r} must not be empty; give at least one point")
    figure, (axes,) = create_figure(9.0, 4.5)
    label_axes(axes, "", "epochs done", "learning rate")
    # A rate holds for a whole step: no slopes where it jumps.
    axes.plot(*zip(*rates, strict=True), color=SERIES_COLORS[0], linewidth=1.6, drawstyle="steps-post")
    axes.set_xlim(0.0, max(epochs for epochs, _ in rates))
    axes.set_ylim(bottom=0.0)
    per_epoch = float(samples_per_epoch)
    to_samples = (lambda x: np.multiply(x, per_epoch), lambda x: np.divide(x, per_epoch))
    samples = axes.secondary_xaxis("top", functions=to_samples)
    samples.xaxis.set_major_formatter(EngFormatter(sep=""))
    samples.set_xlabel("samples seen", color=MUTED)
    samples.tick_params(colors=MUTED)
    file_io.write_bytes(path, render_png(figure, title))


def draw_contact_sheet(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], columns: Sequence[str], title: str, path: str
) -> None:
    """Draw a grid of images, each H x W x 3 uint8 of any size, into a PNG at `path`.

    rows: a caption and an image for each of the columns. columns: their captions. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError(f"rows of the contact sheet {title!r} must not be empty; give at least one")
    figure, (axes,) = create_figure(_CELL * len(columns) + _CAPTION, _CELL * len(rows) + 0.9)
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            height, width = image.shape[:2]
            # In units of a cell; the rest of it is the gap between images.
            across, down = (0.47 * side / max(height, width) for side in (width, height))
            axes.imshow(image, extent=(column - across, column + across, row + down, row - down))
    # A line separates the original, in the first column, from the rest.
    axes.axvline(0.5, color=MUTED, linewidth=1.0)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks(range(len(rows)), [caption for caption, _ in rows])
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    file_io.write_bytes(path, render_png(figure, title))
