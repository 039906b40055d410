"""Dotted overrides, typed by the field."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides, build_draft, find_kinds_with_path, flatten_config
from tests.config.samples import Augment, Member, Polynomial, Recipe, Scheduled, StepDecay, Train
from tests.config.test_base import recipes

TAKEN: list[tuple[dict[str, Any], str, Any]] = [
    ({"schedule.decay_factor": "0.94"}, "schedule.decay_factor", 0.94),
    ({"schedule.decay_factor": ".5"}, "schedule.decay_factor", 0.5),
    ({"schedule.decay_factor": 1}, "schedule.decay_factor", 1.0),
    ({"epochs": "1_000"}, "epochs", 1000),
    ({"scales": "[0.08,1.0]"}, "scales", (0.08, 1.0)),
    ({"scales": "0.08, 1"}, "scales", (0.08, 1.0)),
    ({"scales": "(1,)"}, "scales", (1.0,)),
    ({"scales": "0.5"}, "scales", (0.5,)),
    ({"scales": "[]"}, "scales", ()),
    ({"scales": (1, 2)}, "scales", (1.0, 2.0)),
    ({"clip": "None"}, "clip", None),
    ({"clip": "1e-3"}, "clip", 0.001),
    ({"pooling": "max"}, "pooling", "max"),
    ({"loss": "logistic"}, "loss", "logistic"),
    ({"members": '[{"seed": 3}]'}, "members", (Member(seed=3),)),
    ({"members": (Member(seed=3),)}, "members", (Member(seed=3),)),
    ({"schedule": '{"kind": "polynomial"}', "schedule.power": "2"}, "schedule.power", 2.0),
    ({"schedule.power": "2", "schedule": Polynomial()}, "schedule.power", 2.0),
    ({"schedule.power": 2, "schedule": {"kind": "polynomial"}}, "schedule.power", 2.0),
]


@pytest.mark.parametrize(("overrides", "path", "value"), TAKEN)
def test_taken(overrides: dict[str, Any], path: str, value: Any) -> None:
    found = flatten_config(apply_overrides(Recipe(), overrides))[path]
    assert (found, type(found)) == (value, type(value))


def test_text_fields_keep_text_that_looks_like_something_else() -> None:
    train = apply_overrides(Train(), {"data": "1", "storage": "true", "cache": "/c", "dry_run": "TRUE"})
    assert (train.data, train.storage, train.cache, train.dry_run) == ("1", "true", "/c", True)
    assert apply_overrides(train, {"data": "none", "storage": "none"}).storage is None
    assert apply_overrides(train, {"data": "none"}).data == "none"


REJECTED: list[tuple[dict[str, Any], str]] = [
    (
        {"schedule.decay_factr": "1"},
        "schedule.decay_factr: unknown path; did you mean schedule.decay_factor or schedule.decay_epochs?",
    ),
    ({"decay-factor": "1"}, "decay-factor: unknown path; did you mean schedule.decay_factor?"),
    ({"epochs.x": "1"}, "epochs.x: unknown path; did you mean epochs?"),
    ({"schedule.power": "1"}, "schedule.power: belongs to schedule.kind polynomial; set that too"),
    (
        {"schedule.kind": "stpe"},
        "schedule.kind: must be one of step, polynomial, got 'stpe'; did you mean step?",
    ),
    ({"schedule.kind": 3}, "schedule.kind: must be one of step, polynomial, got 3"),
    ({"schedule.kind": ["step"]}, 'schedule.kind: must be one of step, polynomial, got ["step"]'),
    ({"epochs": "1.5"}, "epochs: must be a whole number, got 1.5"),
    ({"epochs": "ten"}, "epochs: must be a whole number, got 'ten'"),
    ({"epochs": ""}, "epochs: must be a whole number, got ''"),
    ({"epochs": "-1"}, "epochs: must be above 0, got -1"),
    ({"clip": "inf"}, "clip: must be a finite number, got inf"),
    (
        {"scales": "1,a"},
        "scales.1: must be a number, got 'a'",
    ),
    (
        {"epochs": "a", "clip": "b"},
        "clip: must be a number, got 'b'; epochs: must be a whole number, got 'a'",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REJECTED)
def test_rejected_in_one_line(overrides: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Recipe(), overrides)
    assert str(caught.value) == line


def test_deep_paths_are_named_in_full() -> None:
    with pytest.raises(ConfigError, match=r"^recipe\.schedule\.decay_factor: must be at most 1, got 2"):
        apply_overrides(Train(), {"recipe.schedule.decay_factor": "2"})


@given(st.permutations([("schedule.kind", "polynomial"), ("schedule.power", "0.25"), ("epochs", "3")]))
def test_order_does_not_matter_and_shared_fields_stay(order: list[tuple[str, str]]) -> None:
    start = Recipe(schedule=StepDecay(base_rate=0.5))
    changed = apply_overrides(start, dict(order))
    assert changed.schedule == Polynomial(base_rate=0.5, power=0.25)
    assert changed.epochs == 3, "too few for the old kind, fine for the new one"
    assert start.schedule == StepDecay(base_rate=0.5)


def test_a_union_inside_a_variant_that_was_only_just_chosen() -> None:
    changed = apply_overrides(
        Augment(),
        {"ops.noise.power": 2, "ops.noise.kind": "polynomial", "ops.kind": "scheduled", "ops.pair": "3,4"},
    )
    assert changed.ops == Scheduled(noise=Polynomial(base_rate=0.01, power=2), pair=(3, "4"))


def test_an_absent_branch_is_a_leaf_that_can_be_set_whole_then_in_part() -> None:
    assert flatten_config(Augment())["other"] is None
    changed = apply_overrides(Augment(), {"other": '{"kind": "polynomial"}', "other.power": "3"})
    assert changed.other == Polynomial(power=3)
    assert apply_overrides(changed, {"other": "none"}) == Augment()
    with pytest.raises(ConfigError, match=r"^other\.power: belongs to other\.kind polynomial; set that too$"):
        apply_overrides(Augment(), {"other.power": "3"})


def test_switching_to_the_same_kind_changes_nothing() -> None:
    start = Recipe(schedule=StepDecay(decay_factor=0.5))
    assert apply_overrides(start, {"schedule.kind": "step"}) == start


@given(recipes)
def test_every_leaf_can_be_put_back(recipe: Recipe) -> None:
    assert apply_overrides(Recipe(), flatten_config(recipe)) == recipe


@given(recipes)
def test_every_leaf_can_be_put_back_as_text(recipe: Recipe) -> None:
    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    leaves = {p: v for p, v in flatten_config(recipe).items() if p not in ("members", "pooling")}
    written = {path: text(value) if value != () else "[]" for path, value in leaves.items()}
    assert flatten_config(apply_overrides(Recipe(), written)) | {"members": None, "pooling": None} == flatten_config(
        recipe
    ) | {
        "members": None,
        "pooling": None,
    }


def test_paths_lists_every_leaf_in_order() -> None:
    assert list(flatten_config(Train())) == [
        "data",
        "storage",
        "cache",
        "dry_run",
        "recipe.schedule.kind",
        "recipe.schedule.base_rate",
        "recipe.schedule.decay_factor",
        "recipe.schedule.decay_epochs",
        "recipe.scales",
        "recipe.epochs",
        "recipe.clip",
        "recipe.pooling",
        "recipe.loss",
        "recipe.members",
    ]


def test_a_draft_has_the_shape_but_is_not_validated() -> None:
    shape = build_draft(Recipe(schedule=Polynomial(), epochs=3), {"schedule.kind": "step"})
    assert isinstance(shape.schedule, StepDecay)
    assert shape.epochs == 3


def test_homes() -> None:
    assert find_kinds_with_path(Recipe(), "schedule.power") == ["polynomial"]
    assert find_kinds_with_path(Recipe(), "schedule.nothing") == []
    assert find_kinds_with_path(Recipe(), "epochs.power") == []
    assert find_kinds_with_path(Recipe(), "nowhere.power") == []
