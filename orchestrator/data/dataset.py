"""Reader of the samples of one split: any one of them, a shard's in order, or along a plan that is read ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from orchestrator.data import prefetch
from orchestrator.data.config import ReadingConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.prefetch import Prefetcher, Sample, Span
from orchestrator.data.shard_files import ShardFiles

STREAM_SAMPLES = 64  # samples of a shard that are read ahead when it is read in order


def _read_available_memory() -> int | None:
    """Return the bytes that are available without swapping; None where the system does not report it."""
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("MemAvailable:")), None)


class ReadStats(NamedTuple):
    """Amounts read since the reader was made."""

    bytes: int
    requests: int
    retries: int
    cache_hits: int
    cache_misses: int
    cache_off: int  # 1 once the cache is disabled, because its disk failed


class SampleReader(ShardFiles):
    """Reader of one split of a dataset; create it in the process that uses it. Safe for its threads."""

    def __init__(self, url: str, manifest: Manifest, split: str, config: ReadingConfig | None = None) -> None:
        self._config = config or ReadingConfig()
        super().__init__(url, manifest, split, self._config)
        self._prefetcher = Prefetcher(self, iter(()), 0, 1)

    def check_windows(self, samples: int) -> None:
        """Raise DataError when so many remote samples would take more than half of the memory that is free.

        Local windows lie in the page cache and need none.
        """
        shards, free = self.shards, _read_available_memory()
        total = sum(shard.bytes for shard in shards)
        needed = samples * total // max(1, sum(shard.samples for shard in shards))
        if not self.is_local and free is not None and min(needed, total) > free // 2:
            raise DataError(
                f"order.lanes x order.window: the {samples} samples that a worker holds open are {needed / 2**20:,.0f} "
                f"MiB of this data, more than half of the {free / 2**20:,.0f} MiB that are free on its node: lower "
                "order.window, or use more workers"
            )

    def keep_indexes(self, count: int) -> None:
        """Keep the indexes of at least `count` shards: with fewer, each sample would read its index again."""
        self.max_cached_indexes = max(self.max_cached_indexes, count)

    def read(self, shard: int, number: int) -> Sample:
        """Return the sample `number` of shard `shard`.

        Raises DataError when a shard or index is missing, truncated, damaged or labelled outside the classes,
        StorageError when the storage fails.
        """
        sample = self._prefetcher.get_sample(shard, number)
        return replace(sample, image=memoryview(bytearray(sample.image)))  # the caller's own

    def iter_shard(self, shard: int) -> Iterator[Sample]:
        """Yield all samples of a shard in its order, read ahead. Raises as `read` does."""
        counts = [facts.samples for facts in self.shards]
        first = sum(counts[:shard])
        with self.open_prefetcher(
            prefetch.plan_id_range(counts, first, first + counts[shard], STREAM_SAMPLES)
        ) as ahead:
            for number in range(counts[shard]):
                if number % STREAM_SAMPLES == 0:
                    ahead.advance(number // STREAM_SAMPLES)
                yield ahead.get_sample(shard, number)

    def open_prefetcher(self, plan: Iterator[Span]) -> closing[Prefetcher]:
        """Return a context with a prefetcher along a plan, closed at its end."""
        return closing(Prefetcher(self, plan, self._config.read_ahead_mib * 2**20, self._config.streams))

    def get_read_stats(self) -> ReadStats:
        """Return what was read so far."""
        transfer, cache = self.ranges.transfer, self.cache
        cached = (0, 0, 0) if cache is None else (cache.hits, cache.misses, int(cache.disk_error is not None))
        return ReadStats(transfer.bytes, transfer.requests, transfer.retries, *cached)

    def close(self) -> None:
        """Close what is open."""
        self._prefetcher.close()
        super().close()
