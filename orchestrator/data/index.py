"""Per-shard index: where each sample's image lies in its tar, so that any sample is one ranged read."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Shard
from orchestrator.storage import files, urls

SUFFIX = ".index.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
# As WebDataset splits names: at the first dot of the last path component.
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
_BLOCK = 512


@dataclass(frozen=True)
class ShardIndex:
    """Columns over the S samples of a shard, in the tar's order."""

    keys: tuple[str, ...]
    labels: NDArray[np.int64]  # S
    offsets: NDArray[np.int64]  # S, byte of the tar where the image begins
    lengths: NDArray[np.int64]  # S, bytes of the image
    checksums: NDArray[np.uint64]  # S, xxh3_64 of the image's bytes

    def to_bytes(self) -> bytes:
        """JSON of the columns, the same bytes for the same content."""
        columns = {
            "keys": list(self.keys),
            "labels": self.labels.tolist(),
            "offsets": self.offsets.tolist(),
            "lengths": self.lengths.tolist(),
            "checksums": self.checksums.tolist(),
        }
        return json.dumps(columns, separators=(",", ":")).encode()


def checksum(image: bytes | bytearray | memoryview) -> int:
    """XXH3 of an image's bytes, 64 bits: a tenth of the cost of any cryptographic sum."""
    return xxhash.xxh3_64_intdigest(image)


def of_tar(data: bytes, name: str) -> ShardIndex:
    """The index of a WebDataset tar: an image and a `cls` member (decimal label) for each key.

    Raises DataError when a sample lacks one of the two or has one twice, or the tar is cut or damaged.
    """
    labels: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}
    for key, extension, start, size in _members(data, name):
        found: dict[str, Any] = labels if extension == "cls" else spans
        if key in found:
            raise DataError(f"{name}: sample {key!r} has two {'labels' if found is labels else 'images'}")
        if found is spans:
            spans[key] = (start, size)
            continue
        try:
            labels[key] = int(data[start : start + size])
        except ValueError:
            raise DataError(f"{name}: sample {key!r}: its label is no whole number") from None
    if odd := sorted(labels.keys() ^ spans.keys()):
        raise DataError(f"{name}: sample {odd[0]!r} lacks an image or a label ({len(odd)} such samples)")
    keys, view = tuple(spans), memoryview(data)
    return ShardIndex(
        keys,
        np.array([labels[key] for key in keys], dtype=np.int64),
        np.array([spans[key][0] for key in keys], dtype=np.int64),
        np.array([spans[key][1] for key in keys], dtype=np.int64),
        np.array([checksum(view[start : start + size]) for start, size in spans.values()], dtype=np.uint64),
    )


def _members(data: bytes, name: str) -> Iterator[tuple[str, str, int, int]]:
    """Key, extension (lower case), first byte and size of each image and label of a tar, in its order."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                parts = _MEMBER.fullmatch(member.name)
                if parts is None or not member.isfile():
                    continue
                key, extension = parts[1], parts[2].lower()
                if extension == "cls" or extension in IMAGE_EXTENSIONS:
                    yield key, extension, member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{name}: not a readable WebDataset tar: {error}") from None
    # tarfile takes a missing or broken header for the end; the true end is a block of zeros.
    if data[end : end + _BLOCK] != bytes(_BLOCK):
        raise DataError(f"{name}: cut or damaged at byte {end}: no member and no end of archive there")


def load(dataset: str, shard: Shard) -> ShardIndex:
    """The verified index of a shard. Raises DataError when it is missing or not the one the manifest names."""
    where = files.join(dataset, shard.name + SUFFIX)
    shown = urls.redact(where)
    try:
        data = files.read_bytes(where)
    except FileNotFoundError:
        raise DataError(f"data: {shown}: missing; pack or index the dataset again") from None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError(f"data: {shown}: damaged: it does not have the checksum that the manifest names")
    columns = json.loads(data)
    labels, offsets, lengths = (np.array(columns[name], dtype=np.int64) for name in ("labels", "offsets", "lengths"))
    checksums = np.array(columns["checksums"], dtype=np.uint64)
    return ShardIndex(tuple(columns["keys"]), labels, offsets, lengths, checksums)
