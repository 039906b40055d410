"""Pictures of a schedule and of augmented images, as the loader gives them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from orchestrator.data import manifest
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.transforms.decode import decode_image
from orchestrator.plotting import canvas
from orchestrator.ray_backend import previews
from orchestrator.ray_backend.previews import (
    MAX_ORIGINAL_SIDE,
    SHEET_EPOCHS,
    SHEET_SAMPLES,
    AugmentedSample,
    draw_contact_sheet,
    draw_schedule,
    render_augmented,
)
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.recipe.lr_schedule import compute_lr
from tests.support import tiny_shards
from tests.support.launched import recipe, spec
from tests.support.tiny_shards import kept, training


@pytest.fixture
def run(tmp_path: Path) -> RunSpec:
    tiny_shards.dataset(tmp_path / "data", 70, 20)
    return spec(recipe(), str(tmp_path))


def record_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Return a list that fills with the arguments of a function of the canvas, which still draws."""
    calls: list[tuple[Any, ...]] = []
    draw = getattr(canvas, name)

    def record(*arguments: Any) -> None:
        calls.append(arguments)
        draw(*arguments)

    monkeypatch.setattr(canvas, name, record)
    return calls


def has_ink(path: Path) -> bool:
    return bool((imread(path)[..., :3].min(axis=2) < 0.9).mean() > 0.01)


# ------------------------------------------------------------------ pictures
def test_rates_are_those_of_the_first_the_last_and_steps_between(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(epochs=4, batch_size=10, schedule={"kind": "polynomial", "base_rate": 1.0, "power": 1.0})
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(canvas, "plot_lr_schedule", lambda rates, *_: drawn.extend(rates))
    draw_schedule(chosen, 5, "unused.png")
    assert dict(drawn) == pytest.approx({step / 5: 1 - step / 20 for step in range(20)})
    monkeypatch.setattr(previews, "SCHEDULE_POINTS", 3)
    drawn.clear()
    draw_schedule(chosen, 5, "unused.png")
    assert [epochs for epochs, _ in drawn] == pytest.approx([0, 1.8, 3.8])


def test_the_schedule_is_drawn_by_epochs(run: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_calls(monkeypatch, "plot_lr_schedule")
    draw_schedule(run.recipe, 7, str(tmp_path / "a.png"))
    ((points, samples_per_epoch, *_),) = calls
    assert samples_per_epoch == 7 * run.recipe.batch_size
    steps = range(7 * run.recipe.epochs)
    rates = [compute_lr(run.recipe.schedule, step, 7, run.recipe.epochs) for step in steps]
    assert points == list(zip((step / 7 for step in steps), rates, strict=True))
    assert has_ink(tmp_path / "a.png")


def test_the_contact_sheet_shows_originals_and_what_epochs_make_of_them(
    run: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record_calls(monkeypatch, "draw_contact_sheet")
    dataset = manifest.load(run.destination.data)
    assert draw_contact_sheet(run.recipe, run.destination.data, dataset, str(tmp_path / "b.png"))
    ((rows, columns, *_),) = calls
    epochs = min(run.recipe.epochs, SHEET_EPOCHS)
    assert columns == ["original", *(f"epoch {number}" for number in range(1, epochs + 1))]
    expected = render_augmented(run.recipe, run.destination.data, dataset, SHEET_SAMPLES, epochs)
    assert len(rows) == len(expected) == SHEET_SAMPLES
    for (caption, images), sample in zip(rows, expected, strict=True):
        assert caption == f"{dataset.classes[sample.label]}\n{sample.key}"
        assert all(map(np.array_equal, images, [sample.original, *sample.epochs]))
        assert len(images) == len(columns)
    assert has_ink(tmp_path / "b.png")


def test_no_sheet_without_an_image_that_can_be_decoded(tmp_path: Path) -> None:
    broken = [RawSample(f"broken-{n}", b"\xff\xd8\xff no image", 0) for n in range(20)]
    packed = tiny_shards.dataset(tmp_path / "data", broken)
    assert not draw_contact_sheet(recipe(), str(tmp_path / "data"), packed, str(tmp_path / "b.png"))
    assert not (tmp_path / "b.png").exists()


# ------------------------------------------------------------------ images as epochs show them: the loader's own pixe
SEED, SIZE = 11, 16  # those of tests.support.shards.training


def seen(folder: Path, samples: int, epochs: int) -> list[AugmentedSample]:
    base = recipe(seeds={"augmentation": SEED}, augmentation={})
    chosen = base.model_copy(update={"model": base.model.model_copy(update={"image_size": SIZE})})
    return render_augmented(chosen, str(folder), manifest.load(str(folder)), samples, epochs)


def test_it_is_what_the_loader_gives_in_each_epoch(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path, 12)
    found = {one.key: one for one in seen(tmp_path, 12, 3)}
    assert len(found) == 12
    compared = 0
    for epoch in range(3):
        for batch in kept(training(tmp_path, range(3), epoch=epoch)):
            for image, label, number in zip(batch.images, batch.labels.tolist(), batch.ids.tolist(), strict=True):
                one = found[f"sample-{number:03d}"]
                assert np.array_equal(one.epochs[epoch], image.permute(1, 2, 0).numpy())
                assert one.label == label
                compared += 1
    assert compared == 36


def test_the_original_is_the_whole_image(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path, 12)
    for number, one in enumerate(seen(tmp_path, 12, 1)):
        assert np.array_equal(one.original, decode_image(tiny_shards.samples(1, number)[0].image))


def test_a_large_original_is_reduced_in_shape(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path, [RawSample("large", tiny_shards.jpeg(1, 1600, 400), 0)])
    (one,) = seen(tmp_path, 3, 1)
    assert one.original.shape == (MAX_ORIGINAL_SIDE // 4, MAX_ORIGINAL_SIDE, 3)


def test_an_image_that_cannot_be_decoded_is_left_out(tmp_path: Path) -> None:
    raw = tiny_shards.samples(6)
    tiny_shards.dataset(tmp_path, [*raw[:2], RawSample("broken", b"\xff\xd8\xff no image", 0), *raw[3:]])
    assert [one.key for one in seen(tmp_path, 6, 1)] == [f"sample-{n:03d}" for n in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize(
    ("total", "samples", "wanted"), [(10, 1, [5]), (10, 2, [2, 7]), (3, 8, [0, 1, 2]), (100, 4, [12, 37, 62, 87])]
)
def test_samples_are_spread_evenly(tmp_path: Path, total: int, samples: int, wanted: list[int]) -> None:
    tiny_shards.dataset(tmp_path, total, 7)
    assert [one.key for one in seen(tmp_path, samples, 1)] == [f"sample-{number:03d}" for number in wanted]
