"""Batch transforms: the same for any number of workers, soft labels that fit the pixels, errors with the fix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from orchestrator.config.plugins import Plugin
from orchestrator.data import manifest
from orchestrator.data.config import AugmentationConfig, OrderConfig, check_batch_stages
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataloader import Batch
from orchestrator.data.transforms import pipeline
from orchestrator.data.transforms.pipeline import CutMix, Mixup, find_partners
from tests.support import tiny_shards
from tests.support.tiny_shards import kept, loader, order

LANES = 2


def mixing(*stages: Any, **fields: Any) -> AugmentationConfig:
    return AugmentationConfig.from_dict({"batch_stages": stages, **fields})


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    tiny_shards.dataset(tmp_path, 26)
    return tmp_path


def load_epoch(folder: Path, config: AugmentationConfig, workers: int = 1, steps: range = range(4)) -> dict[int, Any]:
    """Image and soft label of each sample, by id."""
    plan = order(manifest.load(str(folder)), lanes=LANES)
    samples: dict[int, Any] = {}
    for rank in range(workers):
        for batch in kept(loader(folder).iter_training(plan, config, 11, 6, steps, rank, workers)):
            rows = zip(batch.ids.tolist(), batch.images, batch.labels, strict=True)
            samples |= {id: (image.numpy(), label.numpy()) for id, image, label in rows}
    return samples


@pytest.mark.parametrize("stage", ["mixup", {"kind": "cutmix", "args": {"alpha": 0.8}}])
def test_any_number_of_workers_and_any_resume_mixes_the_same(packed: Path, stage: Any) -> None:
    whole = load_epoch(packed, mixing(stage))
    split = load_epoch(packed, mixing(stage), workers=2)
    resumed = load_epoch(packed, mixing(stage), steps=range(2, 4))
    for other in (split, resumed):
        assert other.keys() <= whole.keys()
        for id, (image, label) in other.items():
            np.testing.assert_array_equal(image, whole[id][0])
            np.testing.assert_array_equal(label, whole[id][1])
    labels = np.stack([label for _, label in whole.values()])
    assert labels.dtype == np.float32
    assert labels.shape == (24, 3)
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    assert ((labels > 0).sum(axis=1) == 2).any(), "some samples have two classes"


def test_the_loss_takes_soft_labels(packed: Path) -> None:
    plan = order(manifest.load(str(packed)), lanes=LANES)
    batch: Batch = next(iter(loader(packed).iter_training(plan, mixing("mixup"), 11, 6, range(1))))
    loss = torch.nn.functional.cross_entropy(torch.zeros(6, 3), batch.labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(loss, torch.full((6,), float(np.log(3))))


def images(count: int = 4) -> NDArray[np.uint8]:
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 8, 3), 50, np.uint8)


def test_mixup_is_the_weighted_mean_of_pixels_and_labels() -> None:
    pixels, targets, partners = images(), np.eye(4, dtype=np.float32), np.array([1, 0, 3, 2])
    mixed, labels = Mixup(alpha=1.0)(pixels, targets, partners, np.random.default_rng(1))
    share = float(labels[0, 0])
    assert 0 < share < 1
    assert labels[0].tolist() == pytest.approx([share, 1 - share, 0, 0])
    assert mixed[2, 0, 0, 0] == round(share * 100 + (1 - share) * 150)


def test_cutmix_shares_labels_by_area() -> None:
    pixels, targets, partners = images(), np.eye(4, dtype=np.float32), np.array([1, 0, 3, 2])
    for seed in range(20):
        mixed, labels = CutMix()(pixels, targets, partners, np.random.default_rng(seed))
        replaced = (mixed[0, :, :, 0] == 50).mean()
        assert labels[0].tolist() == pytest.approx([1 - replaced, replaced, 0, 0])


def test_probability_0_changes_nothing() -> None:
    pixels, targets = images(), np.eye(4, dtype=np.float32)
    for stage in (Mixup(probability=0.0), CutMix(probability=0.0)):
        mixed, labels = stage(pixels, targets, np.array([1, 0, 3, 2]), np.random.default_rng(1))
        np.testing.assert_array_equal(mixed, pixels)
        np.testing.assert_array_equal(labels, targets)


def test_partners_are_others_of_the_lane_and_never_broken() -> None:
    lanes, good = np.array([0, 1, 0, 1, 0, 2]), np.array([True, True, True, True, False, True])
    for key in range(9):
        partners = find_partners(lanes, good, key)
        np.testing.assert_array_equal(lanes[partners], lanes)
        assert partners[[1, 3, 4, 5]].tolist() == [3, 1, 4, 5]
        assert 4 not in partners[:4]


def half(images: Any, targets: Any, partners: Any, generator: Any, factor: int = 2) -> Any:
    return images // factor, targets


def fail(images: Any, targets: Any, partners: Any, generator: Any) -> Any:
    raise KeyError("nothing")


def test_a_batch_transform_of_ones_own(packed: Path) -> None:
    own = load_epoch(packed, mixing({"kind": f"{__name__}:half", "args": {"factor": 4}}))
    plain = load_epoch(packed, AugmentationConfig())
    for id, (image, label) in own.items():
        np.testing.assert_array_equal(image, plain[id][0] // 4)
        assert label.argmax() == plain[id][1]


@pytest.mark.parametrize(
    ("stage", "said"),
    [(f"{__name__}:fail", r"batch_stages: '.*:fail' failed in step 0 of epoch 0: KeyError"),
     ("crop", "batch_stages: .*'crop' does not take images, targets, partners and a generator"),
     ({"kind": "mixup", "args": {"alpha": 0}}, "batch_stages: .*alpha must be > 0"),
     ({"kind": "mixup", "args": {"beta": 1}}, "batch_stages: .*does not take these arguments"),
     ("mixdown", "batch_stages: transform 'mixdown' is unknown.*mixup")],
)  # fmt: skip
def test_unfit_batch_transforms_are_named(packed: Path, stage: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_epoch(packed, mixing(stage))


def test_a_batch_needs_two_samples_of_each_lane() -> None:
    check_batch_stages(mixing("mixup"), OrderConfig(lanes=4), 8)
    with pytest.raises(ValueError, match=r"batch_size must be at least 2 x order\.lanes \(4\).* got 7"):
        check_batch_stages(mixing("mixup"), OrderConfig(lanes=4), 7)


def test_a_recipe_without_batch_transforms_is_the_same_json() -> None:
    assert "batch_stages" not in AugmentationConfig().to_dict()
    assert mixing("mixup").to_dict()["batch_stages"] == [{"kind": "mixup", "args": {}}]
    assert mixing("mixup") == mixing('{"kind": "mixup"}') == AugmentationConfig(batch_stages=(Plugin(kind="mixup"),))


def test_both_forms_of_a_stage_without_arguments_are_one_recipe() -> None:
    stages = ("decode", "crop", "my:own")
    written = [{"kind": "decode"}, '{"kind": "crop", "args": {}}', "my:own"]
    assert AugmentationConfig.from_dict({"stages": written}) == AugmentationConfig(stages=stages)
    with pytest.raises(ValidationError):
        AugmentationConfig(stages=())


def test_a_mixer_is_only_built_for_batch_transforms() -> None:
    assert pipeline.build_batch_mixer(AugmentationConfig(), 0, 0, 3) is None
