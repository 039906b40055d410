"""Names that must never change by accident."""

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given

from orchestrator.config.base import compute_fingerprint
from tests.config.samples import Member, Pooling, Recipe
from tests.config.test_base import recipes


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
    assert compute_fingerprint(Pooling.MAX) == compute_fingerprint("max")
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
