"""Presets against their source (arXiv 1409.4842), and recipes as values."""

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import flatten_config
from orchestrator.ray_backend.run_spec import JobConfig, build_job_presets
from orchestrator.recipe import presets
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import CosineDecay, StepDecay, compute_lr

# Section 5: network and loss. Section 6: optimizer, schedule, crops. The rest is the Caffe replication's.
PAPER: dict[str, object] = {
    "model.kind": "googlenet",
    "model.image_size": 224,
    "model.width": 1.0,
    "model.module": "reduced",
    "model.auxiliary": True,
    "model.dropout": 0.4,
    "model.auxiliary_dropout": 0.7,
    "model.lrn": True,
    "model.stem": "plain",
    "model.batch_norm": False,
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
    "averaging.kind": "running",
    "loss.label_smoothing": 0.0,
    "optimizer.clip_norm": None,
    "initial_weights": "",
}


def differing(one: Recipe, other: Recipe) -> set[str]:
    left, right = flatten_config(one), flatten_config(other)
    return {path for path in left.keys() | right.keys() if left.get(path) != right.get(path)}


def test_googlenet_imagenet_is_the_papers() -> None:
    values = flatten_config(presets.googlenet_imagenet())
    assert {path: values[path] for path in PAPER} == PAPER
    augmentation = presets.googlenet_imagenet().augmentation
    assert set(augmentation.interpolations) == {"bilinear", "area", "nearest", "cubic"}
    assert (augmentation.area, augmentation.aspect, augmentation.mirror) == ((0.08, 1.0), (3 / 4, 4 / 3), True)
    # arXiv 1312.5402: 0.5 to 1.5; Krizhevsky 2012: 0.1.
    assert set(augmentation.photometric.to_dict().values()) == {0.5, 0.1}
    assert augmentation.photometric.lighting == 0.1
    assert augmentation.stages == ("decode", "crop", "photometric")


def test_googlenet_imagenet_has_the_replications_rate_per_image() -> None:
    recipe = presets.googlenet_imagenet()
    assert isinstance(recipe.schedule, StepDecay)
    assert recipe.schedule.base_rate / recipe.batch_size == pytest.approx(0.01 / 32)


def test_the_wide_one_differs_by_name_and_width_only() -> None:
    base, wide = presets.googlenet_imagenet(), presets.googlenet_imagenet_wide()
    assert differing(base, wide) == {"name", "model.width"}
    assert flatten_config(wide)["model.width"] > flatten_config(base)["model.width"]


@pytest.mark.parametrize("name", ["googlenet-imagenet", "googlenet-digits"])
def test_the_ablation_differs_by_its_modules_only(name: str) -> None:
    base, naive = presets.PRESETS[name](), presets.PRESETS[name + "-naive"]()
    assert differing(base, naive) == {"name", "model.module"}
    assert flatten_config(naive)["model.module"] == "naive"


def test_the_variant_with_batch_norm_says_that_it_is_not_the_papers() -> None:
    recipe = presets.googlenet_bn_imagenet()
    values = flatten_config(recipe)
    assert (values["model.batch_norm"], values["model.lrn"]) == (True, False)
    assert (values["schedule.kind"], values["loss.label_smoothing"]) == ("cosine", 0.1)
    for name in ("googlenet-bn-imagenet", "googlenet-bn-digits"):
        assert build_job_presets(JobConfig)[name].summary.startswith("Not the paper's")


# AlexNet: Krizhevsky 2012, sections 4 and 5. ZFNet: arXiv 1311.2901, section 3. NIN: Caffe's model zoo (450,000 and
# 200,000 steps of 64 images). VGG-16: arXiv 1409.1556, section 3.1. SPP-net: arXiv 1406.4729, section 3.1.
@pytest.mark.parametrize(
    ("name", "size", "batch", "epochs", "drops", "dropout"),
    [
        ("alexnet-imagenet", 227, 128, 90, 4, 0.5),
        ("zfnet-imagenet", 224, 128, 70, 3, 0.5),
        ("nin-imagenet", 224, 64, 23, 2, 0.5),
        ("vgg-16-imagenet", 224, 256, 74, 3, 0.5),
        ("spp-net-imagenet", 224, 128, 70, 2, 0.5),
    ],
)
def test_baselines_are_trained_as_by_their_authors(
    name: str, size: int, batch: int, epochs: int, drops: int, dropout: float
) -> None:
    recipe = presets.PRESETS[name]()
    values = flatten_config(recipe)
    assert values["model.kind"] == name.removesuffix("-imagenet")
    assert (values["model.image_size"], recipe.batch_size, recipe.epochs) == (size, batch, epochs)
    assert values["model.dropout"] == dropout
    assert (values["optimizer.momentum"], values["optimizer.weight_decay"]) == (0.9, 5e-4)
    assert compute_lr(recipe.schedule, 0, 1, epochs) == 0.01
    assert compute_lr(recipe.schedule, epochs - 0.01, 1, epochs) == pytest.approx(0.01 * 0.1**drops)
    assert recipe.loss.label_smoothing == 0


