"""Spaces as data: invalid ones, dimensions, conditions, grids, files, and the check that a space suits a recipe."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.lr_schedule import PolynomialDecay, StepDecay
from orchestrator.recipe.presets import googlenet_digits, googlenet_tiny
from orchestrator.tuning import space as spaces
from orchestrator.tuning.space import (
    Dimension,
    Space,
    check_space,
    choose_assignment,
    list_assignments,
    list_grid,
    load_space,
    to_hashable,
)

KINDS = {"values": ["step", "polynomial"]}
POWER = {"low": 0.25, "high": 1.0, "log": True, "when": {"schedule.kind": ["polynomial"]}}
AREAS = {"values": [[0.4, 1.0], [0.8, 1.0]]}
BASE = googlenet_digits()  # polynomial, base_rate 0.01, 26 epochs

finite = st.floats(-1e3, 999)
positive = st.floats(1e-6, 1e3)
shares = st.floats(0, 1, exclude_max=True)


def space(**dimensions: Any) -> Space:
    """Keys have __ for a dot."""
    return Space.from_dict(
        {"dimensions": {path.replace("__", "."): dimension for path, dimension in dimensions.items()}}
    )


def grid(of: Space) -> list[Any]:
    return list(list_grid(of, BASE).values())


# ------------------------------------------------------------------ invalid spaces
@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"low": 1, "high": 1}, "low must be below high, got low 1, high 1"),
        ({"low": 0.1, "high": 0.01}, "low must be below high, got low 0.1, high 0.01"),
        ({"low": 0, "high": 1, "log": True}, "low must be above 0 with log, got low 0, high 1"),
        ({"low": 0, "high": 1.5, "whole": True}, "low and high must be whole numbers with whole, got low 0, high 1.5"),
        ({"low": 1}, "high must be given, or values instead of a range"),
        ({}, "low and high must be given, or values instead of a range"),
        ({"values": []}, "dimensions.a.values: must have at least 1 item"),
        ({"values": [1], "low": 2}, "must have values or a range, got both values and low"),
        ({"values": [1], "log": True, "points": 4}, "must have values or a range, got both values and log, points"),
        ({"values": [1, 2, 1.0]}, "values must differ, got 1.0 twice; name each value once"),
        ({"values": [[0.4, 1], [0.4, 1.0]]}, "values must differ, got [0.4, 1.0] twice"),
        ({"values": [1], "when": {"b": []}}, "dimensions.a.when.b: must have at least 1 item"),
        ({"low": 0, "hihg": 1}, "dimensions.a.hihg: unknown key; did you mean high?"),
        ({"low": "much", "high": 1}, "dimensions.a.low: must be a number"),
        ({"low": 0, "high": 1, "points": 1}, "dimensions.a.points: must be at least 2"),
    ],
)
def test_invalid_dimensions(dimension: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space(a=dimension)
    assert str(caught.value).startswith("dimensions.a")
    assert message in str(caught.value)


def test_a_space_without_dimensions_is_invalid() -> None:
    with pytest.raises(ConfigError, match="dimensions: must have at least 1 item"):
        space()


def test_conditions_in_a_circle_are_invalid() -> None:
    with pytest.raises(ConfigError, match=r"in a circle, got (a -> b -> a|b -> a -> b)"):
        space(a={"values": [1], "when": {"b": [1]}}, b={"values": [1], "when": {"a": [1]}})
    with pytest.raises(ConfigError, match="in a circle, got a -> a"):
        space(a={"values": [1], "when": {"a": [1]}})


def test_numbers_and_booleans_differ_as_in_json() -> None:
    assert space(a={"values": [1, True, "1"]}).dimensions["a"].extremes == (1, True, "1")
    assert to_hashable(1) == to_hashable(1.0) != to_hashable(True)
    assert to_hashable([1, [2]]) == to_hashable((1.0, (2,)))


def test_what_is_stored_is_read_back() -> None:
    found = space(schedule__kind=KINDS, schedule__power=POWER, augmentation__area=AREAS)
    assert Space.from_dict(json.loads(found.to_json())) == found


# ------------------------------------------------------------------ one dimension
@pytest.mark.parametrize(
    ("dimension", "taken"),
    [
        ({"low": 0, "high": 1}, (0.0, 0.5, 1.0)),
        ({"low": 0, "high": 1, "points": 5}, (0.0, 0.25, 0.5, 0.75, 1.0)),
        ({"low": 1e-4, "high": 1e-2, "log": True}, (1e-4, 1e-3, 1e-2)),
        ({"low": 1e-4, "high": 1e-3, "log": True}, (1e-4, 0.000316228, 1e-3)),
        ({"low": 16, "high": 64, "log": True, "whole": True}, (16, 32, 64)),
        ({"low": 1, "high": 2, "whole": True, "points": 9}, (1, 2)),
        (AREAS, ([0.4, 1.0], [0.8, 1.0])),
        ({"values": [None, 1, True]}, (None, 1, True)),
    ],
)
def test_what_a_grid_takes(dimension: dict[str, Any], taken: tuple[Any, ...]) -> None:
    found = space(a=dimension).dimensions["a"].grid_values
    assert found == taken
    assert [type(value) for value in found] == [type(value) for value in taken]


@given(finite, finite, shares)
def test_draws_lie_in_the_range(one: float, other: float, share: float) -> None:
    low, high = sorted((one, other + 2e3))
    dimension = Dimension(low=low, high=high)
    assert low <= dimension.value_at(share) <= high
    assert dimension.accepts(dimension.value_at(share))
    assert all(low <= value <= high for value in dimension.grid_values)


@given(positive, st.floats(1.001, 1e6), shares)
def test_draws_on_a_logarithmic_scale(low: float, factor: float, share: float) -> None:
    found = Dimension(low=low, high=low * factor, log=True).value_at(share)
    assert low <= found <= low * factor
    assert math.log(found / low) / math.log(factor) == pytest.approx(share, abs=2e-5 / math.log(factor))


@given(st.integers(-50, 50), st.integers(1, 50), shares)
def test_whole_draws_are_whole(low: int, width: int, share: float) -> None:
    dimension = Dimension(low=low, high=low + width, whole=True)
    found = dimension.value_at(share)
    assert type(found) is int
    assert found in (dimension.choices or ())
    assert dimension.choices == tuple(range(low, low + width + 1))


def test_each_whole_number_and_each_value_gets_an_equal_part() -> None:
    evenly = [share / 600 for share in range(600)]
    whole, values = Dimension(low=1, high=3, whole=True), Dimension(values=("a", "b", "c"))
    assert [sum(whole.value_at(share) == n for share in evenly) for n in (1, 2, 3)] == pytest.approx([200] * 3, abs=1)
    assert [sum(values.value_at(share) == n for share in evenly) for n in "abc"] == pytest.approx([200] * 3, abs=1)


def test_what_a_dimension_takes() -> None:
    whole, real, pairs = Dimension(low=1, high=3, whole=True), Dimension(low=1, high=3), Dimension(values=((0.4, 1.0),))
    assert [whole.accepts(value) for value in (1, 3.0, 2.5, 0, True, "2")] == [True, True, False, False, False, False]
    assert [real.accepts(value) for value in (1, 2.5, 3.01, None)] == [True, True, False, False]
    assert [pairs.accepts(value) for value in ([0.4, 1], (0.4, 1.0), 0.4)] == [True, True, False]


# ------------------------------------------------------------------ conditions
def test_a_dimension_exists_under_its_kind_only() -> None:
    found = space(schedule__power=POWER, schedule__kind=KINDS)
    assert choose_assignment(found, BASE, lambda _, dimension: dimension.extremes[0]) == {"schedule.kind": "step"}
    assert choose_assignment(found, BASE, lambda _, dimension: dimension.extremes[-1]) == {
        "schedule.kind": "polynomial",
        "schedule.power": 1.0,
    }


def test_conditions_look_at_the_recipe_where_there_is_no_such_dimension() -> None:
    only = {"low": 0, "high": 0.5}
    kept = space(optimizer__momentum={**only, "when": {"schedule.kind": ["polynomial"], "epochs": [26.0]}})
    gone = space(optimizer__momentum={**only, "when": {"schedule.kind": ["step"]}})
    true_is_not_one = space(optimizer__momentum={**only, "when": {"model.auxiliary": [1]}})
    assert [len(list_grid(one, BASE)) for one in (kept, gone, true_is_not_one)] == [3, 1, 1]
    assert grid(gone) == [{}]


def test_a_chain_of_conditions_ends_with_its_first_link() -> None:
    found = space(
        a_last={"values": [5], "when": {"b_middle": [3]}},
        b_middle={"values": [3], "when": {"c_first": [1]}},
        c_first={"values": [1, 2]},
    )
    assert found.ordered_paths == ("c_first", "b_middle", "a_last")
    assert list_assignments(found, BASE) == [{"c_first": 1, "b_middle": 3, "a_last": 5}, {"c_first": 2}]


@given(st.permutations(["schedule.kind", "schedule.power", "augmentation.area", "optimizer.momentum"]))
def test_the_order_of_the_file_makes_no_difference(order: list[str]) -> None:
    dimensions = {
        "schedule.kind": KINDS,
        "schedule.power": POWER,
        "augmentation.area": AREAS,
        "optimizer.momentum": {"low": 0.5, "high": 0.9},
    }
    found = Space.from_dict({"dimensions": {path: dimensions[path] for path in order}})
    assert found.ordered_paths == ("augmentation.area", "optimizer.momentum", "schedule.kind", "schedule.power")
    assert [list(one.items()) for one in grid(found)][4] == [
        ("augmentation.area", [0.4, 1.0]),
        ("optimizer.momentum", 0.7),
        ("schedule.kind", "step"),
    ]


# ------------------------------------------------------------------ recipes
def test_another_kind_keeps_what_it_shares_and_has_defaults_for_the_rest() -> None:
    assert apply_overrides(BASE, {"schedule.kind": "step"}).schedule == StepDecay(base_rate=0.01, warmup_epochs=2.0)
    assert apply_overrides(BASE, {"schedule.power": 2.0, "schedule.base_rate": 1}).schedule == PolynomialDecay(
        base_rate=1.0, power=2.0, warmup_epochs=2.0
    )
    assert apply_overrides(BASE, {"augmentation.area": [0.2, 1]}).augmentation.area == (0.2, 1.0)
    assert apply_overrides(BASE, {}) == BASE


def test_an_invalid_recipe_says_why() -> None:
    with pytest.raises(ConfigError, match=r"schedule: final_rate must be at most base_rate \(0.01\), got 0.5"):
        apply_overrides(BASE, {"schedule.final_rate": 0.5})


# ------------------------------------------------------------------ grids
def test_a_grid_is_the_conditional_product() -> None:
    assert grid(space(schedule__power=POWER, schedule__kind=KINDS, schedule__base_rate={"values": [0.1, 1]})) == [
        {"schedule.base_rate": 0.1, "schedule.kind": "step"},
        {"schedule.base_rate": 0.1, "schedule.kind": "polynomial", "schedule.power": 0.25},
        {"schedule.base_rate": 0.1, "schedule.kind": "polynomial", "schedule.power": 0.5},
        {"schedule.base_rate": 0.1, "schedule.kind": "polynomial", "schedule.power": 1.0},
        {"schedule.base_rate": 1, "schedule.kind": "step"},
        {"schedule.base_rate": 1, "schedule.kind": "polynomial", "schedule.power": 0.25},
        {"schedule.base_rate": 1, "schedule.kind": "polynomial", "schedule.power": 0.5},
        {"schedule.base_rate": 1, "schedule.kind": "polynomial", "schedule.power": 1.0},
    ]


def test_a_grid_leaves_out_invalid_and_repeated_recipes() -> None:
    finals = space(schedule__base_rate={"values": [0.1, 0.001]}, schedule__final_rate={"values": [0.0, 0.01]})
    assert grid(finals) == [
        {"schedule.base_rate": 0.1, "schedule.final_rate": 0.0},
        {"schedule.base_rate": 0.1, "schedule.final_rate": 0.01},
        {"schedule.base_rate": 0.001, "schedule.final_rate": 0.0},
    ]
    # A text is read by its field: both are the same recipe.
    assert grid(space(schedule__base_rate={"values": [0.1, "0.1"]})) == [{"schedule.base_rate": 0.1}]


def test_a_grid_without_a_valid_trial_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"no trial of the grid is valid; the first: .*final_rate must be at most base_rate"
    ):
        list_grid(space(schedule__final_rate={"low": 0.1, "high": 1}), BASE)


def test_a_grid_that_is_too_large_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    big = space(schedule__base_rate={"low": 0.1, "high": 1, "points": 5}, optimizer__momentum={"low": 0, "high": 0.9})
    monkeypatch.setattr(spaces, "MAX_LISTED", 15)
    assert len(list_grid(big, BASE)) == 15
    monkeypatch.setattr(spaces, "MAX_LISTED", 14)
    with pytest.raises(ConfigError, match=r"at most 14 trials, got more; .* first of schedule.base_rate"):
        list_grid(big, BASE)


def test_whether_a_space_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = space(batch_size={"low": 1, "high": 4, "whole": True}, schedule__kind=KINDS)
    assert len(list_assignments(ended, BASE) or ()) == 8
    assert list_assignments(space(schedule__kind=KINDS, schedule__power=POWER), BASE) is None
    monkeypatch.setattr(spaces, "MAX_LISTED", 7)
    assert list_assignments(ended, BASE) is None


# ------------------------------------------------------------------ files
TOML = """
[dimensions."schedule.kind"]
values = ["step", "polynomial"]

