"""What the score hangs on: planted, absent, none."""

import math
import subprocess
import sys

import numpy as np
import pytest

from orchestrator.tuning.importance import MIN_TRIALS, compute_importance, encode_assignments
from orchestrator.tuning.trial import MetricName, Trial
from tests.tuning import made

METRIC: MetricName = "top1_error"


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
    assert found.shares["idle.one"] + found.shares["idle.two"] < 0.1
    assert found.trials == 40
    assert found.explained is not None
    assert found.explained > 0.7
    assert found.told.startswith("Of the 40 finished trials, each at its end. The forest foretells ")


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


def test_noise_is_told_as_noise() -> None:
    random = np.random.default_rng(4)
    trials = [
        made.trial(
            number, [float(random.normal(5, 1))], assignment={"a": float(random.uniform()), "b": number % 2 == 0}
        )
        for number in range(1, 25)
    ]
    found = compute_importance(trials, METRIC)
    assert found.explained is not None
    assert found.explained < 0.1
    assert found.shares is None or "take these shares for noise" in found.told


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
    assert found.told.startswith("Too few trials finished (1), so of the 8 that reached epoch 2, at that epoch")


def test_scores_that_are_no_numbers_are_not_used() -> None:
    trials = [*planted(9), made.trial(10, [5.0, math.nan], "diverged", {"schedule.base_rate": 1.0})]
    assert compute_importance(trials, METRIC).trials == 9


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([], "0 trials with comparable scores are too few to tell what matters; it takes 8."),
        (planted(MIN_TRIALS - 1), "7 trials with comparable scores are too few"),
        ([made.trial(n, [5.0], assignment={"a": n}) for n in range(1, 10)], "All 9 trials have the same score"),
        ([made.trial(n, [5.0 + n]) for n in range(1, 10)], "No path was searched."),
        ([made.trial(n, [5.0 + n], assignment={"a": 1}) for n in range(1, 10)], "do not show that any searched path"),
    ],
)
def test_none_with_a_reason(trials: list[Trial], said: str) -> None:
    found = compute_importance(trials, METRIC)
    assert found.shares is None
    assert said in found.told


# ------------------------------------------------------------------ encoding
def test_encoding() -> None:
    assignments = [
        {"rate": 0.001, "kind": "x", "power": 1.0},
        {"rate": 0.1, "kind": "y"},
        {"rate": 0.01, "kind": "x", "power": 3.0, "lone": 5},
    ]
    matrix, groups = encode_assignments([made.trial(n, [], "waiting", one) for n, one in enumerate(assignments, 1)])
    # Whether `power` is there, kind says already; of `lone` nothing else does.
    assert groups == {"rate": [0], "kind": [1, 2], "power": [3], "lone": [4, 5]}
    expected = [[-3, 1, 0, 1, 5, 1], [-1, 0, 1, 2, 5, 1], [-2, 1, 0, 3, 5, 0]]
    assert np.allclose(matrix, expected)


@pytest.mark.process
def test_scikit_learn_is_imported_late() -> None:
    code = "import sys, orchestrator.tuning.importance, orchestrator.tuning.ranking; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
