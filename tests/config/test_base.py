"""Strictness and round trips."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from orchestrator.config.base import Config, compute_fingerprint, to_jsonable
from orchestrator.config.errors import ConfigError, FieldError
from tests.config.samples import Member, Polynomial, Recipe, StepDecay, Train

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
    pooling=st.sampled_from(("mean", "max")),
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
    data = {"recipe": {"schedule": Polynomial(), "pooling": "max", "scales": (1,)}, "cache": Path("c")}
    train = Train.from_dict(data)
    assert train.cache == "c"
    assert train.recipe.pooling == "max"
    assert train.recipe.schedule == Polynomial()


REJECTED: list[tuple[Any, str]] = [
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


@pytest.mark.parametrize(("data", "line"), REJECTED, ids=[line[:30] for _, line in REJECTED])
def test_from_dict_refuses_in_one_line(data: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data)
    assert str(caught.value) == line


def test_a_reason_without_words_of_our_own_is_pydantics() -> None:
    class Named(Config):
        """A file, by its digest."""

        digest: str = Field("", pattern="^([0-9a-f]{4})?$", max_length=4)

    with pytest.raises(ConfigError) as caught:
        Named.from_dict({"digest": "x"})
    assert str(caught.value) == "digest: must match pattern '^([0-9a-f]{4})?$', got 'x'"


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


# ------------------------------------------------------------------ names that must never change by accident
def test_literal_values_are_pinned() -> None:
    # If one of these fails, every run in every bucket loses its name.
    assert compute_fingerprint(Member(seed=3, width=0.5), "digits", 7) == "02c7dc8c2c"
    assert compute_fingerprint() == "4f53cda18c"


def test_stable_over_processes_and_hash_seeds() -> None:
    program = "from orchestrator.config.base import compute_fingerprint as f; print(f({'b': 1, 'a': (2.5,)}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {compute_fingerprint({"a": [2.5], "b": 1})}


def test_equal_values_have_equal_names() -> None:
    assert compute_fingerprint(Member(width=1)) == compute_fingerprint(Member(width=1.0))
    assert compute_fingerprint({"x": -0.0}) == compute_fingerprint({"x": 0.0})
    assert compute_fingerprint({"a": 1, "b": 2}) == compute_fingerprint({"b": 2, "a": 1})
    assert compute_fingerprint(Member()) == compute_fingerprint({"width": 1.0, "seed": 0})
    assert compute_fingerprint({"m": Member()}) == compute_fingerprint({"m": Member().to_dict()})


def test_different_values_have_different_names() -> None:
    parts: list[Any] = [Member(), Member(seed=1), "a", 1, 1.5, None, True, {}, [], [1], ["1"], ("a", "b")]
    assert len({compute_fingerprint(part) for part in parts}) == len(parts)
    assert compute_fingerprint("a", "b") != compute_fingerprint("b", "a")
    assert compute_fingerprint("ab") != compute_fingerprint("a", "b")


@given(recipes)
def test_survives_the_round_trip(recipe: Recipe) -> None:
    assert compute_fingerprint(Recipe.from_dict(recipe.to_dict())) == compute_fingerprint(recipe)


def test_length() -> None:
    assert len(compute_fingerprint("x")) == 10
    assert compute_fingerprint("x", length=64).startswith(compute_fingerprint("x", length=4))


def test_refuses_what_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        compute_fingerprint({"x": math.nan})
    with pytest.raises(TypeError, match="must be text, got 1"):
        compute_fingerprint({1: 2})
    with pytest.raises(TypeError, match="no JSON form"):
        compute_fingerprint({"x": {1}})
