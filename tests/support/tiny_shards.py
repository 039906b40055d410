"""Tiny datasets: real JPEGs with Pillow or simplejpeg, packed as the product packs them, and ways to damage them."""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image as Pillow

from orchestrator.data import manifest
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.dataloader import Batch, BatchLoader
from orchestrator.data.dataset import SampleReader
from orchestrator.data.manifest import Manifest
from orchestrator.data.sampler import EpochOrder

CLASSES = ("ant", "bee", "cat")


def picture(number: int, width: int = 40, height: int = 30) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """H x W x 3 uint8: smooth, so that JPEG keeps it, and different for each number."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + number % 5) + c) + np.cos(y / (4 + number % 7) + number) for c in range(3)]
    return np.asarray(np.stack(waves, axis=2) * 60 + 128, dtype=np.uint8)


def jpeg(number: int, width: int = 40, height: int = 30) -> bytes:
    """A JPEG of `picture`."""
    return bytes(simplejpeg.encode_jpeg(picture(number, width, height), quality=90))


def encoded(mode: str, form: str, number: int = 0, width: int = 40, height: int = 30, **options: Any) -> bytes:
    """`picture` as Pillow writes it: mode "L", "RGB", "CMYK" ..., form "JPEG", "PNG" ..."""
    buffer = io.BytesIO()
    Pillow.fromarray(picture(number, width, height)).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def samples(count: int, first: int = 0) -> list[RawSample]:
    """JPEGs of several sizes, labels in turn."""
    return [
        RawSample(f"sample-{n:03d}", jpeg(n, 24 + 4 * (n % 6), 44 - 4 * (n % 5)), n % len(CLASSES))
        for n in range(first, first + count)
    ]


def dataset(folder: Path, train: Sequence[RawSample] | int = 13, per_shard: int = 4) -> Manifest:
    """Pack a training split and 5 validation samples below `folder`."""
    chosen = samples(train) if isinstance(train, int) else train
    return write_dataset(str(folder), "tiny", CLASSES, {"train": chosen, "validation": samples(5, 500)}, per_shard)


def counts(packed: Manifest, split: str = "train") -> tuple[int, ...]:
    """Samples of each shard."""
    return tuple(shard.samples for shard in packed.shards(split))


def loader(folder: Path, split: str = "train", threads: int = 2, size: int = 16, **reader: Any) -> BatchLoader:
    """A loader of its own over the dataset at `folder`."""
    return BatchLoader(SampleReader(str(folder), manifest.load(str(folder)), split, **reader), size, threads)


def order(packed: Manifest, epoch: int = 0, seed: int = 7, lanes: int = 3, window: int = 2) -> EpochOrder:
    """An epoch's order of the training split."""
    return EpochOrder(counts(packed), seed, epoch, lanes, window)


def training(
    folder: Path, steps: range, rank: int = 0, workers: int = 1, threads: int = 2, batch_size: int = 4, epoch: int = 0
) -> Iterator[Batch]:
    """The rank's batches of the training split with the paper's augmentation."""
    plan = order(manifest.load(str(folder)), epoch)
    return loader(folder, threads=threads).iter_training(
        plan, AugmentationConfig(), 11, batch_size, steps, rank, workers
    )


def kept(batches: Iterator[Batch]) -> list[Batch]:
    """Copies of all batches: the loader's own are overwritten in turn."""
    return [Batch(*(tensor.clone() for tensor in batch[:4]), batch.bad) for batch in batches]  # type: ignore[call-arg, arg-type]


def flip_byte(path: Path, where: int) -> None:
    """Damage a file without changing its length."""
    data = bytearray(path.read_bytes())
    data[where] ^= 0xFF
    path.write_bytes(data)


def tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar of these members by tarfile, as foreign writers make them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
