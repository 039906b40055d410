from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from orchestrator.plotting import canvas
from orchestrator.plotting.canvas import draw_contact_sheet, plot_lr_schedule


def inked(path: Path) -> float:
    """Share of the picture that is not white, from 0 to 1."""
    return float((imread(path)[..., :3].min(axis=2) < 0.99).mean())


def test_a_schedule_of_ten_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    render = canvas.render_png

    def record(figure: Figure, title: str) -> bytes:
        figures.append(figure)
        return render(figure, title)

    monkeypatch.setattr(canvas, "render_png", record)
    path = tmp_path / "plots" / "schedule.png"
    rates = [(x / 10, 0.1 * 0.9 ** (x // 20)) for x in range(100)]
    plot_lr_schedule(rates, 1_281_167, "step", str(path))
    assert 0.01 < inked(path) < 0.5
    (axes,) = figures[0].axes
    (line,) = axes.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), rates)
    assert line.get_drawstyle() == "steps-post", "a rate holds until the next step"
    assert axes.get_xlim() == (0.0, 9.9)
    assert axes.get_ylim()[0] == 0.0
    (samples,) = axes.child_axes
    assert samples.get_xlim() == pytest.approx((0.0, 9.9 * 1_281_167))


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
