"""Reader of the samples of one split: any one of them, or along a plan that is read ahead while the loader decodes.

Remote windows are fetched in large pieces by several threads into memory, held until their last sample is taken; what
is held is bounded by the open windows and a budget. Local windows are only announced to the operating system, whose
page cache is the read-ahead, and samples are read straight into the decoding thread's buffer.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from orchestrator.config import redaction
from orchestrator.config.errors import format_command
from orchestrator.data import index
from orchestrator.data.config import ReadingConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest
from orchestrator.data.sampler import Span
from orchestrator.storage import file_io, urls
from orchestrator.storage.block_cache import BlockCache
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

# Indexes in memory (of 10,000 samples one takes about half a megabyte), unless more windows are open.
CACHED_INDEXES = 256
PIECE_BYTES = 8 * 2**20  # of a remote read: large enough that a round trip costs little
MMAP_MIN_BYTES = 2**20  # from this size on a piece has pages of its own
LOCAL_AHEAD_STEPS = 32  # batches ahead for which local windows are announced
LOCAL_THREADS = 2


class Sample(NamedTuple):
    """One encoded image: where it came from, what it is. The image's memory is valid until the thread's next read."""

    key: str
    label: int
    source: str  # shard URL, for error messages
    offset: int  # byte of the tar where the image begins
    image: memoryview  # writable


def _read_available_memory() -> float:
    """Return the bytes that are available without swapping; infinity where the system does not report it."""
    with suppress(OSError, TypeError):
        return int(re.search(rb"MemAvailable: +(\d+)", Path("/proc/meminfo").read_bytes())[1]) * 1024  # type: ignore[index]
    return float("inf")


class ReadStats(NamedTuple):
    """Amounts read since the reader was made."""

    bytes: int
    requests: int
    retries: int
    cache_hits: int
    cache_misses: int
    cache_off: int  # 1 once the cache is disabled, because its disk failed


class SampleReader:
    """Reader of one split of a dataset; create it in the process that uses it. Safe for its threads.

    Shards go by their number in the manifest. Remote tars are read through the node's cache when there is one.
    """

    def __init__(self, url: str, manifest: Manifest, split: str, config: ReadingConfig | None = None) -> None:
        self._config = config = config or ReadingConfig()
        self._url = url
        self.shards = manifest.shards(split)
        self._tars = [manifest.tar_url(url, shard) for shard in self.shards]
        self.redacted_urls = [redaction.redact(url) for url in self._tars]
        self.classes = len(manifest.classes)
        # Packing decoded every image, and each is compared with its checksum when it is read.
        self.has_verified_images = manifest.made.get("decode") is True
        self._indexes: OrderedDict[int, Future[ShardIndex]] = OrderedDict()
        self._max_indexes = CACHED_INDEXES
        self._size_checked: set[int] = set()
        self._lock = threading.Lock()
        self.is_local = urls.is_local(self._tars[0]) if self._tars else True
        self._ranges = RangeReader(config.streams)
        self._cache: BlockCache | None = None
        self._has_warned = False
        if config.cache and not self.is_local:
            self._cache = BlockCache(os.path.expanduser(config.cache), int(config.cache_gib * 2**30))
        self._prefetcher = Prefetcher(self, iter(()), 0, 1)

    def check_windows(self, samples: int) -> None:
        """Raise DataError when so many remote samples would take more than half of the memory that is free."""
        free, total = _read_available_memory(), sum(shard.bytes for shard in self.shards)
        needed = samples * total // max(1, sum(shard.samples for shard in self.shards))
        if not self.is_local and min(needed, total) > free / 2:
            raise DataError(
                f"order.lanes x order.window: the {samples} samples that a worker holds open are {needed / 2**20:,.0f} "
                f"MiB of this data, more than half of the {free / 2**20:,.0f} MiB that are free on its node: lower "
                "order.window, or use more workers"
            )

    def keep_indexes(self, count: int) -> None:
        """Keep the indexes of at least `count` shards: with fewer, each sample would read its index again."""
        self._max_indexes = max(self._max_indexes, count)

    def read(self, shard: int, number: int) -> Sample:
        """Return the sample `number` of shard `shard`. Raises DataError and StorageError as `Prefetcher.get_sample`."""
        sample = self._prefetcher.get_sample(shard, number)
        return sample._replace(image=memoryview(bytearray(sample.image)))  # the caller's own

    def open_prefetcher(self, plan: Iterator[Span]) -> closing[Prefetcher]:
        """Return a context with a prefetcher along a plan, closed at its end."""
        return closing(Prefetcher(self, plan, self._config.read_ahead_mib * 2**20, self._config.streams))

    def get_read_stats(self) -> ReadStats:
        """Return what was read so far."""
        transfer, cache = self._ranges.transfer, self._cache
        cached = (0, 0, 0) if cache is None else (cache.hits, cache.misses, int(cache.disk_error is not None))
        return ReadStats(transfer.bytes, transfer.requests, transfer.retries, *cached)

    def close(self) -> None:
        """Close what is open."""
        self._prefetcher.close()
        self._ranges.close()

    def load_index(self, shard: int) -> ShardIndex:
        """Return the shard's index, read once while it is in use. Raises DataError when it is unfit."""
        with self._lock:
            future = self._indexes.get(shard)
            is_mine = future is None
            if future is None:
                future = self._indexes[shard] = Future()
                if len(self._indexes) > self._max_indexes:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end(shard)
        if is_mine:
            try:
                future.set_result(self._load_checked(shard))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._indexes.pop(shard, None)  # the storage may be up again at the next try
        return future.result()

    def _load_checked(self, shard: int) -> ShardIndex:
        facts = self.shards[shard]
        loaded = index.load(self._url, facts)
        labels = loaded.labels
        if len(labels) != facts.samples:
            raise DataError(f"data: {facts.name}: its index lists {len(labels)} samples, the manifest {facts.samples}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
            raise DataError(f"data: {facts.name}: labels outside 0 .. {self.classes - 1}")
        return loaded

    def read_into(self, shard: int, start: int, view: memoryview, bypass_cache: bool = False) -> None:
        """Fill `view` with the tar's bytes from `start`; past the cache, whose blocks are dropped, on demand.

        Raises DataError when the tar is missing or has another size, StorageError when the storage fails.
        """
        url, facts = self._tars[shard], self.shards[shard]
        if self.is_local and shard not in self._size_checked:
            self._check_size(shard)
        try:
            if self._cache is not None and not bypass_cache:
                self._cache.read_into(
                    url, facts.sha256, facts.bytes, start, view, lambda at, part: self._ranges.read_into(url, at, part)
                )
                if self._cache.disk_error is not None and not self._has_warned:
                    self._has_warned = True  # `train/cache_off` counts it, too
                    problem = f"the data cache is disabled, storage is read directly: {self._cache.disk_error}"
                    warnings.warn(problem, stacklevel=2)
            else:
                if self._cache is not None:
                    self._cache.invalidate_range(url, facts.sha256, start, len(view))
                self._ranges.read_into(url, start, view)
        except (FileNotFoundError, StorageError):
            self._check_size(shard)  # a missing or truncated tar has an error of its own; else the storage's stands
            raise

    def advise(self, shard: int, start: int, length: int) -> None:
        """Advise the operating system that these bytes of a local tar are read soon."""
        self._ranges.advise(self._tars[shard], start, length)

    def _check_size(self, shard: int) -> None:
        try:
            size = file_io.get_size(self._tars[shard])
        except FileNotFoundError:
            raise DataError(f"data: {self.redacted_urls[shard]}: missing although the manifest lists it") from None
        if size != (packed := self.shards[shard].bytes):
            raise DataError(f"data: {self.redacted_urls[shard]}: {size} bytes, the manifest says {packed}: truncated?")
        self._size_checked.add(shard)


Piece = Future[tuple[int, memoryview]]  # byte of the tar where it begins, its data


def _allocate_memory(length: int) -> memoryview:
    """Return writable memory that the operating system gets back with its last view: a heap would keep the holes."""
    if length < MMAP_MIN_BYTES:
        return memoryview(bytearray(length))
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # kernels without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)


class Prefetcher:
    """Samples of one split, read ahead along a plan. `advance` is for one thread, `get_sample` for any."""

    def __init__(self, reader: SampleReader, plan: Iterator[Span], budget_bytes: int, streams: int) -> None:
        self._reader, self._plan, self._budget = reader, plan, budget_bytes
        self._next_span = next(plan, None)
        # By sample, with its uses that are left; a piece is held in memory while some of its samples are to be taken.
        self._pieces: dict[tuple[int, int], tuple[Piece, int]] = {}
        self._unopened_windows: list[tuple[int, int]] = []  # (batch in which they open, bytes)
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(LOCAL_THREADS if reader.is_local else streams, thread_name_prefix="read")

    def advance(self, step: int) -> None:
        """Start to read what batch `step`, the next one, needs, and later ones as far as the budget allows."""
        self._unopened_windows = [(opens, size) for opens, size in self._unopened_windows if opens > step]
        early_bytes = sum(size for _, size in self._unopened_windows)
        while (span := self._next_span) is not None:
            expected = self._estimate_bytes(span)
            if self._reader.is_local:
                if span.step > step + LOCAL_AHEAD_STEPS:
                    break
                self._pool.submit(self._advise_span, span)
            else:
                if span.step > step and early_bytes + expected > self._budget:
                    break
                self._fetch(span, expected)
                self._unopened_windows.append((span.step, expected))
                early_bytes += expected
            self._next_span = next(self._plan, None)

    def get_sample(self, shard: int, number: int) -> Sample:
        """Return a sample, its checksum verified.

        Raises DataError when the data is missing, truncated or not what was indexed, StorageError when storage fails.
        """
        with self._lock:
            piece, uses = self._pieces.pop((shard, number), (None, 0))
            if piece is not None and uses > 1:
                self._pieces[shard, number] = piece, uses - 1
        shard_index = self._reader.load_index(shard)
        offset, length = shard_index.offsets.item(number), shard_index.lengths.item(number)
        if piece is None:
            view = self._get_buffer(length)
            self._reader.read_into(shard, offset, view)
        else:
            start, data = piece.result()
            view = data[offset - start : offset - start + length]
        key, label = shard_index.keys[number], shard_index.labels.item(number)
        sample = Sample(key, label, self._reader.redacted_urls[shard], offset, view)
        checksum = shard_index.checksums.item(number)
        if index.compute_checksum(view) != checksum:
            # Perhaps it was damaged on its way.
            self._reader.read_into(shard, offset, view, bypass_cache=True)
            if index.compute_checksum(view) != checksum:
                raise DataError(
                    f"data: {sample.source}: sample {sample.key!r} at byte {offset} does not have the checksum in the "
                    "index: the shard was changed or damaged after it was indexed; "
                    f"`{format_command('shards verify')}` lists all such samples"
                )
        return sample

    def cancel(self) -> None:
        """Begin no more reads; threads that wait for one that was not begun get CancelledError."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop reading; wait for reads in flight."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _estimate_bytes(self, span: Span) -> int:
        facts = self._reader.shards[span.shard]
        return int(facts.bytes / max(1, facts.samples) * len(span.numbers))

    def _fetch(self, span: Span, expected: int) -> None:
        pieces = 1 if span.is_single else max(1, -(-expected // PIECE_BYTES))
        for numbers in np.array_split(span.numbers, pieces):
            with self._lock:
                missing = [number for number in numbers.tolist() if (span.shard, number) not in self._pieces]
                if missing:
                    piece = self._pool.submit(self._read_piece, span.shard, missing[0], missing[-1])
                    uses = Counter(missing).items()  # a class-balanced epoch repeats samples
                    self._pieces |= {(span.shard, number): (piece, count) for number, count in uses}

    def _read_piece(self, shard: int, first: int, last: int) -> tuple[int, memoryview]:
        start, length = self._find_bytes(shard, first, last)
        data = _allocate_memory(length)
        self._reader.read_into(shard, start, data)
        return start, data

    def _advise_span(self, span: Span) -> None:
        # Advice only: what is wrong with the shard is raised when a sample of it is read.
        with suppress(DataError, OSError):
            self._reader.advise(span.shard, *self._find_bytes(span.shard, int(span.numbers[0]), int(span.numbers[-1])))

    def _find_bytes(self, shard: int, first: int, last: int) -> tuple[int, int]:
        shard_index = self._reader.load_index(shard)
        start = int(shard_index.offsets[first])
        return start, int(shard_index.offsets[last] + shard_index.lengths[last]) - start

    def _get_buffer(self, length: int) -> memoryview:
        buffer = getattr(self._buffers, "data", None)
        if buffer is None or len(buffer) < length:
            buffer = self._buffers.data = bytearray(length + length // 4)
        return memoryview(buffer)[:length]
