"""Spaces by name: they suit every preset, and the preset's own values lie inside."""

import json
from pathlib import Path

import pytest

from orchestrator.config import overrides
from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import CosineDecay
from orchestrator.recipe.presets import PRESETS, googlenet_digits, googlenet_imagenet, googlenet_tiny
from orchestrator.tuning.named_spaces import (
    SPACES,
    build_rate_space,
    build_regularization_space,
    build_schedule_space,
    find_space,
)
from orchestrator.tuning.samplers import draw_assignments
from orchestrator.tuning.space import check_space, list_grid

each_preset = pytest.mark.parametrize("preset", list(PRESETS))
each_space = pytest.mark.parametrize("name", list(SPACES))


def shape(base: Recipe, path: str) -> tuple[float, float]:
    return build_schedule_space(base).dimensions[path].bounds


@each_space
@each_preset
def test_a_space_suits_every_preset_and_no_draw_is_refused(name: str, preset: str) -> None:
    base = PRESETS[preset]()
    space = SPACES[name](base)
    check_space(space, base)
    found = {apply_overrides(base, assignment) for assignment in draw_assignments(space, base, 0, 1)}
    assert len(found) > 190


@each_space
@each_preset
def test_what_the_preset_has_lies_inside(name: str, preset: str) -> None:
    base = PRESETS[preset]()
    values = overrides.flatten_config(base)
    for path, dimension in SPACES[name](base).dimensions.items():
        if path in values and path != "schedule.decay_epochs":
            assert dimension.accepts(values[path]), path


def test_literals_of_the_digits() -> None:
    found = build_schedule_space(googlenet_digits())  # rate 0.01, 26 epochs
    assert found.dimensions["schedule.base_rate"].grid_values == (0.001, 0.01, 0.1)
    assert found.dimensions["schedule.final_rate"].extremes == (0.0, 0.0001, 0.001)
    assert found.dimensions["schedule.warmup_epochs"].bounds == (0.0, 2.6)
    assert found.dimensions["schedule.decay_epochs"].bounds == (0.81, 13.0)
    # 3 rates x 3 warm-ups x (step 9 + exponential 9 + polynomial 9 + cosine 3)
    assert len(list_grid(found, googlenet_digits())) == 270


def test_ranges_follow_the_recipe() -> None:
    assert shape(googlenet_imagenet(), "schedule.base_rate") == (0.008, 0.8)
    assert shape(googlenet_imagenet(), "schedule.decay_epochs") == (7.8, 120.0)  # the paper's 8 among them
    assert shape(googlenet_tiny(), "schedule.decay_epochs")[1] < googlenet_tiny().epochs
    fast = googlenet_digits().model_copy(update={"schedule": CosineDecay(base_rate=50.0)})
    assert shape(fast, "schedule.base_rate") == (5.0, 100.0)


@pytest.mark.parametrize("final", [0.005, 0.01])
def test_rates_stay_above_the_rate_that_the_schedule_ends_at(final: float) -> None:
    ending = CosineDecay(base_rate=0.01, final_rate=final)
    base = googlenet_digits().model_copy(update={"schedule": ending})
    assert build_rate_space(base).dimensions["schedule.base_rate"].bounds == (final, 0.1)
    check_space(build_rate_space(base), base)


def test_only_what_the_network_has_is_searched() -> None:
    paths = {name: set(build_regularization_space(PRESETS[name]()).dimensions) for name in PRESETS}
    heads, dropout = {"loss.auxiliary_weight"}, {"model.dropout"}
    assert paths["googlenet-digits"] - paths["alexnet-imagenet"] == heads
    assert paths["alexnet-imagenet"] - paths["lenet-5-digits"] == dropout
    areas = build_regularization_space(PRESETS["alexnet-imagenet"]()).dimensions["augmentation.area"]
    assert areas.accepts([0.59, 0.77])


def test_a_space_is_found_by_name_or_in_a_file(tmp_path: Path) -> None:
    base = googlenet_digits()
    assert find_space("rates", base) == build_rate_space(base)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(build_rate_space(base).to_dict()))
    assert find_space(str(path), base) == build_rate_space(base)
    with pytest.raises(ConfigError, match=r"got 'schedule'; did you mean schedules"):
        find_space("schedule", base)
    with pytest.raises(ConfigError, match="no such file"):
        find_space("absent.toml", base)
