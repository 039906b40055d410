"""The ranking and the noise of seeds, on literals."""

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.tuning import ranking
from orchestrator.tuning.trial import Metric, Trial, format_value, make_short_names
from tests.tuning import made

METRIC = Metric(name="top1_error")


def names(trials: list[Trial]) -> list[str]:
    return [one.name for one in ranking.rank_trials(trials, METRIC)]


# ------------------------------------------------------------------ order
def test_finished_trials_come_first_whatever_the_others_scored() -> None:
    trials = [
        made.trial(1, [50.0, 0.1], "pruned"),
        made.trial(2, [60.0, 40.0, 30.0, 9.0]),
        made.trial(3, [60.0, 40.0, 30.0, 8.0]),
        made.trial(4, [5.0, math.nan], "diverged"),
        made.trial(5, [50.0, 20.0, 12.0], "stopped"),
        made.trial(6, [50.0, 0.2], "pruned"),
        made.trial(7, [], "waiting"),
        made.trial(8, [1.0], "failed"),
        made.trial(9, [], "pruned"),
    ]
    assert names(trials) == ["t003", "t002", "t005", "t001", "t006", "t009", "t004", "t008", "t007"]
    best = ranking.find_winner(trials, METRIC)
    assert best is not None
    assert best.name == "t003"


def test_equals_are_ordered_by_epochs_then_by_number() -> None:
    trials = [made.trial(3, [9.0, 5.0]), made.trial(2, [5.0, 5.0]), made.trial(1, [9.0, 7.0, 5.0])]
    assert names(trials) == ["t002", "t003", "t001"]


def test_no_winner_without_a_finished_trial_with_a_score() -> None:
    assert ranking.find_winner([], METRIC) is None
    assert ranking.rank_trials([], METRIC) == ()
    trials = [made.trial(1, [5.0, 4.0], "pruned"), made.trial(2, [3.0, math.nan]), made.trial(3, [])]
    assert ranking.find_winner(trials, METRIC) is None
    assert names(trials) == ["t003", "t002", "t001"]


def test_every_random_sweep_has_finished_ones_before_pruned_ones_before_diverged_ones() -> None:
    for seed in range(20):
        states = [one.state for one in ranking.rank_trials(made.sweep(30, seed), METRIC)]
        assert states == sorted(states, key=["finished", "pruned", "diverged"].index)


def test_cost_shares_are_of_all_seconds() -> None:
    found = ranking.rank_trials([made.trial(1, [5.0] * 3), made.trial(2, [6.0], "pruned")], METRIC)
    assert [one.seconds for one in found] == [30.0, 10.0]
    assert ranking.compute_cost_shares(found) == [0.75, 0.25]
    assert ranking.compute_cost_shares([made.trial(1, [], "waiting")]) == [0.0]


# ------------------------------------------------------------------ tables
def test_names_are_as_short_as_they_can_be() -> None:
    paths = ["schedule.kind", "averaging.kind", "schedule.base_rate", "kind", "a.b.width", "c.b.width"]
    assert make_short_names([made.trial(1, [], assignment=dict.fromkeys(paths))]) == {
        "schedule.kind": "schedule.kind",
        "averaging.kind": "averaging.kind",
        "schedule.base_rate": "base_rate",
        "kind": "kind",
        "a.b.width": "a.b.width",
        "c.b.width": "c.b.width",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.01235"), (64, "64"), (None, "none"), (True, "true"), ([0.4, 1.0], "[0.4,1.0]"), ("a\nb", "a b")],
)
def test_values_in_short(value: object, text: str) -> None:
    assert format_value(value) == text


def test_the_plain_table() -> None:
    trials = [
        made.trial(1, [9.0, 8.125], assignment={"schedule.kind": "cosine", "schedule.base_rate": 0.0123456}),
        made.trial(2, [7.0], "diverged", {"schedule.kind": "step"}, reason="the loss\nis not finite"),
    ]
    assert ranking.render_text(ranking.rank_trials(trials, METRIC), METRIC).splitlines() == [
        "rank  trial  state     top-1 %  epochs  time  cost %  assignment",
        "   1  t001   finished     8.12       2  0:20    66.7  kind=cosine base_rate=0.01235",
        "   2  t002   diverged     7.00       1  0:10    33.3  kind=step (the loss is not finite)",
    ]


def test_scores_of_a_column_have_as_many_decimals() -> None:
    """Also values of a metric that is no error, which end in zeros at different places."""
    accuracy = Metric(name="accuracy", maximize=True)
    assert accuracy.format_column([82.5, 79.48, None, 100.0]) == ["82.50", "79.48", "-", "100.00"]
    assert accuracy.format_column([0.5, 3e-12]) == ["0.5", "3e-12"]
    assert accuracy.format_column([3.0, None]) == ["3", "-"]
    assert METRIC.format_column([5.0, 20.125]) == ["5.00", "20.12"]


def test_costs_in_the_first_rows_are_shares_of_all_trials() -> None:
    ranked = ranking.rank_trials([made.trial(1, [5.0] * 3), made.trial(2, [6.0], "pruned")], METRIC)
    (_, first) = ranking.render_text(ranked, METRIC, 1).splitlines()
    assert first.split() == ["1", "t001", "finished", "5.00", "3", "0:30", "75.0", "-"]
    assert ranking.render_markdown(ranked, METRIC, 1).splitlines()[2:] == [
        "| 1 | t001 | finished | 5.00 | 3 | 0:30 | 75.0 |"
    ]


