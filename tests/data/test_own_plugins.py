"""The examples of transforms and sources of one's own do what they say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.own_source import Shapes
from orchestrator.cli import shards
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.data.build.config import PackConfig, PluginSource, ShardLayout
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.dataset import SampleReader
from tests.support import tiny_shards
from tests.support.tiny_shards import kept, loader, order


def pack(url: Path, plugin: str = "examples.own_source:Shapes", dry_run: bool = False, **args: Any) -> None:
    source = PluginSource(plugin=plugin, args=args)
    shards.pack_dataset(PackConfig(source=source, url=str(url), layout=ShardLayout(shard_mib=0.01), dry_run=dry_run))


def test_the_example_source_is_packed_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(tmp_path, count=50)
    packed = manifest.load(str(tmp_path))
    assert (packed.name, packed.classes) == ("Shapes", ("disc", "square"))
    assert {split: packed.count_samples(split) for split in packed.splits} == {"train": 50, "validation": 10}
    assert len(packed.shards("train")) > 1
    reader = SampleReader(str(tmp_path), packed, "train")
    samples = [sample for shard in range(len(packed.shards("train"))) for sample in reader.iter_shard(shard)]
    expected = list(Shapes(50).iter_samples("train"))
    assert [(sample.key, sample.label) for sample in samples] == [(sample.key, sample.label) for sample in expected]
    assert "label mixing" in capsys.readouterr().out
    pack(tmp_path, count=50)
    assert "already packed" in capsys.readouterr().out
    with pytest.raises(DataError, match="the dataset 'Shapes' is there"):
        pack(tmp_path, count=51)


def test_a_dry_run_of_a_source_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(tmp_path / "out", dry_run=True)
    assert "Shapes: 2 classes, train and validation images" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


class Broken(Shapes):
    def iter_samples(self, split: str) -> Any:
        yield RawSample("a", b"GIF89a", 0)


class Mislabelled(Shapes):
    def iter_samples(self, split: str) -> Any:
        yield RawSample("a", next(iter(super().iter_samples(split))).image, 2)


class Tuples(Shapes):
    def iter_samples(self, split: str) -> Any:
        yield ("a", b"", 0)


@pytest.mark.parametrize(
    ("plugin", "args", "error", "said"),
    [(f"{__name__}:Broken", {}, DataError, "source.plugin: sample 'a': broken GIF.*mend it or leave it out"),
     (f"{__name__}:Mislabelled", {}, DataError, r"sample 'a': the label must be in 0 \.\. 1, got 2"),
     (f"{__name__}:Tuples", {}, DataError, "iter_samples must yield RawSample, got tuple"),
     ("builtins:dict", {}, DataError, "must return an object with classes, splits and iter_samples"),
     ("examples.own_source:Shapes", {"number": 1}, ConfigError, "does not take these arguments.*count"),
     ("examples.own_source:Circles", {}, ConfigError, "has no attribute 'Circles'"),
     ("", {}, ConfigError, "source.plugin: needed")],
)  # fmt: skip
def test_unfit_sources_are_named(tmp_path: Path, plugin: str, args: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        pack(tmp_path, plugin, **args)
    assert not (tmp_path / manifest.FILE_NAME).exists()


def test_the_example_transforms_run(tmp_path: Path) -> None:
    tiny_shards.dataset(tmp_path)
    plan = order(manifest.load(str(tmp_path)), lanes=2)

    def load(config: dict[str, Any]) -> list[Any]:
        batches = loader(tmp_path).iter_training(plan, AugmentationConfig.from_dict(config), 11, 4, range(2))
        return [(batch.images.numpy(), batch.labels.numpy()) for batch in kept(batches)]

    erase = {"kind": "examples.own_transform:erase", "args": {"share": 0.5}}
    erased = load({"stages": ["decode", "crop", erase]})
    plain = load({"stages": ["decode", "crop"], "decoding": "exact"})
    for (images, _), (before, _) in zip(erased, plain, strict=True):
        assert ((images == 128).all(axis=1).sum(axis=(1, 2)) >= 64).all(), "a square of 8 x 8"
        assert (images == before).mean() > 0.6
    brightened = load({"batch_stages": ["examples.own_transform:brighten", "mixup"]})
    assert all(labels.shape == (4, 3) and np.allclose(labels.sum(axis=1), 1) for _, labels in brightened)
