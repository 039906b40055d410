"""Checks of the command line of tune.py, before anything is started."""

from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.recipe.presets import PRESETS
from orchestrator.tuning.config import SearchConfig, TuneJob
from orchestrator.tuning.run_sweep import SweepPlan
from orchestrator.tuning.space import Space
from orchestrator.tuning.trial import Metric


def job(preset: str = "googlenet-digits", **changed: Any) -> TuneJob:
    """A job with some values changed, by dotted paths."""
    found: dict[str, Any] = {"recipe": PRESETS[preset]().to_dict(), "destination": {"data": "digits"}}
    for path, value in changed.items():
        inner = found
        *parts, last = path.split("__")
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return TuneJob.from_dict(found)


def get_metric(config: TuneJob) -> Metric:
    """Return the metric of the sweep of a job."""
    space = Space.from_dict({"dimensions": {"schedule.base_rate": {"values": [0.01]}}})
    return SweepPlan(config, config.recipe, space, "").metric


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"search__grace_epochs": 27}, r"grace_epochs must be at most epochs \(26\), got 27; set a lower one"),
        ({"search__metric": "f1", "search__mode": "max"}, r"metric must be one of .* loss without further metrics"),
        (
            {"cadence__validate_epochs": 7},
            r"validate_epochs must be at most 6, .* got 7; set a lower one",
        ),
        (
            {"placement__workers": 2, "placement__min_workers": 1},
            r"min_workers must not be set in a sweep, got 1",
        ),
    ],
)
def test_an_impossible_value_is_rejected_with_what_to_do(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**changed)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"metric": "f1"}, "mode must be min or max for metric 'f1', got none; set --mode min if lower is better"),
        ({"metric": "top5_error", "mode": "max"}, "mode must be min for metric 'top5_error', got max; leave it out"),
    ],
)
def test_the_direction_of_a_metric_must_be_known(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig.from_dict(search)


def test_the_metric_of_a_plug_in_is_accepted() -> None:
    metrics = [{"kind": "my_module:F1"}]
    f1 = job(search__metric="f1", search__mode="max", placement__execution__metrics=metrics)
    assert get_metric(f1) == Metric(name="f1", maximize=True)


def test_the_metric_of_a_sweep_has_its_direction() -> None:
    assert get_metric(job()) == Metric(name="top1_error")
    assert get_metric(job(search__metric="loss", search__mode="min")) == Metric(name="loss")
    assert get_metric(job(search__metric="loss", search__mode="max")) == Metric(name="loss", maximize=True)


@pytest.mark.parametrize(
    ("preset", "epochs", "grace"),
    [
        ("googlenet-digits", 26, 6),
        ("googlenet-digits", 9, 2),
        ("googlenet-digits", 250, 28),
        ("googlenet-bn-digits", 26, 3),
        ("lenet-5-digits", 27, 3),
        ("lenet-5-digits", 1, 1),
    ],
)
def test_a_network_that_stays_at_the_level_of_chance_is_judged_later(preset: str, epochs: int, grace: int) -> None:
    recipe = PRESETS[preset]().model_copy(update={"epochs": epochs})
    assert SearchConfig().get_grace_epochs(recipe) == grace
    assert SearchConfig(grace_epochs=5).get_grace_epochs(recipe) == 5