[dimensions."schedule.power"]
low = 0.25
high = 1
log = true
when = { "schedule.kind" = ["polynomial"] }
"""


def test_a_file_is_json_or_toml(tmp_path: Path) -> None:
    wanted = space(schedule__kind=KINDS, schedule__power=POWER)
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(json.dumps({"dimensions": {"schedule.power": POWER, "schedule.kind": KINDS}}))
    assert load_space(str(tmp_path / "a.toml")) == load_space(f"file://{tmp_path}/a.json") == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.json", None, "absent.json: no such file"),
        ("a.yaml", "a: 1", "a.yaml: its name must end in .json or .toml"),
        ("a.json", "{", "a.json: cannot be read: Expecting property name"),
        ("a.json", '{"dimensions": {"a": {"values": [NaN]}}}', "dimensions.a.values.0: must be"),
        ("a.json", '{"dimensions": {"a": {"values": [1]}, "a": {"values": [2]}}}', "cannot be read: a is there twice"),
        ("a.json", "[1]", "Space must be a mapping"),
        ("a.json", '{"dims": {}}', "dims: unknown key"),
        ("a.toml", "a = ", "a.toml: cannot be read: Invalid value"),
        ("a.toml", "[dimensions.a]\nlow = 1\n", "a.toml: dimensions.a: high must be given"),
    ],
)
def test_invalid_files(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_space(str(tmp_path / name))
    assert str(caught.value).startswith("space: ")
    assert message in str(caught.value)


def test_a_folder_and_bytes_that_are_not_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for name in ("folder.json", "bytes.json"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            load_space(str(tmp_path / name))


# ------------------------------------------------------------------ what suits a recipe
TWO_KINDS = {"values": ["polynomial", "step"]}


def span(low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"low": low, "high": high, **more}


def under(*kinds: str) -> dict[str, Any]:
    return {"when": {"schedule.kind": list(kinds)}}


def get_error(dimensions: dict[str, Any]) -> str:
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
def test_a_dimension_that_the_recipe_rejects(path: str, dimension: dict[str, Any], message: str) -> None:
    assert message in get_error({path: dimension})


def test_a_range_of_whole_numbers_says_how_to_ask_for_them() -> None:
    assert get_error({"batch_size": span(16, 64)}).count("; set whole") == 2
    check_space(Space.from_dict({"dimensions": {"batch_size": span(16, 64, whole=True)}}), BASE)


def test_a_path_of_another_kind_says_which_condition_it_needs() -> None:
    assert get_error({"schedule.decay_factor": span(0.1, 0.9)}) == (
        "dimensions.schedule.decay_factor: belongs to schedule.kind step or exponential, not to polynomial; add when: "
        '{"schedule.kind": ["step", "exponential"]}'
    )


def test_a_path_that_one_of_the_kinds_lacks_needs_a_condition() -> None:
    # The recipe has a power, but not when the kind becomes step.
    assert "dimensions.schedule.power: belongs to schedule.kind polynomial, not to step" in get_error(
        {"schedule.kind": TWO_KINDS, "schedule.power": span(0.1, 1)}
    )
    check_space(
        Space.from_dict(
            {"dimensions": {"schedule.kind": TWO_KINDS, "schedule.power": span(0.1, 1, **under("polynomial"))}}
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
        ({"schedule.base_rate": [0.01]}, "one of the dimension's values (none of a range), got 0.01"),
    ],
)
def test_a_condition_that_never_holds(when: dict[str, Any], message: str) -> None:
    found = get_error(
        {
            "schedule.kind": TWO_KINDS,
            "schedule.base_rate": span(0.01, 0.1),
            "optimizer.momentum": span(0.5, 0.9, when=when),
        }
    )
    assert found.startswith("dimensions.optimizer.momentum.when: ")
    assert message in found


def test_every_invalid_dimension_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        check_space(
            Space.from_dict({"dimensions": {"schedule.rate": span(0, 1), "name": {"values": ["b"]}}}),
            BASE,
        )
    assert [problem.path for problem in caught.value.field_errors] == ["dimensions.name", "dimensions.schedule.rate"]


def test_steps_that_are_never_reached_are_invalid_under_their_kind() -> None:
    dimensions = {"schedule.kind": TWO_KINDS, "schedule.decay_epochs": span(1, 30, **under("step"))}
    assert get_error(dimensions).startswith(
        "dimensions.schedule.decay_epochs.high: 30.0 with schedule.kind 'step': schedule.decay_epochs must be below "
        "epochs (26), got 30: the first step is never reached"
    )
    # A constant rate has no step to reach.
    factor = {"values": [0.5, 1.0], **under("step")}
    check_space(Space.from_dict({"dimensions": {**dimensions, "schedule.decay_factor": factor}}), BASE)


def test_a_value_needs_only_some_setting_of_the_others() -> None:
    """Under the recipe's own rate of 0.01 a final rate of 0.02 is invalid, under one of 0.1 it is valid."""
    rates = {"schedule.base_rate": span(0.001, 0.1), "schedule.final_rate": span(0, 0.02)}
    check_space(Space.from_dict({"dimensions": rates}), BASE)
    # A kind whose defaults do not suit 2 epochs, but whose own dimension does.
    steps = {"schedule.kind": TWO_KINDS, "schedule.decay_epochs": span(0.1, 1, **under("step"))}
    check_space(Space.from_dict({"dimensions": steps}), googlenet_tiny())
    with pytest.raises(ConfigError, match=r"kind.values.1: 'step': schedule.decay_epochs must be below epochs"):
        check_space(Space.from_dict({"dimensions": {"schedule.kind": TWO_KINDS}}), googlenet_tiny())


def test_a_dimension_for_other_recipes_is_allowed_but_not_alone() -> None:
    steps = {"schedule.decay_factor": span(0.1, 1, **under("step"))}
    assert "none exists with this recipe" in get_error(steps)
    check_space(Space.from_dict({"dimensions": {**steps, "optimizer.momentum": span(0.5, 0.9)}}), BASE)
    # It is looked at all the same.
    wrong = {"schedule.decay_factor": span(0.1, 2, **under("step")), "optimizer.momentum": span(0.5, 0.9)}
    assert "dimensions.schedule.decay_factor.high: must be at most 1" in get_error(wrong)


def test_conditions_of_conditions_are_followed() -> None:
    deep = {
        "schedule.kind": TWO_KINDS,
        "schedule.decay_factor": {"values": [0.5, 0.9], **under("step")},
        "schedule.decay_epochs": span(1, 26, when={"schedule.decay_factor": [0.5]}),
    }
    found = get_error(deep)
    assert "dimensions.schedule.decay_epochs" in found
    assert "never reached" in found
    check_space(
        Space.from_dict(
            {"dimensions": {**deep, "schedule.decay_epochs": {**deep["schedule.decay_epochs"], "high": 25}}}
        ),
        BASE,
    )
