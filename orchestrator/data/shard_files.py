"""Files of one split: verified indexes, kept while they are in use, and byte ranges of its tars.

Created in the process that uses it and safe for its threads. Remote tars go through the node's cache when there is one.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import Future

from orchestrator.config import redaction
from orchestrator.data import index
from orchestrator.data.config import ReadingConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.storage import file_io, urls
from orchestrator.storage.block_cache import BlockCache
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

# Indexes in memory (of 10,000 samples one takes about half a megabyte), unless more windows are open.
CACHED_INDEXES = 256


class ShardFiles:
    """Indexes and byte ranges of a split's shards, by the shard's number in the manifest."""

    def __init__(self, url: str, manifest: Manifest, split: str, config: ReadingConfig) -> None:
        self.shards = manifest.shards(split)
        self._url = url
        self._tars = [manifest.tar_url(url, shard) for shard in self.shards]
        self._redacted_urls = [redaction.redact(url) for url in self._tars]
        self.classes = len(manifest.classes)
        # Packing decoded every image, and each is compared with its checksum when it is read.
        self.has_verified_images = manifest.made.get("decode") is True
        self._indexes: OrderedDict[int, Future[ShardIndex]] = OrderedDict()
        self._size_checked: set[int] = set()
        self._lock = threading.Lock()
        self.max_cached_indexes = CACHED_INDEXES
        self._warned = False
        self.is_local = urls.is_local(self._tars[0]) if self._tars else True
        self.ranges = RangeReader(config.streams)
        self.cache: BlockCache | None = None
        if config.cache and not self.is_local:
            self.cache = BlockCache(os.path.expanduser(config.cache), int(config.cache_gib * 2**30))

    def load_index(self, shard: int) -> ShardIndex:
        """Return the shard's index, read once while it is in use. Raises DataError when it is unfit."""
        with self._lock:
            future = self._indexes.get(shard)
            is_mine = future is None
            if future is None:
                future = self._indexes[shard] = Future()
                if len(self._indexes) > self.max_cached_indexes:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end(shard)
        if is_mine:
            try:
                future.set_result(self._load_checked(self.shards[shard]))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._indexes.pop(shard, None)  # the storage may be up again at the next try
        return future.result()

    def redacted_tar_url(self, shard: int) -> str:
        """Return the URL of a shard's tar without credentials."""
        return self._redacted_urls[shard]

    def read_into(self, shard: int, start: int, view: memoryview) -> None:
        """Fill `view` with the tar's bytes from `start`.

        Raises DataError when the tar is missing or has another size, StorageError when the storage fails.
        """
        url, facts = self._tars[shard], self.shards[shard]
        if self.is_local and shard not in self._size_checked:
            self._check_size(shard)
        try:
            if self.cache is None:
                self.ranges.read_into(url, start, view)
            else:
                self.cache.read_into(
                    url, facts.sha256, facts.bytes, start, view, lambda at, part: self.ranges.read_into(url, at, part)
                )
                self._warn_cache_disabled(self.cache.disk_error)
        except FileNotFoundError:
            raise self._missing_error(shard) from None
        except StorageError:
            self._check_size(shard)  # a truncated tar has an error of its own; else the storage's stands
            raise

    def read_from_source(self, shard: int, start: int, view: memoryview) -> None:
        """Read from the source, past the cache, whose blocks are dropped because they are not what was packed."""
        if self.cache is not None:
            self.cache.invalidate_range(self._tars[shard], self.shards[shard].sha256, start, len(view))
        try:
            self.ranges.read_into(self._tars[shard], start, view)
        except FileNotFoundError:
            raise self._missing_error(shard) from None

    def advise(self, shard: int, start: int, length: int) -> None:
        """Advise the operating system that these bytes of a local tar are read soon."""
        self.ranges.advise(self._tars[shard], start, length)

    def close(self) -> None:
        """Close what is open."""
        self.ranges.close()

    def _warn_cache_disabled(self, disk_error: str | None) -> None:
        """Warn once, in the worker's log, that the cache is disabled; `train/cache_off` counts it."""
        if disk_error is not None and not self._warned:
            self._warned = True
            warnings.warn(f"the data cache is disabled, storage is read directly: {disk_error}", stacklevel=2)

    def _load_checked(self, facts: Shard) -> ShardIndex:
        labels = (listing := index.load(self._url, facts)).labels
        if len(labels) != facts.samples:
            raise DataError(f"data: {facts.name}: its index lists {len(labels)} samples, the manifest {facts.samples}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
            raise DataError(f"data: {facts.name}: labels outside 0 .. {self.classes - 1}")
        return listing

    def _check_size(self, shard: int) -> None:
        """Raise DataError when a tar is missing or not of the size that was packed."""
        try:
            size = file_io.get_size(self._tars[shard])
        except FileNotFoundError:
            raise self._missing_error(shard) from None
        if size != self.shards[shard].bytes:
            raise DataError(
                f"data: {self.redacted_tar_url(shard)}: {size} bytes, the manifest says "
                f"{self.shards[shard].bytes}: truncated?"
            )
        self._size_checked.add(shard)

    def _missing_error(self, shard: int) -> DataError:
        return DataError(f"data: {self.redacted_tar_url(shard)}: missing although the manifest lists it")
