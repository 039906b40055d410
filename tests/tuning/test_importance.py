"""The importance of paths: planted, absent, none."""

import math

import numpy as np
import pytest

from orchestrator.tuning.importance import MIN_TRIALS, compute_importance
from orchestrator.tuning.trial import Metric, Trial
from tests.tuning import made

METRIC = Metric(name="top1_error")


def planted(count: int, noise: float = 0.1) -> list[Trial]:
    """The rate matters most, the mirror a little, the others nothing."""
    random = np.random.default_rng(1)
    trials = []
    for number in range(1, count + 1):
        rate, mirror = float(10 ** random.uniform(-4, -1)), bool(random.integers(0, 2))
        assignment = {
            "augmentation.mirror": mirror,
            "idle.one": float(random.uniform(0, 1)),
            "schedule.base_rate": rate,
            "idle.two": str(random.choice(["a", "b", "c"])),
        }
        error = 5 + 4 * (math.log10(rate) + 2) ** 2 + 2 * mirror + float(random.normal(0, noise))
        trials.append(made.trial(number, [90.0, error], assignment=assignment))
    return trials


def test_the_planted_path_is_found() -> None:
    found = compute_importance(planted(40), METRIC)
    assert found.shares is not None
    assert next(iter(found.shares)) == "schedule.base_rate"
    assert found.shares["schedule.base_rate"] > 0.7
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert set(found.shares) == {"augmentation.mirror", "idle.one", "schedule.base_rate", "idle.two"}
    assert found.shares["idle.one"] + found.shares["idle.two"] < 0.2
    assert found.trials == 40
    assert found.note == "Of the 40 trials that reached epoch 2 of 26, at that epoch: other paths may matter later."


def test_the_same_trials_give_the_same_shares() -> None:
    assert compute_importance(planted(12), METRIC) == compute_importance(planted(12), METRIC)


def test_a_kind_has_the_credit_and_not_the_paths_that_come_with_it() -> None:
    random = np.random.default_rng(2)
    trials = []
    for number in range(1, 41):
        kind = str(random.choice(["step", "cosine", "polynomial"]))
        assignment: dict[str, object] = {"schedule.kind": kind}
        if kind == "step":
            assignment["schedule.decay_factor"] = float(random.uniform(0.5, 1))
        if kind == "polynomial":
            assignment["schedule.power"] = float(random.uniform(0.5, 2))
        error = {"step": 9.0, "cosine": 5.0, "polynomial": 7.0}[kind] + float(random.normal(0, 0.2))
        trials.append(made.trial(number, [error], assignment=assignment))
    found = compute_importance(trials, METRIC)
    assert found.shares is not None
    assert found.shares["schedule.kind"] > 0.8


# ------------------------------------------------------------------ which trials
def test_with_few_finished_it_takes_the_latest_epoch_that_enough_reached() -> None:
    trials = [
        made.trial(number, [50.0 + number, 40.0 + number, 30.0 + number][: 2 if number <= 8 else 1], "pruned",
                   {"a": float(number)})
        for number in range(1, 13)
    ]  # fmt: skip
    trials[0] = made.trial(1, [51.0, 41.0, 31.0], assignment={"a": 1.0})
    found = compute_importance(trials, METRIC)
    assert found.trials == 8
    assert found.shares == {"a": 1.0}
    assert found.note == (
        "Of the 8 trials that reached epoch 2 of 26, at that epoch: other paths may matter later, and a path that had "
        "trials end early looks too unimportant."
    )


def test_non_finite_scores_are_not_used() -> None:
    trials = [*planted(9), made.trial(10, [5.0, math.nan], "diverged", {"schedule.base_rate": 1.0})]
    assert compute_importance(trials, METRIC).trials == 9


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([], "0 trials with comparable scores are too few; it takes 8."),
        (planted(MIN_TRIALS - 1), "7 trials with comparable scores are too few"),
        (
            [made.trial(n, [5.0], assignment={"a": n}) for n in range(1, 10)],
            "All 9 trials have the same values or the same score",
        ),
        ([made.trial(n, [5.0 + n]) for n in range(1, 10)], "the same values or the same score: no path matters."),
        ([made.trial(n, [5.0 + n], assignment={"a": 1}) for n in range(1, 10)], "the same values or the same score"),
    ],
)
def test_none_with_a_reason(trials: list[Trial], said: str) -> None:
    found = compute_importance(trials, METRIC)
    assert found.shares is None
    assert said in found.note


def test_a_metric_to_maximize_has_the_same_shares_as_its_negative() -> None:
    trials = planted(20)
    gains = [
        made.trial(one.number, [], assignment=one.assignment, epochs=[{"gain": -(one.get_score(METRIC) or 0.0)}])
        for one in trials
    ]
    found = compute_importance(gains, Metric(name="gain", maximize=True))
    assert found.shares == pytest.approx(compute_importance(trials, METRIC).shares)
