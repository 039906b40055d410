"""The plots of sweeps large and small: each is a picture, and none fails where there is little to draw."""

import io
import math

import numpy as np
import pytest
from matplotlib.image import imread

from orchestrator.tuning.report import sweep_plots
from orchestrator.tuning.report.sweep_plots import UNSCORED_COLOR, ScoreColors
from orchestrator.tuning.trial import Metric, Trial
from tests.tuning import made

METRIC = Metric(name="top1_error")
ONE = {"schedule.base_rate": 0.01}


def test_a_sweep_has_every_plot() -> None:
    found = sweep_plots.draw_plots(made.sweep(12), METRIC, {"schedule.base_rate": 0.8, "loss.label_smoothing": 0.2})
    assert tuple(found) == sweep_plots.PLOT_NAMES
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
        ([made.trial(1, [5.0], assignment=ONE)], ["errors", "budget", "rates"]),
        ([made.trial(1, [5.0, 4.0])], ["errors", "budget", "rates"]),
        ([made.trial(1, [math.nan], "diverged", ONE)], ["budget", "rates"]),
        (
            [made.trial(n, [math.nan, 5.0, math.inf], "diverged", ONE) for n in (1, 2)],
            ["errors", "budget", "rates"],
        ),
        (
            [made.trial(n, [5.0], "pruned", {"a$b.x_{y": "$1" * n, "c": None}) for n in (1, 2)],
            ["errors", "budget", "rates", "parallel"],
        ),
    ],
)
def test_little_to_draw(trials: list[Trial], names: list[str]) -> None:
    found = sweep_plots.draw_plots(trials, METRIC, None)
    assert list(found) == names
    assert all(plot.png.startswith(b"\x89PNG") for plot in found.values())


def test_rates_show_what_was_trained_and_faintly_what_was_not() -> None:
    trials = [made.trial(1, [50.0] * 26, assignment=ONE), made.trial(2, [60.0] * 3, "pruned", ONE)]
    lines = sweep_plots.draw_rates(trials, METRIC).axes[0].get_lines()
    ends = [float(np.asarray(line.get_xdata())[-1]) for line in lines if len(np.asarray(line.get_xdata()))]
    assert ends == pytest.approx([3.0, 26.0, 26.0, 26.0], abs=0.1)
    # The winner is drawn last, and wider.
    assert lines[2].get_linewidth() > 2 * lines[0].get_linewidth()
    assert np.nanmax(np.asarray(lines[2].get_ydata(), dtype=float)) == pytest.approx(0.01, rel=0.05)


def test_rates_far_apart_are_drawn_on_a_logarithmic_axis() -> None:
    trials = made.sweep(20)
    assert sweep_plots.draw_rates(trials, METRIC).axes[0].get_yscale() == "log"
    assert sweep_plots.draw_rates([made.trial(1, [5.0])], METRIC).axes[0].get_yscale() == "linear"


def test_the_best_so_far_never_rises_and_is_of_finished_trials() -> None:
    trials = [made.trial(1, [9.0] * 4), made.trial(2, [0.1], "pruned"), made.trial(3, [9.5] * 4), made.trial(4, [7.0])]
    axes = sweep_plots.draw_budget(trials, METRIC).axes[0]
    (line,) = [line for line in axes.get_lines() if line.get_label() == "best finished so far"]
    assert np.asarray(line.get_xdata()).tolist() == [4, 9, 10, 10]
    assert np.asarray(line.get_ydata()).tolist() == [9.0, 9.0, 7.0, 7.0]


def test_of_many_paths_the_most_important_are_shown() -> None:
    trials = [made.trial(n, [float(n)], assignment={f"p{path}": path * n for path in range(14)}) for n in range(1, 4)]
    figure = sweep_plots.draw_parallel_coordinates(trials, METRIC, {"p13": 0.9, "p0": 0.1})
    names = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert sorted(names) == sorted(["top-1 error, %", *(f"p{path}" for path in range(8)), "p13"])
    note = sweep_plots.format_parallel_note(trials, METRIC, {"p13": 0.9})
    assert "Of 14 searched paths the 9 most important are shown." in note


def test_the_best_of_a_metric_to_maximize_never_falls() -> None:
    metric = Metric(name="gain", maximize=True)
    trials = [made.trial(n, [], epochs=[{"gain": gain}]) for n, gain in enumerate((0.5, 0.75, 0.6), 1)]
    axes = sweep_plots.draw_budget(trials, metric).axes[0]
    (line,) = [line for line in axes.get_lines() if line.get_label() == "best finished so far"]
    assert np.asarray(line.get_ydata()).tolist() == [0.5, 0.75, 0.75, 0.75]
    darkness = [
        sum(color[:3])
        for color in map(ScoreColors([0.5, 0.6, 0.75], maximize=True).get_color, (0.5, 0.75))
        if not isinstance(color, str)
    ]
    assert darkness[0] > darkness[1]


def test_colours_tell_good_scores_apart_where_one_is_far_off() -> None:
    found = ScoreColors([4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 88.0])
    assert found.is_clipped
    assert found.get_color(88.0) == found.get_color(8.0) != found.get_color(6.0)
    assert found.get_color(None) == UNSCORED_COLOR
    assert not ScoreColors([4.0, 5.0, 6.0]).is_clipped
    assert ScoreColors([5.0]).get_color(5.0) == ScoreColors([5.0, 6.0]).get_color(5.0)
    assert ScoreColors([]).get_color(None) == UNSCORED_COLOR