def test_presets_on_digits_are_those_made_for_them() -> None:
    assert presets.DEFAULT in presets.DIGITS_PRESETS
    for name, recipe in presets.PRESETS.items():
        assert (recipe().model.image_size == 32) == (name in presets.DIGITS_PRESETS), name


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
        recipe.model.image_size = 64  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_summaries_are_one_line_of_text(name: str) -> None:
    summary = build_job_presets(JobConfig)[name].summary
    assert summary.endswith(".")
    assert "\n" not in summary


def test_the_default_preset_exists() -> None:
    assert presets.DEFAULT in presets.PRESETS


# ------------------------------------------------------------------ recipes as values
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "epoch": 3}, "epoch"),
        ({"name": "x", "model": {"kind": "googlenet", "widht": 1.0}}, "model.widht"),
        ({"name": "x", "epochs": 0}, "epochs"),
        ({"name": "x", "epochs": "3"}, "epochs"),
        ({"name": "x", "batch_size": 0}, "batch_size"),
        ({"name": "Not A Name"}, "name"),
        ({}, "name"),
        ({"name": "x", "optimizer": {"momentum": 1.0}}, "optimizer.momentum"),
        ({"name": "x", "averaging": {"kind": "running", "start": 1.0}}, "averaging.start"),
        ({"name": "x", "schedule": {"kind": "step", "base_rate": 0}}, "schedule.base_rate"),
        ({"name": "x", "schedule": {"kind": "linear"}}, "schedule"),
        ({"name": "x", "schedule": {"kind": "cosine", "power": 1.0}}, "schedule.power"),
        ({"name": "x", "seeds": {"order": -1}}, "seeds.order"),
        ({"name": "x", "model": {"kind": "googlenet", "dropout": 1.0}}, "model.dropout"),
        ({"name": "x", "augmentation": {"area": [0.5, 0.2]}}, "augmentation"),
        ({"name": "x", "order": {"lanes": 1000, "window": 1000}}, "order"),
        ({"name": "x", "precision": "float64"}, "precision"),
        ({"name": "x", "version": 1}, "version"),
        ({"name": "x", "averaging": {"kind": "exponential", "half_life_epochs": 0}}, "averaging.half_life_epochs"),
        ({"name": "x", "averaging": {"kind": "running", "half_life_epochs": 1}}, "averaging.half_life_epochs"),
        ({"name": "x", "loss": {"label_smoothing": 1.0}}, "loss.label_smoothing"),
        ({"name": "x", "optimizer": {"clip_norm": 0}}, "optimizer.clip_norm"),
        ({"name": "x", "initial_weights": "weights.pt"}, "initial_weights"),
        ({"name": "x", "epochs": float("inf")}, "epochs"),
        ({"name": "x", "epochs": 10**9}, "epochs"),
        ({"name": "x", "schedule": {"kind": "step", "decay_epochs": float("inf")}}, "schedule.decay_epochs"),
        ({"name": "x", "schedule": {"kind": "cosine", "base_rate": float("nan")}}, "schedule.base_rate"),
        ({"name": "x", "schedule": {"kind": "cosine", "final_rate": 0.1}}, "final_rate must be"),
        ({"name": "x", "epochs": 8}, "schedule.decay_epochs"),
        ({"name": "x", "epochs": 4, "schedule": {"kind": "cosine", "warmup_epochs": 4.0}}, "schedule.warmup_epochs"),
        ({"name": "x", "epochs": 3, "schedule": {"kind": "step", "warmup_epochs": 4.0}}, "schedule.warmup_epochs"),
    ],
)
def test_an_impossible_value_is_rejected_by_name(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(data)
    assert message in str(caught.value)


def test_a_schedule_is_known_by_its_kind() -> None:
    values = Recipe.from_dict({"name": "x", "schedule": {"kind": "cosine", "base_rate": 1}}).schedule
    assert values == CosineDecay(base_rate=1.0)
    assert Recipe(name="x").schedule == StepDecay()


@pytest.mark.process
def test_recipes_are_had_without_torch() -> None:
    code = "import sys, orchestrator.recipe.presets, orchestrator.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
