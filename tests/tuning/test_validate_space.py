"""Spaces that do not suit a recipe are refused before anything is trained, in words that say what to do."""

from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.recipe.presets import googlenet_digits, googlenet_tiny
from orchestrator.tuning.space import Space
from orchestrator.tuning.validate_space import check_space

BASE = googlenet_digits()  # polynomial, base_rate 0.01, 26 epochs
KINDS = {"values": ["polynomial", "step"]}


def span(low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"low": low, "high": high, **more}


def under(*kinds: str) -> dict[str, Any]:
    return {"when": {"schedule.kind": list(kinds)}}


def refusal(dimensions: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        check_space(Space.from_dict({"dimensions": dimensions}), BASE)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "dimension", "message"),
    [
        (
            "schedule.base_rat",
            span(0, 1),
            "dimensions.schedule.base_rat: unknown path; did you mean schedule.base_rate",
        ),
        ("schedule", {"values": ["step"]}, "dimensions.schedule: holds several fields; name one of them: schedule."),
        ("optimizer.momentum.x", span(0, 1), "dimensions.optimizer.momentum.x: unknown path"),
        ("name", {"values": ["b"]}, "dimensions.name: must not be searched: it only names runs; leave it out"),
        (
            "version",
            {"values": [2]},
            "dimensions.version: must not be searched: it defines the meaning of a",
        ),
        (
            "epochs",
            span(1, 9, whole=True),
            "dimensions.epochs: must not be searched: trials are",
        ),
        (
            "seeds.order",
            span(0, 9, whole=True),
            "dimensions.seeds.order: must not be searched: the luckiest",
        ),
        (
            "initial_weights",
            {"values": [""]},
            "dimensions.initial_weights: must not be searched: trials",
        ),
        ("schedule.base_rate", span(-1, 1), "dimensions.schedule.base_rate.low: must be above 0"),
        ("schedule.base_rate", span(1, 1e3), "dimensions.schedule.base_rate.high: must be at most"),
        ("schedule.kind", {"values": ["poly"]}, "values.0: must be one of"),
        ("augmentation.area", {"values": [[0.4, 1], [1, 0.4]]}, "values.1: [1, 0.4]: area must be 0 < smallest"),
        ("augmentation.area", {"values": [0.4]}, "values.0: must be a list"),
        ("loss.label_smoothing", {"values": [0.1, 1]}, "values.1: must be below 1"),
        ("batch_size", span(16, 64), "batch_size.low: must be a whole number"),
        ("schedule.final_rate", span(0, 0.02), "final_rate.high: 0.02: final_rate must be at most base_rate"),
    ],
)
def test_a_dimension_that_the_recipe_refuses(path: str, dimension: dict[str, Any], message: str) -> None:
    assert message in refusal({path: dimension})


def test_a_range_of_whole_numbers_says_how_to_ask_for_them() -> None:
    assert refusal({"batch_size": span(16, 64)}).count("; set whole") == 2
    check_space(Space.from_dict({"dimensions": {"batch_size": span(16, 64, whole=True)}}), BASE)


def test_a_path_of_another_kind_says_which_condition_it_needs() -> None:
    assert refusal({"schedule.decay_factor": span(0.1, 0.9)}) == (
        "dimensions.schedule.decay_factor: belongs to schedule.kind step or exponential, not to polynomial; add when: "
        '{"schedule.kind": ["step", "exponential"]}'
    )


