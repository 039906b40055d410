"""RandAugment: reproducible choices, every operation at its strength."""

from pathlib import Path

import numpy as np
import pytest

from orchestrator.data import manifest
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.transforms.pipeline import OPERATIONS, RandAugment
from tests.support import tiny_shards
from tests.support.tiny_shards import kept, loader, order

STAGES = ["decode", "crop", {"kind": "rand_augment", "args": {"num_ops": 2, "magnitude": 15}}]


def load(folder: Path, workers: int) -> dict[int, bytes]:
    plan, config = order(manifest.load(str(folder))), AugmentationConfig.from_dict({"stages": STAGES})
    images: dict[int, bytes] = {}
    for rank in range(workers):
        for batch in kept(loader(folder).iter_training(plan, config, 11, 4, range(3), rank, workers)):
            images |= {id: image.numpy().tobytes() for id, image in zip(batch.ids.tolist(), batch.images, strict=True)}
    return images


def test_any_number_of_workers_draws_the_same(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path)
    assert load(tmp_path, 1) == load(tmp_path, 3)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_each_operation_keeps_size_and_changes_pixels(name: str) -> None:
    image = tiny_shards.picture(3)
    augment = RandAugment(num_ops=1, magnitude=30, operations=[name])
    results = [augment({"image": image.copy(), "__seed__": seed})["image"] for seed in range(4)]
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    changed = any(not np.array_equal(result, image) for result in results)
    assert changed == (name != "identity")


def test_magnitude_0_leaves_geometry_alone() -> None:
    image = tiny_shards.picture(3)
    for name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "sharpness", "posterize"):
        result = RandAugment(num_ops=1, magnitude=0, operations=[name])({"image": image, "__seed__": 1})["image"]
        np.testing.assert_array_equal(result, image)


@pytest.mark.parametrize(
    ("args", "said"),
    [({"operations": ["flip"]}, "operations must be of .* got 'flip'"), ({"num_ops": 0}, "num_ops must be >= 1"),
     ({"magnitude": 31}, "magnitude in"), ({"strength": 1}, "does not take these arguments")],
)  # fmt: skip
def test_unfit_arguments_are_named(tmp_path: Path, args: dict[str, object], said: str) -> None:
    tiny_shards.dataset(tmp_path)
    plan = order(manifest.load(str(tmp_path)))
    config = AugmentationConfig.from_dict({"stages": ["decode", {"kind": "rand_augment", "args": args}, "crop"]})
    with pytest.raises(DataError, match=said):
        loader(tmp_path).iter_training(plan, config, 11, 4, range(3))
