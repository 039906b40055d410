"""The index of one tar that was made elsewhere, written beside it or in another place, with a record to resume from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.fingerprint import fingerprint
from orchestrator.data import decode, index, tars
from orchestrator.data.errors import BadSampleError, DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.labels import Labels
from orchestrator.data.manifest import Shard
from orchestrator.data.shard_counts import Lists
from orchestrator.data.tars import Member
from orchestrator.storage import files, urls
from orchestrator.storage.files import StorageError
from orchestrator.storage.ranged import Ranges

WORK = "_indexing"


@dataclass(frozen=True)
class Facts:
    """What is kept in memory of each shard: 12 bytes a sample."""

    shard: Shard
    labels: NDArray[np.int32]
    keys: NDArray[np.uint64]  # hashes
    transparent: int = 0  # images


class ShardWork:
    """Indexes single tars below `url` into `to`; safe for threads."""

    def __init__(self, url: str, to: str, how: Labels, lists: Lists, ranges: Ranges) -> None:
        self._url, self._to, self._how, self._lists, self._ranges = url, to, how, lists, ranges
        self._options = fingerprint(url, how.key, how.classes)
        self._resumes = files.exists(files.join(to, WORK))

    def begin(self) -> None:
        """Find out early whether the place can be written to."""
        try:
            files.write_bytes(files.join(self._to, WORK, "options"), self._options.encode())
        except StorageError as error:
            raise StorageError(f"{error}; --to URL writes manifest and indexes elsewhere") from None

    def end(self) -> None:
        """Remove what only a resumed run needs."""
        files.remove(files.join(self._to, WORK))

    def __call__(self, item: tuple[str, int], tick: Callable[[int], None]) -> Facts | str:
        """The facts of a shard whose index is written, or what is wrong with it."""
        name, size = item
        try:
            kept = self._kept(name, size)
            if kept is not None:
                tick(size)
                return kept
            return self._indexed(name, tick)
        except FileNotFoundError:
            return f"{urls.redact(files.join(self._url, name))}: missing"
        except DataError as error:
            return str(error)

    def _indexed(self, name: str, tick: Callable[[int], None]) -> Facts:
        url = files.join(self._url, name)
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        said = self._lists.by_shard.get(name, ())
        wants_md5 = any(one.md5 is not None for one in said)
        size = 0

        def count(read: int) -> None:
            nonlocal size
            size += read
            tick(read)

        blocks = tars.blocks(url, self._ranges, (sha256, md5) if wants_md5 else (sha256,), count)
        extension = self._how.extension
        transparent: list[str] = []
        members = tars.members(blocks, urls.redact(url), (*tars.IMAGE_EXTENSIONS, extension))
        noted = note_transparent(members, transparent)
        listing = index.of_members(noted, urls.redact(url), self._how.checked_reader(), extension)
        if not listing.keys:
            raise DataError(
                f"{urls.redact(url)}: no sample in it: no member ends in {', '.join(tars.IMAGE_EXTENSIONS)}"
            )
        for one in said:
            if trouble := one.disagreement(name, len(listing.keys), size, md5.hexdigest() if wants_md5 else None):
                raise DataError(trouble)
        data = listing.to_bytes()
        files.write_bytes(files.join(self._to, name + index.SUFFIX), data)
        shard = Shard(
            name=name,
            samples=len(listing.keys),
            bytes=size,
            sha256=sha256.hexdigest(),
            index_sha256=hashlib.sha256(data).hexdigest(),
        )
        entry = json.dumps(
            {
                "options": self._options,
                "said": repr(said),
                "shard": shard.to_dict(),
                "transparent": len(transparent),
            }
        )
        files.write_bytes(files.join(self._to, WORK, name + ".json"), entry.encode())
        return facts(shard, listing, len(transparent))

    def _kept(self, name: str, size: int) -> Facts | None:
        """What an earlier run found, if it is still so."""
        if not self._resumes:
            return None
        try:
            entry = json.loads(files.read_bytes(files.join(self._to, WORK, name + ".json")))
            shard = Shard.from_dict(entry["shard"])
            same = (entry["options"], entry["said"]) == (self._options, repr(self._lists.by_shard.get(name, ())))
            if not same or shard.bytes != size:
                return None
            return facts(shard, index.load(self._to, shard), int(entry["transparent"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # ConfigError and DataError are ValueErrors
            return None


def facts(shard: Shard, listing: ShardIndex, transparent: int = 0) -> Facts:
    """What is kept of a shard and its index."""
    return Facts(shard, listing.labels.astype(np.int32), index.Keys(listing.keys).hashes(), transparent)


def note_transparent(members: Iterable[Member], keys: list[str]) -> Iterator[Member]:
    """Yield the members, and append the key of each image that is not opaque to `keys`; broken ones are passed over."""
    for member in members:
        if member.extension in tars.IMAGE_EXTENSIONS:
            with suppress(BadSampleError):
                if decode.is_transparent(member.payload):
                    keys.append(member.key)
        yield member
