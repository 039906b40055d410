"""Plug-ins in recipes: their code is part of what a run is, and what is wrong with them is known before it starts."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.base import compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides
from orchestrator.config.plugins import compute_source_digest
from orchestrator.models.config import ModelPlugin
from orchestrator.recipe import presets
from orchestrator.recipe.config import (
    AdamWConfig,
    OptimizerPlugin,
    Recipe,
    SGDConfig,
    check_plugins,
    collect_code,
    pin_code,
)
from orchestrator.recipe.lr_schedule import SchedulePlugin, compute_lr

HALVES = "def halves(share, steps=4):\n    return 0.5 ** int(share * steps)\n"


@pytest.fixture(autouse=True)
def own_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's with a schedule."""
    path = tmp_path / "own_rates.py"
    path.write_text(HALVES)
    monkeypatch.syspath_prepend(tmp_path)
    compute_source_digest.cache_clear()
    yield path
    compute_source_digest.cache_clear()
    sys.modules.pop("own_rates", None)


def recipe(**changes: Any) -> Recipe:
    return apply_overrides(presets.googlenet_tiny(), changes)


def test_recipes_without_plugins_are_as_they_were() -> None:
    base = recipe()
    assert pin_code(base) is base
    assert base.to_dict()["optimizer"] == {"clip_norm": None, "momentum": 0.9, "weight_decay": 2e-4}
    assert "code" not in base.to_dict()
    assert "class_weights" not in base.to_dict()["loss"]
    assert Recipe.from_dict(base.to_dict()) == base
    assert recipe(**{"optimizer.kind": "sgd"}) == base


def test_kinds_of_optimizers_are_chosen_by_name() -> None:
    changed = recipe(**{"optimizer.kind": "adamw", "optimizer.clip_norm": 1.0})
    assert changed.optimizer == AdamWConfig(clip_norm=1.0, weight_decay=0.01), "SGD's weight decay is another thing"
    changed = recipe(**{"optimizer.kind": "adamw", "optimizer.weight_decay": 0.05})
    assert changed.optimizer == AdamWConfig(weight_decay=0.05)
    modern = apply_overrides(presets.googlenet_bn_digits(), {"optimizer.clip_norm": 2.0})
    assert apply_overrides(modern, {"optimizer.kind": "sgd"}) == modern, "the same kind keeps all"
    assert apply_overrides(modern, {"optimizer.kind": "adamw"}).optimizer == AdamWConfig(clip_norm=2.0)
    changed = recipe(**{"optimizer.kind": "torch.optim:RMSprop", "optimizer.args": '{"alpha": 0.9}'})
    assert changed.optimizer == OptimizerPlugin(kind="torch.optim:RMSprop", args={"alpha": 0.9})
    assert Recipe.from_dict(changed.to_dict()) == changed
    assert compute_fingerprint(changed) != compute_fingerprint(recipe())
    with pytest.raises(ConfigError, match=r"must be one of sgd, adamw, package.module:attribute, got 'adam'; did"):
        recipe(**{"optimizer.kind": "adam"})
    with pytest.raises(ConfigError, match=r"belongs to optimizer.kind sgd; set that too"):
        recipe(**{"optimizer.kind": "adamw", "optimizer.momentum": 0.5})
    assert Recipe.from_dict({"name": "x", "optimizer": {}}).optimizer == SGDConfig()


def test_changed_code_is_another_run(own_rates: Path) -> None:
    plain = recipe(**{"schedule.kind": "own_rates:halves", "model.kind": "examples.small_cnn:SmallCNN"})
    pinned = pin_code(plain)
    assert pinned.code.keys() == {"own_rates:halves", "examples.small_cnn:SmallCNN"}
    assert collect_code(pinned) == pinned.code
    assert Recipe.from_dict(pinned.to_dict()) == pinned
    own_rates.write_text(HALVES.replace("0.5", "0.4"))
    compute_source_digest.cache_clear()
    changed = collect_code(pinned)
    assert [kind for kind in changed if changed[kind] != pinned.code[kind]] == ["own_rates:halves"]
    now = pin_code(pinned)
    assert now.code != pinned.code
    assert compute_fingerprint(now) != compute_fingerprint(pinned)


