"""Stages of the user's own: a dict in, a dict out, as WebDataset's map() has it."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from orchestrator.data import manifest, rng
from orchestrator.data.config import NO_PHOTOMETRIC, AugmentationConfig, PhotometricConfig
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.dataloader import Batch
from orchestrator.data.transforms import photometric
from tests.support import tiny_shards
from tests.support.tiny_shards import kept, loader, order

SEEN: list[dict[str, Any]] = []


def invert(sample: dict[str, Any]) -> dict[str, Any]:
    SEEN.append(sample)
    return sample | {"image": 255 - sample["image"]}


def noise(sample: dict[str, Any]) -> dict[str, Any]:
    added = np.random.default_rng(sample["__seed__"]).integers(0, 9, sample["image"].shape, dtype=np.uint8)
    return sample | {"image": sample["image"] // 2 + added}


def relabel(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"cls": 2 - sample["cls"]}


def reject_some(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["__id__"] % 3 == 0:
        raise BadSampleError("not wanted")
    return sample


def fail(sample: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("nothing")


def forget(sample: dict[str, Any]) -> None:
    return None


def leave(sample: dict[str, Any]) -> dict[str, Any]:
    raise SystemExit(3)


def unlabel(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sample.items() if key != "cls"}


def mislabel(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"cls": 3}


def grow(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"image": np.zeros((5, 5, 3), dtype=np.uint8)}


def keep(sample: dict[str, Any]) -> dict[str, Any]:
    return sample | {"kept": sample["image"], "copy": sample["image"].copy()}


def compare(sample: dict[str, Any]) -> dict[str, Any]:
    assert np.array_equal(sample["kept"], sample["copy"])
    assert not np.array_equal(sample["kept"], sample["image"])
    SEEN.append(sample)
    return sample


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_stages")
    for function in (invert, noise, relabel, reject_some, fail, forget, leave, unlabel, mislabel, grow, keep, compare):
        setattr(module, function.__name__, function)
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_stages", module)
    SEEN.clear()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_shards.dataset(folder, train=24)
    return folder


def batches(
    folder: Path, *stages: str, rank: int = 0, workers: int = 1, start: int = 0,
    photometric: PhotometricConfig | None = None,
) -> list[Batch]:  # fmt: skip
    config = AugmentationConfig(stages=stages, decoding="exact", photometric=photometric or PhotometricConfig())
    plan = order(manifest.load(str(folder)))
    return kept(loader(folder).iter_training(plan, config, 11, 4, range(start, 6), rank, workers))


def test_the_built_in_stages_one_by_one_do_what_they_do_together(packed: Path) -> None:
    together = batches(packed, "decode", "crop")
    apart = batches(packed, "decode", "crop", "my_stages:reject_some")
    for one, other in zip(together, apart, strict=True):
        kept_rows = [row for row, number in enumerate(one.ids.tolist()) if number % 3]
        assert torch.equal(one.images[kept_rows], other.images[kept_rows])
        assert other.weights.tolist() == [float(number % 3 > 0) for number in one.ids.tolist()]
        assert {entry.reason for entry in other.bad} <= {"not wanted"}


def test_photometric_is_one_more_stage_and_moves_no_other_draw(packed: Path) -> None:
    plain = batches(packed, "decode", "crop")
    together = batches(packed, "decode", "crop", "photometric")
    apart = batches(packed, "decode", "crop", "photometric", "my_stages:keep")
    rows = rng.uniform(rng.derive_key(11, "photometric", 0), np.arange(24), photometric.DRAWS)
    for one, other, third in zip(plain, together, apart, strict=True):
        assert torch.equal(other.images, third.images)
        for crop, image, number in zip(one.images, other.images, one.ids.tolist(), strict=True):
            wanted = crop.permute(1, 2, 0).numpy().copy()
            photometric.distort_image(wanted, AugmentationConfig().photometric, rows[number])
            assert np.array_equal(wanted, image.permute(1, 2, 0).numpy())
    assert not torch.equal(plain[0].images, together[0].images)


def test_photometric_may_stand_before_the_crop_and_leaves_the_image_that_another_stage_kept(packed: Path) -> None:
    batches(packed, "decode", "my_stages:keep", "photometric", "my_stages:compare", "crop")
    assert len(SEEN) == 24


def test_distortions_that_are_off_change_nothing(packed: Path) -> None:
    off = batches(packed, "decode", "crop", "photometric", photometric=NO_PHOTOMETRIC)
    for one, other in zip(batches(packed, "decode", "crop"), off, strict=True):
        assert torch.equal(one.images, other.images)


def test_a_stage_changes_image_and_label(packed: Path) -> None:
    plain = batches(packed, "decode", "crop")
    changed = batches(packed, "decode", "crop", "my_stages:invert", "my_stages:relabel")
    for one, other in zip(plain, changed, strict=True):
        assert torch.equal(255 - one.images, other.images)
        assert torch.equal(2 - one.labels, other.labels)
    sample = SEEN[0]
    assert sample["__key__"] == f"sample-{sample['__id__']:03d}"
    assert sample["__url__"].endswith(".tar")
    assert sample["size"] == 16


def test_what_a_stage_draws_depends_on_the_sample_alone(packed: Path) -> None:
    stages = ("decode", "crop", "my_stages:noise")
    whole = batches(packed, *stages)
    for one, other in zip(whole[3:], batches(packed, *stages, start=3), strict=True):
        assert torch.equal(one.images, other.images)
    mine = {int(one): image for batch in whole for one, image in zip(batch.ids, batch.images, strict=True)}
    for rank in range(2):
        for batch in batches(packed, *stages, rank=rank, workers=2):
            assert all(torch.equal(mine[int(one)], image) for one, image in zip(batch.ids, batch.images, strict=True))


def test_the_same_function_runs_under_webdataset(packed: Path) -> None:
    paths = [str(packed / shard.name) for shard in manifest.load(str(packed)).shards("train")]
    found = webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").rename(image="jpg").map(invert)
    assert [sample["__key__"] for sample in found] == [f"sample-{number:03d}" for number in range(24)]


def test_photometric_before_decode_is_an_error(packed: Path) -> None:
    with pytest.raises(DataError, match=r"'photometric' failed on sample .* it needs an H x W x 3 uint8 RGB array"):
        batches(packed, "photometric", "decode", "crop")


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("my_stages:fail", r"'my_stages:fail' failed on sample 'sample-\d+' of .*tar at byte \d+: KeyError: 'nothing'"),
        ("my_stages:forget", r"'my_stages:forget' must return the sample's dict, got NoneType for sample 'sample-\d+'"),
        ("my_stages:grow", r"after 'my_stages:grow' the image of sample .* is uint8 \(5, 5, 3\): must be .*16, 16, 3"),
        ("my_stages:leave", r"'my_stages:leave' failed on sample .*: SystemExit: 3"),
        ("my_stages:unlabel", r"after 'my_stages:unlabel' the label of sample 'sample-\d+' of .*tar is None: must be"),
        ("my_stages:mislabel", r"the label of sample .* is 3: must be a whole number in 0 .. 2"),
        (
            "my_stages:absent",
            r"transform 'my_stages:absent': .*my_stages.* has no attribute 'absent'",
        ),
        ("my_stages:number", r"transform 'my_stages:number' must be callable, got int"),
        ("no_such_module:f", r"transform 'no_such_module:f': no module no_such_module"),
        ("flip", r"transform 'flip' is unknown: must be a built-in name"),
        (
            {"kind": "examples.own_transform:erase", "args": {"strength": 1}},
            "does not take a sample and these arguments",
        ),
    ],
)
def test_a_stage_that_fails_is_named(packed: Path, stage: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        batches(packed, "decode", "crop", stage)
