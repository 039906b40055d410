"""Which trials the live table shows."""

from orchestrator.tuning import run_sweep
from orchestrator.tuning.trial import Metric
from tests.tuning import made

METRIC = Metric(name="top1_error")


def test_of_many_trials_the_best_are_shown_one_without_any_error_among_them() -> None:
    many = [made.trial(number, [50.0, 20.0 + number]) for number in range(1, run_sweep.MAX_ROWS + 1)]
    perfect, unscored = made.trial(100, [0.0, 0.0]), made.trial(101, [])
    shown = [trial.number for trial in run_sweep.select_shown_trials([*many, perfect, unscored], METRIC)]
    assert shown == [*range(1, run_sweep.MAX_ROWS), 100]


def test_running_trials_are_shown_whatever_their_score() -> None:
    many = [made.trial(number, [1.0]) for number in range(1, run_sweep.MAX_ROWS + 1)]
    running = made.trial(200, [99.0], "running")
    assert 200 in [trial.number for trial in run_sweep.select_shown_trials([*many, running], METRIC)]


def test_of_a_metric_to_maximize_the_highest_are_shown() -> None:
    metric = Metric(name="accuracy", maximize=True)
    many = [made.trial(n, [], epochs=[{"validation/raw_accuracy": 0.5 + n / 1000}]) for n in range(1, 41)]
    shown = [trial.number for trial in run_sweep.select_shown_trials(many, metric)]
    assert shown == [*range(11, 41)]