def test_torchs_own_optimizers_have_no_code_of_the_users() -> None:
    assert pin_code(recipe(**{"optimizer.kind": "torch.optim:RMSprop"})).code == {}


def test_transforms_of_the_users_count() -> None:
    stages = ("decode", "crop", "own_rates:halves")
    assert pin_code(recipe(**{"augmentation.stages": stages})).code.keys() == {"own_rates:halves"}


def test_a_missing_module_is_a_line() -> None:
    with pytest.raises(ConfigError, match="'no_such_module:f': no module no_such_module"):
        pin_code(recipe(**{"schedule.kind": "no_such_module:f"}))


# ------------------------------------------------------------------ schedules
def test_a_schedule_of_the_users_gives_multiples_of_the_base_rate() -> None:
    schedule = SchedulePlugin(kind="own_rates:halves", args={"steps": 2}, base_rate=0.4, warmup_epochs=1.0)
    rates = [compute_lr(schedule, epochs_done, 1.0, 8) for epochs_done in (0.5, 2.0, 4.0, 7.9, 8.0)]
    assert rates == pytest.approx([0.2, 0.4, 0.2, 0.2, 0.1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def halves(share): return -share", r"must return a finite number of at least 0, got -0.5 for share 0.5"),
        ("def halves(share): return 1 / (1 - share)", r"failed for share 1 and its args at .*own_rates.py:1: ZeroDiv"),
        ("def halves(share): return 'fast'", "must return a finite number of at least 0, got 'fast'"),
        ("def halves(): return 1", r"failed for share 0 and its args: TypeError: halves\(\) takes 0 positional"),
        ("x = 1", "has no attribute 'halves'"),
        ("import absent_part", "does not import at .*own_rates.py:1: ModuleNotFoundError"),
    ],
)
def test_a_bad_schedule_is_known_before_the_start(own_rates: Path, text: str, message: str) -> None:
    own_rates.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        check_plugins(recipe(**{"schedule.kind": "own_rates:halves"}), 10)
    assert "lr_schedule 'own_rates:halves'" in str(caught.value)


# ------------------------------------------------------------------ checks of a whole recipe
def test_good_plugins_pass() -> None:
    changes = {
        "model.kind": "examples.small_cnn:SmallCNN",
        "optimizer.kind": "torch.optim:Adagrad",
        "schedule.kind": "own_rates:halves",
        "loss.class_weights": (1.0,) * 10,
    }
    changed = recipe(**changes)
    check_plugins(changed, 10)
    assert pin_code(changed).code.keys() == {"examples.small_cnn:SmallCNN", "own_rates:halves"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.kind": "tests.support.plugin_models:no_module"}, "must return a torch.nn.Module"),
        ({"optimizer.kind": "torch.optim:NoSuch"}, "has no attribute 'NoSuch'"),
        ({"loss.class_weights": (1.0, 2.0)}, "loss.class_weights must have 10 numbers, one for each class, got 2"),
    ],
)
def test_bad_plugins_are_known_before_the_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plugins(recipe(**changes), 10)


def test_a_models_side_stays_when_the_kind_changes() -> None:
    model = recipe(**{"model.kind": "examples.small_cnn:SmallCNN", "model.args": {"width": 4}}).model
    assert model == ModelPlugin(kind="examples.small_cnn:SmallCNN", args={"width": 4}, image_size=32)


def test_recipes_with_plugins_can_be_keys() -> None:
    base = recipe(
        **{"model.kind": "own:Net", "model.args": {"widths": [1, 2]}, "optimizer.kind": "torch.optim:RMSprop"}
    )
    assert len({base, base.model_copy(update={"epochs": 9}), Recipe.from_dict(base.to_dict())}) == 2
    assert len({base, base.model_copy(update={"code": {"own:Net": "digest"}})}) == 2


def test_recipes_that_hold_digests_and_arguments_of_plug_ins_are_members_of_sets() -> None:
    recipe = presets.googlenet_tiny().model_copy(
        update={"optimizer": OptimizerPlugin(kind="torch.optim:RMSprop", args={"alpha": 0.9}), "code": {"a:b": "1"}}
    )
    assert len({recipe, recipe.model_copy(), recipe.model_copy(update={"code": {"a:b": "2"}})}) == 2
