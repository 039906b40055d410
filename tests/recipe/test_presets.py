"""Presets against their source (arXiv 1409.4842), and recipes as values."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import paths
from orchestrator.recipe import presets
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.schedule import CosineDecay, StepDecay

# Section 5: network and loss. Section 6: optimizer, schedule, crops. The rest is the Caffe replication's.
PAPER: dict[str, object] = {
    "model.image_size": 224,
    "model.width": 1.0,
    "model.module": "reduced",
    "model.auxiliary": True,
    "model.dropout": 0.4,
    "model.auxiliary_dropout": 0.7,
    "model.lrn": True,
    "loss.auxiliary_weight": 0.3,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 2e-4,
    "schedule.kind": "step",
    "schedule.decay_factor": 0.96,
    "schedule.decay_epochs": 8.0,
    "epochs": 250,
    "augmentation.area": (0.08, 1.0),
    "augmentation.aspect": (3 / 4, 4 / 3),
    "augmentation.mirror": True,
    "preprocessing.mean": (123.0, 117.0, 104.0),
    "precision": "float32",
}


def differing(one: Recipe, other: Recipe) -> set[str]:
    left, right = paths(one), paths(other)
    return {path for path in left.keys() | right.keys() if left.get(path) != right.get(path)}


def test_googlenet_imagenet_is_the_papers() -> None:
    found = paths(presets.googlenet_imagenet())
    assert {path: found[path] for path in PAPER} == PAPER
    assert set(presets.googlenet_imagenet().augmentation.interpolations) == {"bilinear", "area", "nearest", "cubic"}


def test_googlenet_imagenet_has_the_replications_rate_per_image() -> None:
    recipe = presets.googlenet_imagenet()
    assert recipe.schedule.base_rate / recipe.batch_size == pytest.approx(0.01 / 32)


def test_the_wide_one_differs_by_name_and_width_only() -> None:
    base, wide = presets.googlenet_imagenet(), presets.googlenet_imagenet_wide()
    assert differing(base, wide) == {"name", "model.width"}
    assert wide.model.width > base.model.width


def test_the_tiny_one_differs_from_the_digits_in_what_makes_it_quick() -> None:
    base, tiny = presets.googlenet_digits(), presets.googlenet_tiny()
    quick = {"name", "epochs", "batch_size", "model.width", "schedule.base_rate", "schedule.warmup_epochs"}
    assert differing(base, tiny) == quick
    assert tiny.epochs < base.epochs


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_are_whole_valid_frozen_and_travel(name: str) -> None:
    recipe = presets.PRESETS[name]()
    assert recipe.name == name
    assert recipe == presets.PRESETS[name](), "the same at every call"
    # model_copy does not validate: a preset must be what validation would let pass.
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.epochs = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.model.width = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_summaries_are_one_line_of_text(name: str) -> None:
    assert presets.summary(name).endswith(".")
    assert "\n" not in presets.summary(name)


def test_the_default_preset_exists() -> None:
    assert presets.DEFAULT in presets.PRESETS


# ------------------------------------------------------------------ recipes as values
@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"name": "x", "epoch": 3}, "epoch"),
        ({"name": "x", "model": {"widht": 1.0}}, "model.widht"),
        ({"name": "x", "epochs": 0}, "epochs"),
        ({"name": "x", "epochs": "3"}, "epochs"),
        ({"name": "x", "batch_size": 0}, "batch_size"),
        ({"name": "Not A Name"}, "name"),
        ({}, "name"),
        ({"name": "x", "optimizer": {"momentum": 1.0}}, "optimizer.momentum"),
        ({"name": "x", "averaging": {"start": 1.0}}, "averaging.start"),
        ({"name": "x", "schedule": {"kind": "step", "base_rate": 0}}, "schedule.base_rate"),
        ({"name": "x", "schedule": {"kind": "linear"}}, "schedule"),
        ({"name": "x", "schedule": {"kind": "cosine", "power": 1.0}}, "schedule.power"),
        ({"name": "x", "seeds": {"order": -1}}, "seeds.order"),
        ({"name": "x", "model": {"dropout": 1.0}}, "model.dropout"),
        ({"name": "x", "augmentation": {"area": [0.5, 0.2]}}, "augmentation"),
        ({"name": "x", "order": {"lanes": 1000, "window": 1000}}, "order"),
        ({"name": "x", "precision": "float16"}, "precision"),
        ({"name": "x", "version": 2}, "version"),
        ({"name": "x", "epochs": 3, "schedule": {"kind": "step", "warmup_epochs": 4.0}}, "schedule.warmup_epochs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(data: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data)
    assert told in str(caught.value)


def test_a_schedule_is_known_by_its_kind() -> None:
    found = Recipe.from_dict({"name": "x", "schedule": {"kind": "cosine", "base_rate": 1}}).schedule
    assert found == CosineDecay(base_rate=1.0)
    assert Recipe(name="x").schedule == StepDecay()


@pytest.mark.process
def test_recipes_are_had_without_torch() -> None:
    code = "import sys, orchestrator.recipe.presets, orchestrator.training.job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
