"""What the command line of tune.py refuses, before anything is started."""

from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.recipe.presets import PRESETS
from orchestrator.tuning.config import SearchConfig, TuneJob


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


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"search__grace_epochs": 27}, r"grace_epochs must be at most epochs \(26\), got 27; lower it"),
        ({"cadence__validate_epochs": 7}, r"validate_epochs 7 is refused: a trial may be ended after 6 epochs"),
        ({"placement__workers": 2, "placement__min_workers": 1}, r"min_workers 1 is refused: trials share the cluster"),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_and_what_to_do(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        job(**changed)


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
def test_a_network_that_stands_at_chance_for_long_is_judged_later(preset: str, epochs: int, grace: int) -> None:
    recipe = PRESETS[preset]().model_copy(update={"epochs": epochs})
    assert SearchConfig().get_grace_epochs(recipe) == grace
    assert SearchConfig(grace_epochs=5).get_grace_epochs(recipe) == 5


def test_rungs_are_the_grace_times_the_reduction() -> None:
    assert job().rungs == (6, 18)
    assert job("googlenet-bn-digits").rungs == (3, 9)
