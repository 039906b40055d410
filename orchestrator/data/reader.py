"""Bytes of samples by (shard, number): a small split is kept in memory whole, a larger one read in ranges.

Lanes hop between shards with every sample, so a cache that holds only some of the split's shards would read a whole
tar for nearly every image. Made in the process that uses it and safe for its threads. Tars that are kept are verified
by checksum, tars read in ranges by size; indexes always by checksum.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass

from orchestrator.data import index
from orchestrator.data.errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest
from orchestrator.storage import files, urls

# A split of at most this many bytes is kept in memory.
CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Sample:
    """One encoded image: where it came from, what it is."""

    key: str
    source: str  # shard URL, for error messages
    offset: int
    image: bytes
    label: int


class SampleReader:
    """Reads one split of a dataset."""

    def __init__(self, url: str, manifest: Manifest, split: str, cache_bytes: int = CACHE_BYTES) -> None:
        self._url = url
        self._shards = manifest.shards(split)
        self._classes = len(manifest.classes)
        self._keeps = sum(shard.bytes for shard in self._shards) <= cache_bytes
        self._tars: dict[int, bytes] = {}
        self._indexes: dict[int, ShardIndex] = {}
        self._measured: set[int] = set()
        self._lock = threading.Lock()

    def read(self, shard: int, number: int) -> Sample:
        """The sample `number` of shard `shard`.

        Raises DataError when a shard or index is missing, truncated, damaged or labelled outside the classes.
        """
        with self._lock:
            listing = self._index(shard)
            tar = self._tar(shard)
        url = files.join(self._url, self._shards[shard].name)
        offset, length = int(listing.offsets[number]), int(listing.lengths[number])
        image = files.read_range(url, offset, length) if tar is None else tar[offset : offset + length]
        return Sample(listing.keys[number], urls.redact(url), offset, image, int(listing.labels[number]))

    def _index(self, shard: int) -> ShardIndex:
        found = self._indexes.get(shard)
        if found is None:
            found = index.load(self._url, self._shards[shard])
            if len(found.keys) != self._shards[shard].samples:
                raise DataError(
                    f"data: {self._shards[shard].name}: its index lists {len(found.keys)} samples, "
                    f"the manifest {self._shards[shard].samples}"
                )
            if len(found.labels) and not 0 <= found.labels.min() <= found.labels.max() < self._classes:
                raise DataError(f"data: {self._shards[shard].name}: labels outside 0 .. {self._classes - 1}")
            self._indexes[shard] = found
        return found

    def _tar(self, shard: int) -> bytes | None:
        """The verified tar of a split that is kept; None when it is to be read in ranges."""
        facts = self._shards[shard]
        if not self._keeps:
            self._measure(shard)
            return None
        if shard in self._tars:
            return self._tars[shard]
        url = files.join(self._url, facts.name)
        try:
            data = files.read_bytes(url)
        except FileNotFoundError:
            raise self._missing(url) from None
        self._check_size(shard, len(data))
        if hashlib.sha256(data).hexdigest() != facts.sha256:
            raise DataError(f"data: {urls.redact(url)}: damaged: it does not have the checksum that the manifest names")
        self._tars[shard] = data
        return data

    def _measure(self, shard: int) -> None:
        """Look once whether a tar that is read in ranges is all there."""
        if shard in self._measured:
            return
        url = files.join(self._url, self._shards[shard].name)
        try:
            self._check_size(shard, files.size(url))
        except FileNotFoundError:
            raise self._missing(url) from None
        self._measured.add(shard)

    def _check_size(self, shard: int, size: int) -> None:
        facts = self._shards[shard]
        if size != facts.bytes:
            url = urls.redact(files.join(self._url, facts.name))
            raise DataError(f"data: {url}: {size} bytes, the manifest says {facts.bytes}: truncated?")

    @staticmethod
    def _missing(url: str) -> DataError:
        return DataError(f"data: {urls.redact(url)}: missing although the manifest lists it")
