"""Strictness and round trips."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.config.base import to_jsonable
from orchestrator.config.errors import ConfigError, FieldError
from tests.config.samples import Member, Polynomial, Pooling, Recipe, StepDecay, Train

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-9, max_value=1e9)
schedules = st.one_of(
    st.builds(StepDecay, base_rate=positive, decay_factor=st.floats(min_value=1e-9, max_value=1)),
    st.builds(Polynomial, base_rate=positive, power=positive),
)
recipes = st.builds(
    Recipe,
    schedule=schedules,
    scales=st.lists(finite, max_size=4).map(tuple),
    epochs=st.integers(min_value=8),
    clip=st.none() | finite,
    pooling=st.sampled_from(Pooling),
    loss=st.sampled_from(["softmax", "logistic"]),
    members=st.lists(st.builds(Member, seed=st.integers(), width=finite), max_size=3).map(tuple),
)


@given(recipes)
def test_dict_and_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe


def test_an_int_is_a_fine_float() -> None:
    assert Recipe(scales=(0, 1)).scales == (0.0, 1.0)
    assert type(Recipe(scales=(0, 1)).scales[1]) is float
    assert type(Recipe().scales[1]) is float, "defaults are validated too"


def test_frozen_and_hashable() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.epochs = 3  # type: ignore[misc]
    assert hash(recipe) == hash(Recipe())


def test_json_text_is_sorted_and_indented() -> None:
    assert Member().to_json() == '{\n  "seed": 0,\n  "width": 1.0\n}'


def test_from_dict_takes_configs_enums_paths_and_tuples() -> None:
    data = {"recipe": {"schedule": Polynomial(), "pooling": Pooling.MAX, "scales": (1,)}, "cache": Path("c")}
    train = Train.from_dict(data)
    assert train.cache == "c"
    assert train.recipe.pooling is Pooling.MAX
    assert train.recipe.schedule == Polynomial()


REFUSED: list[tuple[Any, str]] = [
    ({"epochs": "1"}, "epochs: must be a whole number, got '1'"),
    ({"epochs": 1.5}, "epochs: must be a whole number, got 1.5"),
    ({"epochs": True}, "epochs: must be a whole number, got true"),
    ({"clip": True}, "clip: must be a number, got true"),
    ({"clip": math.inf}, "clip: must be a finite number, got inf"),
    ({"clip": math.nan}, "clip: must be a finite number, got nan"),
    ({"epochs": 0}, "epochs: must be above 0, got 0"),
    ({"scales": 3}, "scales: must be a list, got 3"),
    (
        {"scales": [1, "a"]},
        "scales.1: must be a number, got 'a'",
    ),
    ({"members": [{"seed": 1.5}]}, "members.0.seed: must be a whole number, got 1.5"),
    ({"members": [{"sed": 1}]}, "members.0.sed: unknown key; did you mean seed?"),
    ({"pooling": "men"}, "pooling: must be one of mean, max, got 'men'; did you mean mean?"),
    (
        {"loss": "softmx"},
        "loss: must be one of softmax, logistic, got 'softmx'; did you mean softmax?",
    ),
    ({"loss": "x"}, "loss: must be one of softmax, logistic, got 'x'"),
    (
        {"schedule": {"kind": "step", "decay_factor": 1.5}},
        "schedule.decay_factor: must be at most 1, got 1.5",
    ),
    (
        {"schedule": {"kind": "step", "decay_factr": 1}},
        "schedule.decay_factr: unknown key; did you mean decay_factor?",
    ),
    (
        {"schedule": {"kind": "poly"}},
        "schedule.kind: must be one of step, polynomial, got 'poly'; did you mean polynomial?",
    ),
    ({"schedule": {}}, "schedule.kind: must be given"),
    (
        {"schedule": 3},
        "schedule: must be a mapping, got 3",
    ),
    ({"epochs": 3}, "epochs must be 8 or more for a step schedule, got 3"),
    (
        {"epochz": 3, "clip": "a"},
        "clip: must be a number, got 'a'; epochz: unknown key; did you mean epochs?",
    ),
    (
        {"zzz": 3},
        "zzz: unknown key; known keys: schedule, scales, epochs, clip, pooling, loss, members",
    ),
    ({"clip": {1}}, "Recipe holds a value that JSON cannot: {1} of type set has no JSON form"),
    (
        {"loss": "\udc80"},
        "holds text that is no valid Unicode; give names in UTF-8, with PYTHONUTF8=1 in an ASCII locale",
    ),
    ([1], "Recipe must be a mapping of its fields, not list"),
]


@pytest.mark.parametrize(("data", "line"), REFUSED, ids=[line[:30] for _, line in REFUSED])
def test_from_dict_refuses_in_one_line(data: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data)
    assert str(caught.value) == line


def test_long_values_are_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict({"epochs": "x" * 1000})
    assert len(str(caught.value)) < 130


def test_python_construction_raises_pydantics_own_error() -> None:
    with pytest.raises(ValueError, match="epochs"):
        Recipe(epochs=0)
    with pytest.raises(ValidationError, match="tuple"):
        Recipe(scales=[0.1])  # type: ignore[arg-type]


def test_config_error_crosses_processes() -> None:
    error = ConfigError(FieldError("a.b", "is wrong"), "so is all")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "a.b: is wrong; so is all"
    assert copy.field_errors == (FieldError("a.b", "is wrong"), FieldError("", "so is all"))


def test_plain_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match="set has no JSON form"):
        to_jsonable({1})
