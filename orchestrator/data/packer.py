"""Samples into WebDataset tars with indexes and a manifest; the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import webdataset

from orchestrator.data import index, manifest
from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.storage import files


@dataclass(frozen=True)
class RawSample:
    """An encoded image with its label; `key` has no dot, since WebDataset splits names there."""

    key: str
    image: bytes
    label: int
    extension: str = "jpg"


def pack(
    url: str,
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, Iterable[RawSample]],
    samples_per_shard: int,
) -> Manifest:
    """Write every split as shards below `url` and, last, the manifest.

    Two packers of the same samples write the same bytes, each file in one step: a race between them is harmless.
    Raises DataError for a key or label that a reader could not take.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard: {samples_per_shard} is refused: at least 1 is needed")
    listed = {
        split: tuple(
            _write_shard(url, f"{split}/{split}-{number:06d}.tar", batch)
            for number, batch in enumerate(_batched(_checked(samples, len(classes)), samples_per_shard))
        )
        for split, samples in splits.items()
    }
    packed = Manifest(name=name, classes=tuple(classes), splits=listed)
    manifest.save(url, packed)
    return packed


def tar_bytes(samples: Iterable[RawSample]) -> bytes:
    """A WebDataset tar of `KEY.jpg` and `KEY.cls` members, without times or owners."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, mtime=0, user="root", group="root", encoder=False) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, sample.extension: sample.image, "cls": str(sample.label).encode()})
    return buffer.getvalue()


def _write_shard(url: str, name: str, samples: Sequence[RawSample]) -> Shard:
    data = tar_bytes(samples)
    listing = index.of_tar(data, name).to_bytes()
    files.write_bytes(files.join(url, name), data)
    files.write_bytes(files.join(url, name + index.SUFFIX), listing)
    return Shard(
        name=name,
        samples=len(samples),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        index_sha256=hashlib.sha256(listing).hexdigest(),
    )


def _checked(samples: Iterable[RawSample], classes: int) -> Iterator[RawSample]:
    for sample in samples:
        if not sample.key or "." in sample.key:
            raise DataError(f"sample {sample.key!r}: the key is refused: it must be there and hold no dot")
        if not 0 <= sample.label < classes:
            raise DataError(
                f"sample {sample.key!r}: label {sample.label} is refused: 0 .. {classes - 1} are the classes"
            )
        yield sample


def _batched(samples: Iterable[RawSample], size: int) -> Iterator[list[RawSample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
