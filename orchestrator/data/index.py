"""Index of a shard: where each sample's image lies in its tar, so that any sample is one ranged read."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_object
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Shard
from orchestrator.storage import file_io

SUFFIX = ".index.json"
NUMBER_COLUMNS = {"labels": np.int64, "offsets": np.int64, "lengths": np.int64, "checksums": np.uint64}

Places = NDArray[np.int64]


class KeyColumn:
    """Texts in one piece of memory: as single strings they would take most of an open index or listing."""

    __slots__ = ("_ends", "_text")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._text = bytearray(b"".join(encoded))
        self._ends = array("q", accumulate(map(len, encoded), initial=0))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return self.get_bytes(number).decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def append(self, text: str) -> None:
        """Add one more text at the end."""
        self._text += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def get_bytes(self, number: int) -> bytes:
        """Return a text's bytes, which sort as the texts do."""
        if not 0 <= number < len(self):
            raise IndexError(f"key {number} of {len(self)}")
        return bytes(self._text[self._ends[number] : self._ends[number + 1]])

    def compute_hashes(self) -> NDArray[np.uint64]:
        """Return xxh3_64 of each text."""
        view = memoryview(self._text)
        return np.array([xxhash.xxh3_64_intdigest(view[a:b]) for a, b in pairwise(self._ends)], dtype=np.uint64)


@dataclass(frozen=True)
class ShardIndex:
    """Columns over the S samples of a shard, in the tar's order."""

    keys: KeyColumn
    labels: NDArray[np.int64]  # S
    offsets: NDArray[np.int64]  # S, byte of the tar where the image begins
    lengths: NDArray[np.int64]  # S, bytes of the image
    checksums: NDArray[np.uint64]  # S, xxh3_64 of the image's bytes

    @classmethod
    def build(cls, keys: Iterable[str], *numbers: Iterable[int]) -> ShardIndex:
        """Return the index of these columns, the numbers in the order of NUMBER_COLUMNS."""
        types = NUMBER_COLUMNS.values()
        arrays: list[Any] = [np.array(list(column), dtype=kind) for column, kind in zip(numbers, types, strict=True)]
        return cls(KeyColumn(keys), *arrays)

    def to_bytes(self) -> bytes:
        """Return JSON of the columns, the same bytes for the same content."""
        columns = {"keys": list(self.keys)} | {name: getattr(self, name).tolist() for name in NUMBER_COLUMNS}
        return json.dumps(columns, separators=(",", ":")).encode()


def compute_checksum(image: bytes | bytearray | memoryview) -> int:
    """Return XXH3 of an image's bytes, 64 bits: a tenth of the cost of any cryptographic sum."""
    return xxhash.xxh3_64_intdigest(image)


def load(dataset: str, shard: Shard) -> ShardIndex:
    """Load the index of a shard. Raises DataError when it is missing, not the manifest's, or does not fit the tar."""
    url = file_io.join(dataset, shard.name + SUFFIX)
    label = f"data: {redaction.redact(url)}"
    try:
        data = file_io.read_bytes(url)
    except FileNotFoundError:
        raise DataError(f"{label}: missing; pack or index the dataset again") from None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError(f"{label}: damaged: it does not have the checksum that the manifest names")
    try:
        return _parse_columns(parse_object(data), shard.bytes)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{label}: damaged: {error!r}; pack or index the dataset again") from None


def _parse_columns(columns: dict[str, list[Any]], tar_bytes: int) -> ShardIndex:
    names = ("keys", *NUMBER_COLUMNS)
    for name in names:
        if not set(map(type, columns[name])) <= {str if name == "keys" else int}:
            raise ValueError(f"column {name!r} holds other values than it should")
    if len({len(columns[name]) for name in names}) > 1:
        raise ValueError(f"columns of {', '.join(f'{len(columns[name])} {name}' for name in names)}")
    built = ShardIndex.build(*(columns[name] for name in names))
    # Compared like this no sum can overflow.
    inside = (built.offsets >= 0) & (built.lengths >= 0) & (built.lengths <= tar_bytes - built.offsets)
    if not inside.all():
        raise ValueError(f"sample {built.keys[int(np.argmin(inside))]!r} lies outside the {tar_bytes} bytes of the tar")
    return built


def find_equal_pairs(columns: Sequence[NDArray[np.uint64]]) -> Places:
    """Return P x 2 places of equal hashes in the concatenated columns, each with its next equal, ascending."""
    hashes = np.concatenate([np.empty(0, np.uint64), *columns])
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    first = np.flatnonzero(ranked[1:] == ranked[:-1])
    pairs = np.stack((order[first], order[first + 1]), axis=1)
    return np.asarray(pairs[np.argsort(pairs[:, 0], kind="stable")], dtype=np.int64)


def locate_rows(lengths: Sequence[int], places: Places) -> tuple[Places, Places]:
    """Return column and row of places in concatenated columns of these lengths; shapes as `places`."""
    ends = np.cumsum(lengths, dtype=np.int64)
    column = np.searchsorted(ends, places, side="right")
    starts = ends - np.asarray(lengths, dtype=np.int64)
    return np.asarray(column, dtype=np.int64), np.asarray(places - starts[column], dtype=np.int64)