def test_a_path_that_one_of_the_kinds_lacks_needs_a_condition() -> None:
    # The recipe has a power, but not when the kind becomes step.
    assert "dimensions.schedule.power: belongs to schedule.kind polynomial, not to step" in refusal(
        {"schedule.kind": KINDS, "schedule.power": span(0.1, 1)}
    )
    check_space(
        Space.from_dict(
            {"dimensions": {"schedule.kind": KINDS, "schedule.power": span(0.1, 1, **under("polynomial"))}}
        ),
        BASE,
    )


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            {"schedule.kind": ["cosine"]},
            "one of the dimension's values ('polynomial', 'step'), got 'cosine'",
        ),
        ({"schedule.kinds": ["step"]}, "schedule.kinds: unknown path; did you mean schedule.kind?"),
        ({"model.module": ["reducd"]}, "model.module: must be one of reduced, naive"),
        ({"model.width": [99]}, "model.width: must be at most 8"),
        ({"schedule.base_rate": [0.01]}, "schedule.base_rate is a range, which hardly ever is one of these"),
    ],
)
def test_a_condition_that_never_holds(when: dict[str, Any], message: str) -> None:
    found = refusal(
        {
            "schedule.kind": KINDS,
            "schedule.base_rate": span(0.01, 0.1),
            "optimizer.momentum": span(0.5, 0.9, when=when),
        }
    )
    assert found.startswith("dimensions.optimizer.momentum.when: ")
    assert message in found


def test_every_dimension_that_is_refused_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_space(
            Space.from_dict({"dimensions": {"schedule.rate": span(0, 1), "name": {"values": ["b"]}}}),
            BASE,
        )
    assert [problem.path for problem in caught.value.field_errors] == ["dimensions.name", "dimensions.schedule.rate"]


def test_steps_that_are_never_reached_are_refused_under_their_kind() -> None:
    dimensions = {"schedule.kind": KINDS, "schedule.decay_epochs": span(1, 30, **under("step"))}
    assert refusal(dimensions).startswith(
        "dimensions.schedule.decay_epochs.high: 30.0 with schedule.kind 'step': schedule.decay_epochs must be below "
        "epochs (26), got 30: the first step is never reached"
    )
    # A constant rate has no step to reach.
    factor = {"values": [0.5, 1.0], **under("step")}
    check_space(Space.from_dict({"dimensions": {**dimensions, "schedule.decay_factor": factor}}), BASE)


def test_a_value_needs_only_some_setting_of_the_others() -> None:
    """Under the recipe's own rate of 0.01 a final rate of 0.02 is refused, under one of 0.1 it is not."""
    rates = {"schedule.base_rate": span(0.001, 0.1), "schedule.final_rate": span(0, 0.02)}
    check_space(Space.from_dict({"dimensions": rates}), BASE)
    # A kind whose defaults do not suit 2 epochs, but whose own dimension does.
    steps = {"schedule.kind": KINDS, "schedule.decay_epochs": span(0.1, 1, **under("step"))}
    check_space(Space.from_dict({"dimensions": steps}), googlenet_tiny())
    with pytest.raises(ConfigError, match=r"kind.values.1: 'step': schedule.decay_epochs must be below epochs"):
        check_space(Space.from_dict({"dimensions": {"schedule.kind": KINDS}}), googlenet_tiny())


def test_a_dimension_for_other_recipes_is_allowed_but_not_alone() -> None:
    steps = {"schedule.decay_factor": span(0.1, 1, **under("step"))}
    assert "none exists with this recipe" in refusal(steps)
    check_space(Space.from_dict({"dimensions": {**steps, "optimizer.momentum": span(0.5, 0.9)}}), BASE)
    # It is looked at all the same.
    wrong = {"schedule.decay_factor": span(0.1, 2, **under("step")), "optimizer.momentum": span(0.5, 0.9)}
    assert "dimensions.schedule.decay_factor.high: must be at most 1" in refusal(wrong)


def test_conditions_of_conditions_are_followed() -> None:
    deep = {
        "schedule.kind": KINDS,
        "schedule.decay_factor": {"values": [0.5, 0.9], **under("step")},
        "schedule.decay_epochs": span(1, 26, when={"schedule.decay_factor": [0.5]}),
    }
    found = refusal(deep)
    assert "dimensions.schedule.decay_epochs" in found
    assert "never reached" in found
    check_space(
        Space.from_dict(
            {"dimensions": {**deep, "schedule.decay_epochs": {**deep["schedule.decay_epochs"], "high": 25}}}
        ),
        BASE,
    )
