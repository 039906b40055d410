"""The plots of sweeps large and small: each is a picture, and none fails where there is little to draw."""

import io
import math

import numpy as np
import pytest
from matplotlib.image import imread

from orchestrator.tuning import sweep_plots
from orchestrator.tuning.trial import Metric, Trial
from tests.tuning import made

METRIC = Metric(name="top1_error")
ONE = {"schedule.base_rate": 0.01}


def test_a_sweep_has_every_plot() -> None:
    found = sweep_plots.draw_plots(made.sweep(12), METRIC, {"schedule.base_rate": 0.8, "loss.label_smoothing": 0.2})
    assert list(found) == ["errors", "parallel"]
    for plot in found.values():
        image = imread(io.BytesIO(plot.png))
        assert image.shape[0] > 200
        assert image.shape[1] > 800
        # Something else than white is on it.
        assert np.mean(image[..., :3].min(axis=2) < 0.9) > 0.005


@pytest.mark.parametrize(
    ("trials", "names"),
    [
        ([], []),
        ([made.trial(1, [], "waiting", ONE)], []),
        ([made.trial(1, [5.0], assignment=ONE)], ["errors"]),
        ([made.trial(1, [5.0, 4.0])], ["errors"]),
        ([made.trial(1, [math.nan], "diverged", ONE)], []),
        (
            [made.trial(n, [math.nan, 5.0, math.inf], "diverged", ONE) for n in (1, 2)],
            ["errors"],
        ),
        (
            [made.trial(n, [5.0], "pruned", {"a$b.x_{y": "$1" * n, "c": None}) for n in (1, 2)],
            ["errors", "parallel"],
        ),
    ],
)
def test_little_to_draw(trials: list[Trial], names: list[str]) -> None:
    found = sweep_plots.draw_plots(trials, METRIC, None)
    assert list(found) == names
    assert all(plot.png.startswith(b"\x89PNG") for plot in found.values())


def test_the_winner_is_wider_and_scores_far_apart_have_a_logarithmic_axis() -> None:
    trials = [made.trial(1, [50.0] * 3, "pruned", ONE), made.trial(2, [50.0, 4.0], assignment=ONE)]
    axes = sweep_plots.draw_errors(trials, METRIC).axes[0]
    widths = {line.get_label(): line.get_linewidth() for line in axes.get_lines()}
    assert widths["t002, the winner"] > 2 * widths["pruned (1)"]
    assert axes.get_yscale() == "log"
    assert sweep_plots.draw_errors(trials[:1], METRIC).axes[0].get_yscale() == "linear"


def test_of_many_paths_the_most_important_are_shown() -> None:
    trials = [made.trial(n, [float(n)], assignment={f"p{path}": path * n for path in range(14)}) for n in range(1, 4)]
    figure = sweep_plots.draw_parallel_coordinates(trials, METRIC, ["p13", "p0"])
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["top-1 error, %", "p0", "p13"]
    shares = {f"p{path}": 1 / 14 for path in range(14)}
    note = sweep_plots.draw_plots(trials, METRIC, shares)["parallel"].note
    assert "Of 14 searched paths the 9 most important are shown." in note
