"""A schedule printed and drawn without training."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli import simulate
from orchestrator.cli.config import (
    IMAGENET_TRAIN_SAMPLES,
    SimulateConfig,
    build_simulate_presets,
    load_simulate_preset,
)
from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend.previews import CONTACT_SHEET_FILE, SCHEDULE_FILE
from orchestrator.ray_backend.run_spec import RUNS_VARIABLE
from orchestrator.recipe import presets
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.lr_schedule import compute_lr
from tests.support import tiny_shards
from tests.support.launched import recipe


def simulated(of: Recipe, **flags: Any) -> tuple[int, str]:
    """Exit status and what was printed."""
    screen = Console(file=io.StringIO(), width=200)
    status = simulate.run_simulate(SimulateConfig(recipe=of, **flags), screen)
    assert isinstance(screen.file, io.StringIO)
    return status, screen.file.getvalue()


def table(printed: str) -> list[list[float]]:
    """The numbers of the printed table, row by row."""
    lines = [line.strip("│ \n") for line in printed.splitlines() if line.startswith("│")]
    return [[float(cell.replace(",", "")) for cell in line.split("│")] for line in lines]


@pytest.mark.parametrize("kind", ["step", "exponential", "polynomial", "cosine"])
def test_the_table_is_the_schedule_at_whole_epochs(kind: str) -> None:
    of = recipe(epochs=20, batch_size=10, schedule={"kind": kind, "base_rate": 0.5, "warmup_epochs": 2.5})
    status, printed = simulated(of, samples=1009)
    rows = table(printed)
    assert status == 0
    assert [row[0] for row in rows] == [0, 1, 2, 2.5, *range(3, 20), 19.99], "the end of the warm-up, the last step"
    for epochs, step, samples, rate in rows:
        assert [step, samples] == pytest.approx([epochs * 100, epochs * 1000]), "the ragged tail is dropped"
        assert rate == pytest.approx(compute_lr(of.schedule, samples, 1000, 20), rel=1e-5)


@pytest.mark.parametrize("epochs", [1, 2, 25, 26, 27, 250, 1000, 99_999])
def test_a_long_schedule_has_few_rows(epochs: int) -> None:
    of = recipe(epochs=epochs, schedule={"kind": "cosine"})
    rows = table(simulated(of, samples=640)[1])
    assert min(epochs, 10) <= len(rows) <= simulate.MAX_ROWS + 2
    assert rows[0][0] == 0
    assert math.ceil(rows[-1][0]) == epochs


def test_without_data_the_epoch_is_imagenets() -> None:
    of = presets.googlenet_imagenet()
    steps = IMAGENET_TRAIN_SAMPLES // of.batch_size
    assert table(simulated(of)[1])[-1][1] == of.epochs * steps - 1


def test_the_samples_are_the_datasets(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "data", 70, 20)
    rows = table(simulated(recipe(batch_size=32), data=str(tmp_path / "data"))[1])
    assert rows[-1][1] == 2 * (70 // 32) - 1


def test_pictures_go_to_the_folder(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path / "data", 70, 20)
    _, printed = simulated(recipe(), data=str(tmp_path / "data"), out=str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SCHEDULE_FILE, CONTACT_SHEET_FILE}
    assert f"written: {tmp_path / 'out' / CONTACT_SHEET_FILE}" in printed


def test_without_data_there_is_no_contact_sheet_and_a_line_says_so(tmp_path: Path) -> None:
    _, printed = simulated(recipe(), out=str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [SCHEDULE_FILE]
    assert "no contact sheet: set --data to a dataset" in printed


def test_the_embedded_digits_need_not_be_packed_and_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUNS_VARIABLE, str(tmp_path / "runs"))
    _, printed = simulated(recipe(), data="digits", out=str(tmp_path / "out"))
    assert table(printed)[-1][1] == 2 * (1437 // 64) - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / CONTACT_SHEET_FILE).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"out": "relative"}, "out: 'relative' is a relative path"),
        ({"data": "relative"}, "data: 'relative' is a relative path"),
        ({"data": "/nowhere/at/all"}, "data: /nowhere/at/all/manifest.json: no manifest there"),
        ({"samples": 63}, "batch_size: must be at most the 63 training images, got 64; lower it"),
    ],
)
def test_impossible_values_are_errors(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulated(recipe(), **flags)


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipe("googlenet-tiny-best").to_json())
    assert load_simulate_preset(str(tmp_path / "recipe.json")).value == SimulateConfig(
        recipe=recipe("googlenet-tiny-best"), data="digits"
    )
    with pytest.raises(ConfigError, match=r"nowhere\.json: nothing there"):
        load_simulate_preset(str(tmp_path / "nowhere.json"))


def test_a_preset_for_each_recipe() -> None:
    made = build_simulate_presets()
    assert made.keys() == presets.PRESETS.keys()
    assert made["googlenet-tiny"].value.data == "digits"
    assert made["googlenet-imagenet"].value.data == ""
