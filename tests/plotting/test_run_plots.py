import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from orchestrator.plotting.run_plots import (
    EnsembleCell,
    draw_contact_sheet,
    plot_curves,
    plot_ensemble_errors,
    plot_lr_schedule,
)


def inked(path: Path) -> float:
    """Share of the picture that is not white, from 0 to 1."""
    return float((imread(path)[..., :3].min(axis=2) < 0.99).mean())


def test_curves_of_seven_members(tmp_path: Path) -> None:
    series = {f"member-{n}": [(float(x), n + math.exp(-x)) for x in range(50)] for n in range(7)}
    series["diverged"] = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf)]
    series["one epoch"] = [(1.0, 2.0)]
    series["nothing yet"] = []
    path = tmp_path / "plots" / "curves.png"
    plot_curves(series, "Top-5 error", "images seen", "percent", str(path))
    assert imread(path).shape[1] >= 1200
    assert 0.01 < inked(path) < 0.5


def test_ensemble_table(tmp_path: Path) -> None:
    cells = [
        EnsembleCell(models, crops, 30.0, 29.0, 31.0, 0.0, 0.0, 0.4, 6.67)
        for models in (7, 1)
        for crops in (144, 1, 10)
    ]
    path = tmp_path / "table.png"
    plot_ensemble_errors(cells, str(path))
    assert 0.01 < inked(path) < 0.5


def test_a_schedule_of_ten_epochs(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "schedule.png"
    plot_lr_schedule([(x / 10, 0.1 * 0.9 ** (x // 20)) for x in range(100)], 1_281_167, "step", str(path))
    assert 0.01 < inked(path) < 0.5


def test_a_contact_sheet_shows_every_image_in_its_cell(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    images = [np.full((20 + 9 * n, 50, 3), colour, dtype=np.uint8) for n, colour in enumerate(colours)]
    path = tmp_path / "sheet.png"
    draw_contact_sheet(
        [("ant\n1", images[:3]), ("bee\n2", images[3:])], ["original", "epoch 1", "epoch 2"], "t", str(path)
    )
    picture = np.round(imread(path)[..., :3] * 255).astype(int)
    centres = {}
    for colour in colours:
        rows, columns = np.nonzero((picture == colour).all(axis=2))
        assert len(rows) > 1000, colour
        centres[colour] = (rows.mean(), columns.mean())
    first, second = colours[:3], colours[3:]
    assert max(centres[each][0] for each in first) < min(centres[each][0] for each in second), "one row above the other"
    for row in (first, second):
        across = [centres[each][1] for each in row]
        assert across == sorted(across)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'loss' is empty"):
        plot_curves({}, "loss", "x", "y", str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="at least one cell"):
        plot_ensemble_errors([], str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="'step' is empty"):
        plot_lr_schedule([], 1, "step", str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="'sheet' is empty"):
        draw_contact_sheet([], [], "sheet", str(tmp_path / "a.png"))
