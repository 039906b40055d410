"""One shard held against the manifest: size, checksum, index, labels and, if wanted, whether its images decode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import decode, index, labels, tars
from orchestrator.data.adopted_shard import note_transparent
from orchestrator.data.errors import BadSampleError, DataError
from orchestrator.data.fields import NONE_SKIPPED, Others, Skipped
from orchestrator.data.index import Keys, ShardIndex
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.tars import Member
from orchestrator.storage import urls
from orchestrator.storage.files import StorageError
from orchestrator.storage.ranged import Ranges

# Columns of an index, and what they are called when they differ.
_COLUMNS = {"labels": "label", "offsets": "offset", "lengths": "length", "checksums": "checksum"}


@dataclass(frozen=True)
class Verified:
    """What was found out about a shard; the columns, 28 bytes a sample, are empty when nothing could be read."""

    problems: tuple[str, ...]
    labels: NDArray[np.int32]
    keys: NDArray[np.uint64]  # hashes
    checksums: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    unreachable: StorageError | None = None  # the storage failed: nothing is known
    skipped: Skipped = NONE_SKIPPED
    transparent: int = 0  # images, when they are decoded


class ShardCheck:
    """Verifies single shards of a dataset; safe for threads."""

    def __init__(self, url: str, found: Manifest, deep: bool, ranges: Ranges) -> None:
        self._url, self._found, self._deep, self._ranges = url, found, deep, ranges
        self._labels = labels.stored(found.made, found.classes, found.titles)

    def __call__(self, shard: Shard, tick: Callable[[int], None]) -> Verified:
        """All that is wrong with a shard."""
        problems: list[str] = []
        others = Others()
        transparent: list[str] = []
        try:
            listing = self._index(shard, problems)
            held = self._tar(shard, problems, tick, others, transparent)
        except StorageError as error:
            return _verified((*problems, str(error)), None, error)
        if listing is not None and held is not None and (said := _difference(listing, held)):
            problems.append(f"its index is not what the tar holds: {said}; index the dataset again")
        found = replace(_verified(problems, held or listing), transparent=len(transparent))
        return replace(found, skipped=others.skipped(set(held.keys))) if held is not None else found

    def _index(self, shard: Shard, problems: list[str]) -> ShardIndex | None:
        try:
            listing = index.load(self._url, shard)
        except DataError as error:
            problems.append(str(error))
            return None
        if len(listing.keys) != shard.samples:
            problems.append(f"its index lists {len(listing.keys)} samples, the manifest {shard.samples}")
        classes = len(self._found.classes)
        outside = np.flatnonzero((listing.labels < 0) | (listing.labels >= classes))
        if len(outside):
            first = int(outside[0])
            problems.append(
                f"{len(outside)} labels outside 0 .. {classes - 1}: sample {listing.keys[first]!r} has "
                f"{listing.labels[first]}"
            )
        return listing

    def _tar(
        self, shard: Shard, problems: list[str], tick: Callable[[int], None], others: Others, transparent: list[str]
    ) -> ShardIndex | None:
        """The index that the tar should have; None when it cannot be read to its end."""
        url = self._found.tar_url(self._url, shard)
        digest, size = hashlib.sha256(), 0

        def count(read: int) -> None:
            nonlocal size
            size += read
            tick(read)

        blocks = tars.blocks(url, self._ranges, (digest,), count)
        undecodable: list[str] = []
        fields = self._labels.fields
        members: Iterable[Member] = tars.members(blocks, "the tar", fields.extensions, others.add)
        if self._deep:
            members = _decoded(members, fields.images, undecodable)
            members = note_transparent(members, fields.images, transparent)
        held, unread = None, None
        try:
            held = index.of_members(members, "the tar", self._labels.reader(), fields, others)
        except FileNotFoundError:
            problems.append(f"{urls.redact(url)}: missing although the manifest lists it")
            return None
        except DataError as error:
            unread = str(error)
        for _ in blocks:  # size and checksum need what was not read
            pass
        if size != shard.bytes:
            problems.append(f"the tar has {size} bytes, the manifest says {shard.bytes}")
        elif digest.hexdigest() != shard.sha256:
            problems.append("the tar does not have the checksum that the manifest names: its bytes have changed")
        problems += [unread] if unread else []
        problems += undecodable
        return held


def _decoded(members: Iterable[Member], images: Sequence[str], undecodable: list[str]) -> Iterator[Member]:
    """The members, each image decoded on the way."""
    for member in members:
        if member.extension in images:
            try:
                decode.decode(bytes(member.payload))
            except BadSampleError as error:
                undecodable.append(f"sample {member.key!r} at byte {member.offset} cannot be decoded: {error}")
        yield member


def _difference(listing: ShardIndex, held: ShardIndex) -> str:
    """The first place where two indexes differ; empty when they do not."""
    if len(listing.keys) != len(held.keys):
        return f"{len(listing.keys)} samples in the index, {len(held.keys)} in the tar"
    for number, (listed, there) in enumerate(zip(listing.keys, held.keys, strict=True)):
        if listed != there:
            return f"sample {number} has the key {listed!r} in the index, {there!r} in the tar"
    for column, word in _COLUMNS.items():
        listed, there = getattr(listing, column), getattr(held, column)
        if len(rows := np.flatnonzero(listed != there)):
            row = int(rows[0])
            return (
                f"sample {held.keys[row]!r} has the {word} {listed[row]} in the index, {there[row]} in the tar "
                f"({len(rows)} such samples)"
            )
    return ""


def _verified(problems: Sequence[str], known: ShardIndex | None, unreachable: StorageError | None = None) -> Verified:
    listing = known or ShardIndex((), *(np.empty(0, np.int64),) * 3, np.empty(0, np.uint64))
    # Labels out of range were told; here they only have to fit.
    narrow = np.clip(listing.labels, -1, np.iinfo(np.int32).max).astype(np.int32)
    hashes = Keys(listing.keys).hashes()
    return Verified(tuple(problems), narrow, hashes, listing.checksums, listing.lengths, unreachable)
