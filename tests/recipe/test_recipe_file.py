"""Recipes from files: with and without their origin, and invalid ones in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.recipe.config import RECIPE_VERSION, Recipe
from orchestrator.recipe.lr_schedule import CosineDecay
from orchestrator.recipe.presets import googlenet_tiny
from orchestrator.recipe.recipe_file import Provenance, RecipeFile, load_recipe

PROVENANCE = Provenance(
    sweep="tiny-pbt-0123456789",
    trial="t003",
    assignment={"schedule.base_rate": 0.04, "seeds.order": 3, "model.kind": "googlenet"},
    base="googlenet-tiny",
    dataset="digits",
    dataset_digest="0123456789abcdef",
    metric="top1_error",
    score=12.5,
    repeats="within the noise of seeds",
)


def written(folder: Path, content: object) -> str:
    place = folder / "recipe.json"
    place.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(place)


@pytest.mark.parametrize("provenance", [PROVENANCE, Provenance(), None])
def test_what_a_sweep_hands_over_is_read_again(tmp_path: Path, provenance: Provenance | None) -> None:
    given = RecipeFile(
        recipe=Recipe(name="x", epochs=10, schedule=CosineDecay(base_rate=0.2, warmup_epochs=4.0)),
        provenance=provenance,
    )
    assert load_recipe(written(tmp_path, given.to_json())) == given


def test_a_runs_own_recipe_is_one_too(tmp_path: Path) -> None:
    place = written(tmp_path, googlenet_tiny().to_json())
    assert load_recipe(place) == RecipeFile(recipe=googlenet_tiny())
    assert load_recipe(f"file://{place}") == load_recipe(place)


def test_what_is_left_out_takes_its_default(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, {"name": "x"})).recipe == Recipe(name="x")
    assert load_recipe(
        written(tmp_path, {"recipe": {"name": "x"}, "provenance": {"sweep": "s"}})
    ).provenance == Provenance(sweep="s")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "recipe.json: cannot be read: Expecting"),
        ("[]", "recipe.json: cannot be read: must be a JSON object, got list; give a run's recipe.json"),
        ("null", "must be a JSON object, got NoneType"),
        ({}, "recipe.json: name: must be given"),
        ({"name": "x", "epoch": 3}, "recipe.json: epoch: unknown key; did you mean epochs?"),
        ({"recipe": {"name": "x", "epochs": 0}}, "recipe.json: recipe.epochs: must be at least 1, got 0"),
        ({"name": "x", "version": RECIPE_VERSION - 1}, "version: must be at least"),
        ({"name": "x", "version": RECIPE_VERSION + 1}, "version: must be at most"),
        ({"recipe": {"name": "x"}, "provenence": {}}, "provenence: unknown key; did you mean provenance?"),
        ({"recipe": {"name": "x"}, "provenance": {"sweeps": "s"}}, "provenance.sweeps: unknown key; did you mean sw"),
    ],
)
def test_an_invalid_file_is_an_error_that_names_it_and_the_place(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_recipe(written(tmp_path, content))
    assert str(raised.value).startswith(str(tmp_path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: nothing there; give a run's recipe\.json"):
        load_recipe(str(tmp_path / "nowhere.json"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.json: cannot be read: "):
        load_recipe(str(tmp_path / "folder.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"bytes\.json: cannot be read: not UTF-8"):
        load_recipe(str(tmp_path / "bytes.json"))


def test_a_file_that_git_ignores_is_not_in_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"without what git ignores.*absolute path"):
        load_recipe("runs/sweeps/x/winner.json")
    with pytest.raises(ConfigError, match="nothing there") as raised:
        load_recipe("/nowhere/winner.json")
    assert "git" not in str(raised.value)
