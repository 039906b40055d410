"""The index of one tar that was made elsewhere, written beside it or in another place, with a record to resume from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.fingerprint import fingerprint
from orchestrator.config.json_text import parse_object
from orchestrator.data import decode, index, tars
from orchestrator.data.errors import BadSampleError, DataError
from orchestrator.data.fields import NONE_SKIPPED, Others, Skipped, members_named
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
    skipped: Skipped = NONE_SKIPPED
    transparent: int = 0  # images


class ShardWork:
    """Indexes single tars below `url` into `to`; safe for threads."""

    def __init__(self, url: str, to: str, how: Labels, lists: Lists, ranges: Ranges) -> None:
        self._url, self._to, self._how, self._lists, self._ranges = url, to, how, lists, ranges
        self._options = fingerprint(url, how.made(), how.classes, how.titles)
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
        fields, others, shown = self._how.fields, Others(), urls.redact(url)
        transparent: list[str] = []
        members = tars.members(blocks, shown, fields.extensions, others.add)
        noted = note_transparent(members, fields.images, transparent)
        listing = index.of_members(noted, shown, self._how.checked_reader(), fields, others)
        skipped = others.skipped(set(listing.keys))
        if not listing.keys and others.members:
            raise DataError(f"{shown}: no sample in it has a {members_named(fields.images)}{others.hint()}")
        if skipped.images and not fields.is_chosen:
            raise DataError(f"{shown}: {skipped.told(fields, skipped.samples + len(listing.keys))}: {_asked(skipped)}")
        for one in said:
            if trouble := one.disagreement(name, len(listing.keys), size, md5.hexdigest() if wants_md5 else None):
                raise DataError(trouble)
        if not listing.keys:  # and no other member: it is left out
            return facts(Shard(name=name, samples=0, bytes=size, sha256="", index_sha256=""), listing, skipped)
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
                "skipped": skipped.to_dict(),
                "transparent": len(transparent),
            }
        )
        files.write_bytes(files.join(self._to, WORK, name + ".json"), entry.encode())
        return facts(shard, listing, skipped, len(transparent))

    def _kept(self, name: str, size: int) -> Facts | None:
        """What an earlier run found, if it is still so."""
        if not self._resumes:
            return None
        try:
            entry = parse_object(files.read_bytes(files.join(self._to, WORK, name + ".json")))
            shard = Shard.from_dict(entry["shard"])
            same = (entry["options"], entry["said"]) == (self._options, repr(self._lists.by_shard.get(name, ())))
            if not same or shard.bytes != size:
                return None
            skipped, transparent = Skipped.from_dict(entry["skipped"]), int(entry["transparent"])
            return facts(shard, index.load(self._to, shard), skipped, transparent)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # ConfigError and DataError are ValueErrors
            return None


def facts(shard: Shard, listing: ShardIndex, skipped: Skipped, transparent: int = 0) -> Facts:
    """What is kept of a shard and its index."""
    return Facts(shard, listing.labels.astype(np.int32), index.Keys(listing.keys).hashes(), skipped, transparent)


def describe_transparent(counts: Mapping[str, int]) -> list[str]:
    """Return a line about the transparent images of each split that has some."""
    return [
        f"{split}: {count} images are transparent: they are laid on {decode.BACKGROUND_NAME}"
        for split, count in counts.items()
        if count
    ]


def note_transparent(members: Iterable[Member], images: Sequence[str], keys: list[str]) -> Iterator[Member]:
    """Yield the members, and append the key of each image that is not opaque to `keys`; broken ones are passed over."""
    for member in members:
        if member.extension in images:
            with suppress(BadSampleError):
                if decode.is_transparent(member.payload):
                    keys.append(member.key)
        yield member


def _asked(skipped: Skipped) -> str:
    """Ask for the user's word on samples that have an image under another name."""
    image, prefix = skipped.images[0], skipped.images[0].rpartition(".")[0] + "."
    fitting = sorted(skipped.labels, key=lambda label: not label.startswith(prefix))
    labels = f" --label-key 'cls;{fitting[0]}'" if fitting else ""
    return f"set --image-key 'jpg;{image}'{labels} to take them, --image-key jpg to leave them out"
