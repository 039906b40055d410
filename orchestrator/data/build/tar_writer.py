"""Samples into WebDataset tars with indexes and a manifest; the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import webdataset

from orchestrator.data import manifest
from orchestrator.data.build import shard_scan
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.storage import file_io


@dataclass(frozen=True)
class RawSample:
    """An encoded image with its label; the last part of `key` has no dot, since WebDataset splits names there."""

    key: str
    image: bytes
    label: int
    extension: str = "jpg"


def write_dataset(
    url: str,
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, Iterable[RawSample]],
    samples_per_shard: int,
    made: Mapping[str, str | int | float | bool] | None = None,
    shard_bytes: float = math.inf,
) -> Manifest:
    """Write every split as shards below `url` and, last, the manifest; images of a shard have about `shard_bytes`.

    Two packers of the same samples write the same bytes. Raises DataError for a key or label that no reader could take.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    listed = {}
    for split, samples in splits.items():
        batches = _batch_samples(_check_samples(samples, len(classes)), samples_per_shard, shard_bytes)
        listed[split] = tuple(write_shard(url, make_shard_name(split, n), batch) for n, batch in enumerate(batches))
    packed = Manifest(name=name, classes=tuple(classes), made=dict(made or {}), splits=listed)
    manifest.save(url, packed)
    return packed


def encode_tar(samples: Iterable[RawSample]) -> bytes:
    """Return a WebDataset tar of `KEY.jpg` and `KEY.cls` members, without times or owners."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, mtime=0, user="root", group="root", encoder=False) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, sample.extension: sample.image, "cls": str(sample.label).encode()})
    return buffer.getvalue()


def make_shard_name(split: str, number: int) -> str:
    """Return the path of a shard below the dataset's folder."""
    return f"{split}/{split}-{number:06d}.tar"


def write_shard(url: str, name: str, samples: Iterable[RawSample]) -> Shard:
    """Write a shard and, after it, its index; return its entry of the manifest. Raises DataError or StorageError."""
    data = encode_tar(samples)
    # Read back from the bytes to be written: what is wrong is found here, not by a reader.
    listing = shard_scan.index_tar(data, name)
    file_io.write_bytes(file_io.join(url, name), data)
    return shard_scan.save_index(url, name, listing, len(data), hashlib.sha256(data).hexdigest())


def _check_samples(samples: Iterable[RawSample], classes: int) -> Iterator[RawSample]:
    """Yield the samples. Raises DataError for a label that is none, or a key that would not come back from a tar."""
    for sample in samples:
        parts = sample.key.split("/")
        if "." in parts[-1] or "\0" in sample.key or any(part in ("", ".", "..") for part in parts):
            rule = "must be a relative path, without '..' and with no dot in its last component"
            raise DataError(f"sample {sample.key!r}: the key {rule}")
        if not 0 <= sample.label < classes:
            raise DataError(f"sample {sample.key!r}: the label must be in 0 .. {classes - 1}, got {sample.label}")
        yield sample


def _batch_samples(samples: Iterable[RawSample], count: int, shard_bytes: float) -> Iterator[list[RawSample]]:
    batch, size = list[RawSample](), 0
    for sample in samples:
        batch.append(sample)
        size += len(sample.image)
        if len(batch) == count or size >= shard_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