def test_the_markdown_table_has_a_column_for_each_path() -> None:
    trials = [
        made.trial(1, [8.0], assignment={"a.kind": "x|y<b>", "a.rate": 0.5}),
        made.trial(2, [], "waiting", {"a.kind": "z"}),
    ]
    lines = ranking.render_markdown(ranking.rank_trials(trials, METRIC), METRIC).splitlines()
    assert lines[0] == "| rank | trial | state | top-1 error, % | epochs | time | cost, % | kind | rate |"
    assert lines[1] == "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == r"| 1 | t001 | finished | 8.00 | 1 | 0:10 | 100.0 | x\|y\<b\> | 0.5 |"
    assert lines[3] == "| 2 | t002 | waiting | - | 0 | 0:00 | 0.0 | z | - |"


def test_columns_have_names_of_their_own() -> None:
    head, rows = ranking.build_columns(
        ranking.rank_trials([made.trial(1, [8.0], assignment={"epochs": 9})], METRIC), METRIC
    )
    assert head[-1] == "recipe.epochs"
    assert rows[0][-1] == "9"
    assert len(set(head)) == len(head)


# ------------------------------------------------------------------ noise
def test_a_gain_beyond_noise() -> None:
    base, best = [5.0, 5.2, 4.9, 5.1, 5.3], [4.0, 4.3, 4.1, 3.9, 4.2]
    found = ranking.compare_seeds(base, best, METRIC)
    expected = stats.ttest_ind(base, best, equal_var=False).confidence_interval(0.95)
    assert found.gain == pytest.approx(1.0)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.base.deviation == pytest.approx(np.std(base, ddof=1))
    assert found.winner.mean == pytest.approx(4.1)
    assert found.beyond is True
    assert found.verdict == (
        "The winner is 1.00 points better than the base preset on average (5 seeds against 5; 95% interval of the "
        "gain 0.77 to 1.23): more than seed noise explains."
    )


def test_intervals_are_welchs_for_unlike_counts_and_spreads() -> None:
    random = np.random.default_rng(3)
    for count, other in ((2, 2), (2, 7), (3, 4), (10, 3)):
        base, best = random.normal(5, 1, count).tolist(), random.normal(4.5, 0.2, other).tolist()
        expected = stats.ttest_ind(base, best, equal_var=False)
        found = ranking.compare_seeds(base, best, METRIC)
        assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
        assert found.beyond == (expected.pvalue < 0.05)


@pytest.mark.filterwarnings("error")
def test_one_group_without_spread_gives_an_interval_and_no_warning() -> None:
    found = ranking.compare_seeds([5.0, 5.0, 5.0], [4.0, 4.5, 4.2], METRIC)
    assert found.interval is not None
    assert found.interval[0] < 0.766 < found.interval[1]


def test_a_gain_within_noise_and_few_seeds() -> None:
    found = ranking.compare_seeds([5.0, 5.6], [4.8, 5.3], METRIC)
    assert found.beyond is False
    assert "no more than seed noise may explain. So few seeds" in found.verdict


def test_a_loss_beyond_noise() -> None:
    found = ranking.compare_seeds([4.0, 4.1, 4.0, 4.1, 4.0], [6.0, 6.1, 6.0, 6.1, 6.0], METRIC)
    assert found.beyond is True
    assert found.gain == pytest.approx(-2.0)
    assert "2.00 points worse" in found.verdict
    assert "keep the base preset" in found.verdict


@pytest.mark.parametrize(
    ("base", "best", "said"),
    [
        ([5.0], [4.0], "too few or equal scores for an interval"),
        ([5.0, 5.1], [4.0], "too few or equal scores for an interval"),
        ([5.0, 5.0], [4.0, 4.0], "too few or equal scores for an interval"),
        ([5.0, 5.1], [math.nan, math.nan], "No verdict: no run of the winner gave a score."),
        ([math.nan], [4.0], "No verdict: no run of the base preset gave a score."),
        ([], [4.0], "No verdict: no run of the base preset gave a score."),
    ],
)
def test_no_interval_where_there_is_none(base: list[float], best: list[float], said: str) -> None:
    found = ranking.compare_seeds(base, best, METRIC)
    assert (found.interval, found.beyond) == (None, None)
    assert said in found.verdict


def test_lost_runs_are_counted() -> None:
    found = ranking.compare_seeds([5.0, 5.1, 5.2], [4.0, math.nan, 4.1], METRIC)
    assert (found.winner.lost, found.winner.scores) == (1, (4.0, 4.1))
    assert "1 of 3 runs of the winner gave no score and are left out, which flatters it." in found.verdict


# ------------------------------------------------------------------ any metric
ACCURACY = Metric(name="f1_macro", maximize=True)


def scored(number: int, score: float) -> Trial:
    return made.trial(number, [], epochs=[{"validation/averaged_f1_macro": score, "validation/raw_f1_macro": 0.0}])


def test_the_highest_value_of_a_metric_to_maximize_wins() -> None:
    trials = [scored(1, 0.5), scored(2, 0.8125), scored(3, 0.7)]
    assert [one.name for one in ranking.rank_trials(trials, ACCURACY)] == ["t002", "t003", "t001"]
    lines = ranking.render_text(ranking.rank_trials(trials, ACCURACY), ACCURACY).splitlines()
    assert lines[0].split()[3:5] == ["f1", "macro"]
    assert lines[1].split()[3] == "0.8125"


def test_a_gain_of_a_metric_to_maximize_is_positive() -> None:
    found = ranking.compare_seeds([0.5, 0.51, 0.5, 0.51, 0.5], [0.7, 0.71, 0.7, 0.71, 0.7], ACCURACY)
    assert found.gain == pytest.approx(0.2)
    assert found.verdict.startswith("The winner is 0.2 better than the base preset on average (5 seeds against 5;")
    assert "more than seed noise explains." in found.verdict
