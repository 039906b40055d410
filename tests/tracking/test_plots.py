import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from orchestrator.tracking.plots import EnsembleCell, curves, ensemble_table


def inked(path: Path) -> float:
    """Share of the picture that is not white, from 0 to 1."""
    return float((imread(path)[..., :3].min(axis=2) < 0.99).mean())


def test_curves_of_seven_members(tmp_path: Path) -> None:
    series = {f"member-{n}": [(float(x), n + math.exp(-x)) for x in range(50)] for n in range(7)}
    series["diverged"] = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf)]
    series["one epoch"] = [(1.0, 2.0)]
    series["nothing yet"] = []
    path = tmp_path / "plots" / "curves.png"
    curves(series, "Top-5 error", "images seen", "percent", str(path))
    assert imread(path).shape[1] >= 1200
    assert 0.01 < inked(path) < 0.5


def test_ensemble_table(tmp_path: Path) -> None:
    cells = [
        EnsembleCell(models, crops, 30.0, 29.0, 31.0, 0.0, 0.0, 0.4, 6.67)
        for models in (7, 1)
        for crops in (144, 1, 10)
    ]
    path = tmp_path / "table.png"
    ensemble_table(cells, str(path))
    assert 0.01 < inked(path) < 0.5


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'loss' is empty"):
        curves({}, "loss", "x", "y", str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="at least one cell"):
        ensemble_table([], str(tmp_path / "a.png"))
