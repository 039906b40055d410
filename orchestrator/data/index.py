"""Per-shard index: where each sample's image lies in its tar, so that any sample is one ranged read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_object
from orchestrator.data.build import label_format, tar_reader
from orchestrator.data.build.member_fields import MemberFields, OtherMembers
from orchestrator.data.build.tar_reader import TarMember
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Shard
from orchestrator.storage import file_io

SUFFIX = ".index.json"


class KeyColumn(Sequence[str]):
    """Keys in one piece of memory: as single strings they would take most of an open index."""

    __slots__ = ("_ends", "_text")

    def __init__(self, keys: Iterable[str]) -> None:
        encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[str, ...]: ...
    def __getitem__(self, number: int | slice) -> str | tuple[str, ...]:
        if isinstance(number, slice):
            return tuple(self[at] for at in range(*number.indices(len(self))))
        at = number + len(self) if number < 0 else number
        if not 0 <= at < len(self):
            raise IndexError(f"key {number} of {len(self)}")
        return self._text[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and not isinstance(other, str) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def compute_hashes(self) -> NDArray[np.uint64]:
        """xxh3_64 of each key."""
        view, ends = memoryview(self._text), self._ends.tolist()
        found = [xxhash.xxh3_64_intdigest(view[start:end]) for start, end in pairwise(ends)]
        return np.array(found, dtype=np.uint64)


@dataclass(frozen=True)
class ShardIndex:
    """Columns over the S samples of a shard, in the tar's order."""

    keys: Sequence[str]
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


def compute_checksum(image: bytes | bytearray | memoryview) -> int:
    """XXH3 of an image's bytes, 64 bits: a tenth of the cost of any cryptographic sum."""
    return xxhash.xxh3_64_intdigest(image)


def index_tar(data: bytes, name: str) -> ShardIndex:
    """The index of a WebDataset tar in memory: an image and a `cls` member (decimal label) for each key.

    Raises DataError when a sample lacks one of the two or has one twice, or the tar is cut or damaged.
    """
    fields, others = MemberFields(), OtherMembers()
    members = tar_reader.iter_members([data], name, fields.extensions, others.add)
    return index_members(members, name, label_format.parse_decimal, fields, others)


def index_members(
    members: Iterable[TarMember],
    name: str,
    read_label: Callable[[memoryview], int],
    fields: MemberFields,
    others: OtherMembers,
) -> ShardIndex:
    """The index of a tar's members: an image and a label for each key, by the extensions of `fields`.

    `read_label` turns a label's payload into the label or raises ValueError with the reason. `others` has counted the
    members that are neither when this returns. Raises DataError when a sample lacks image or label, or has one twice.
    """
    ranks = {extension: rank for group in (fields.images, fields.labels) for rank, extension in enumerate(group)}
    numbers: dict[str, tuple[int, int]] = {}  # rank and label
    images: dict[str, tuple[int, int, int, int]] = {}  # rank, offset, length, checksum
    for member in members:
        key, rank, is_label = member.key, ranks[member.extension], member.extension in fields.labels
        before = (numbers if is_label else images).get(key)
        if before is not None and (before[0] == rank or not (is_label or fields.is_chosen)):
            fix = (
                "keys must be unique"
                if before[0] == rank
                else _suggest_image_key(fields.images[before[0]], member.extension)
            )
            raise DataError(
                f"{name}: sample {key!r} has two {'labels' if is_label else 'images'}, the second at byte "
                f"{member.offset}: {fix}"
            )
        if before is not None and before[0] < rank:
            continue
        if not is_label:
            images[key] = (rank, member.offset, len(member.payload), compute_checksum(member.payload))
            continue
        try:
            numbers[key] = (rank, read_label(member.payload))
        except ValueError as error:
            raise DataError(f"{name}: sample {key!r}: {error}") from None
    if odd := sorted(numbers.keys() ^ images.keys()):
        has = "a label" if odd[0] in numbers else "an image"
        said = "" if numbers else f"; no member ends in .{' or .'.join(fields.labels)}"
        raise DataError(
            f"{name}: sample {odd[0]!r} lacks an image or a label: it has {has} only ({len(odd)} such samples{said})"
            f"{others.suggest_flags()}"
        )
    _, offsets, lengths, checksums = zip(*images.values(), strict=True) if images else ((), (), (), ())
    return ShardIndex(
        KeyColumn(images),
        np.array([numbers[key][1] for key in images], dtype=np.int64),
        np.array(offsets, dtype=np.int64),
        np.array(lengths, dtype=np.int64),
        np.array(checksums, dtype=np.uint64),
    )


def _suggest_image_key(one: str, other: str) -> str:
    return f".{one} and .{other}; set --image-key {one} if that is the one to train on"


def load(dataset: str, shard: Shard) -> ShardIndex:
    """The verified index of a shard.

    Raises DataError when it is missing, not the one that the manifest names, or does not fit the shard's tar.
    """
    where = file_io.join(dataset, shard.name + SUFFIX)
    shown = redaction.redact(where)
    try:
        data = file_io.read_bytes(where)
    except FileNotFoundError:
        raise DataError(f"data: {shown}: missing; pack or index the dataset again") from None
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError(f"data: {shown}: damaged: it does not have the checksum that the manifest names")
    try:
        found = _parse_columns(parse_object(data))
        # Compared like this no sum can overflow.
        inside = (found.offsets >= 0) & (found.lengths >= 0) & (found.lengths <= shard.bytes - found.offsets)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"data: {shown}: no index: {error!r}; pack or index the dataset again") from None
    if not inside.all():
        first = found.keys[int(np.argmin(inside))]
        raise DataError(f"data: {shown}: damaged: sample {first!r} lies outside the {shard.bytes} bytes of the tar")
    return found


def _parse_columns(columns: dict[str, list[Any]]) -> ShardIndex:
    names = ("keys", "labels", "offsets", "lengths", "checksums")
    for name in names:
        if not set(map(type, columns[name])) <= {str if name == "keys" else int}:
            raise ValueError(f"column {name!r} holds other values than it should")
    if len({len(columns[name]) for name in names}) > 1:
        raise ValueError(f"columns of {', '.join(f'{len(columns[name])} {name}' for name in names)}")
    return ShardIndex(
        KeyColumn(columns["keys"]),
        np.array(columns["labels"], dtype=np.int64),
        np.array(columns["offsets"], dtype=np.int64),
        np.array(columns["lengths"], dtype=np.int64),
        np.array(columns["checksums"], dtype=np.uint64),
    )


Places = NDArray[np.int64]


def find_equal_pairs(columns: Sequence[NDArray[np.uint64]]) -> Places:
    """P x 2 places of equal hashes in the concatenated columns, each with its next equal, ascending."""
    hashes = np.concatenate([np.empty(0, np.uint64), *columns])
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    first = np.flatnonzero(ranked[1:] == ranked[:-1])
    pairs = np.stack((order[first], order[first + 1]), axis=1)
    return np.asarray(pairs[np.argsort(pairs[:, 0], kind="stable")], dtype=np.int64)


def locate_rows(columns: Sequence[NDArray[np.uint64]], places: Places) -> tuple[Places, Places]:
    """Column and row of places in the concatenated columns."""
    ends = np.cumsum([len(column) for column in columns], dtype=np.int64)
    column = np.searchsorted(ends, places, side="right")
    lengths = np.array([len(column) for column in columns], dtype=np.int64)
    return np.asarray(column, dtype=np.int64), np.asarray(places - (ends - lengths)[column], dtype=np.int64)
