"""Reads the samples that are needed next while the loader decodes, and returns them as bytes.

Remote windows are fetched in large pieces by several threads into memory, held until their last sample is taken; what
is held is bounded by the open windows and a budget. Local windows are only announced to the operating system, whose
page cache is the read-ahead, and samples are read straight into the decoding thread's buffer.
"""

from __future__ import annotations

import heapq
import mmap
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from orchestrator.config.errors import format_command
from orchestrator.data import index
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.sampler import EpochOrder, Int64Array, select_rank_positions
from orchestrator.data.shard_files import ShardFiles

PIECE_BYTES = 8 * 2**20  # of a remote read: large enough that a round trip costs little
MMAP_MIN_BYTES = 2**20  # from this size on a piece has pages of its own
LOCAL_AHEAD_STEPS = 32  # batches ahead for which local windows are announced
LOCAL_THREADS = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded image: where it came from, what it is. The image's memory is valid until the thread's next read."""

    shard_index: ShardIndex
    number: int  # in the listing
    source: str  # shard URL, for error messages
    image: memoryview  # writable

    @property
    def key(self) -> str:
        """The sample's key in its tar."""
        return self.shard_index.keys[self.number]

    @property
    def offset(self) -> int:
        """Byte of the tar where the image begins."""
        return int(self.shard_index.offsets[self.number])

    @property
    def label(self) -> int:
        """Its class."""
        return int(self.shard_index.labels[self.number])


class _Piece:
    """Neighbouring samples of a shard, held in memory while some of them are still to be taken."""

    __slots__ = ("bytes", "data", "left", "ready", "start")

    def __init__(self, expected: int, samples: int) -> None:
        self.bytes, self.left = expected, samples
        self.start, self.data = 0, memoryview(b"")
        self.ready: Future[None] = Future()

    def fail_if_cancelled(self, reading: Future[None]) -> None:
        """Wake the threads that wait for a piece whose reading was not begun."""
        if reading.cancelled():
            self.ready.set_exception(CancelledError())


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

    def __init__(self, split: ShardFiles, plan: Iterator[Span], budget_bytes: int, streams: int) -> None:
        self._split, self._plan, self._budget = split, plan, budget_bytes
        self._next_span = next(plan, None)
        self._pieces: dict[tuple[int, int], tuple[_Piece, int]] = {}  # by sample, with its uses that are left
        self._held_bytes = 0
        self._early_bytes = 0  # bytes of windows that are not open yet
        self._unopened_windows: list[tuple[int, int]] = []  # (batch in which they open, bytes)
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(LOCAL_THREADS if split.is_local else streams, thread_name_prefix="read")

    @property
    def held_bytes(self) -> int:
        """Bytes of remote samples in memory or on their way."""
        return self._held_bytes

    def advance(self, step: int) -> None:
        """Start to read what batch `step`, the next one, needs, and later ones as far as the budget allows."""
        self._early_bytes = sum(size for opens, size in self._unopened_windows if opens > step)
        self._unopened_windows = [(opens, size) for opens, size in self._unopened_windows if opens > step]
        while self._next_span is not None and (
            self._next_span.step <= step or self._fits_budget(self._next_span, step)
        ):
            span = self._next_span
            if self._split.is_local:
                self._pool.submit(self._advise_span, span)
            else:
                self._fetch(span)
            self._next_span = next(self._plan, None)

    def get_sample(self, shard: int, number: int) -> Sample:
        """Return a sample, its checksum verified.

        Raises DataError when the data is missing, truncated or not what was indexed, StorageError when storage fails.
        """
        with self._lock:
            piece, uses = self._pieces.pop((shard, number), (None, 0))
            if piece is not None and uses > 1:
                self._pieces[shard, number] = piece, uses - 1
        listing = self._split.load_index(shard)
        offset, length = listing.offsets.item(number), listing.lengths.item(number)
        if piece is None:
            view = self._get_buffer(length)
            self._split.read_into(shard, offset, view)
        else:
            piece.ready.result()
            view = piece.data[offset - piece.start : offset - piece.start + length]
            self._release_sample(piece)
        if index.compute_checksum(view) != listing.checksums.item(number):
            self._reread(shard, number, offset, view)
        return Sample(listing, number, self._split.redacted_tar_url(shard), view)

    def cancel(self) -> None:
        """Begin no more reads; threads that wait for one that was not begun get CancelledError."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop reading; wait for reads in flight."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fits_budget(self, span: Span, step: int) -> bool:
        if self._split.is_local:
            return span.step <= step + LOCAL_AHEAD_STEPS
        return self._early_bytes + self._estimate_bytes(span) <= self._budget

    def _estimate_bytes(self, span: Span) -> int:
        """Return about as many bytes as the span holds, without its index."""
        facts = self._split.shards[span.shard]
        return int(facts.bytes / max(1, facts.samples) * len(span.numbers))

    def _fetch(self, span: Span) -> None:
        expected = self._estimate_bytes(span)
        pieces = 1 if span.is_single else max(1, -(-expected // PIECE_BYTES))
        cuts = [len(span.numbers) * each // pieces for each in range(pieces + 1)]
        for low, high in pairwise(cuts):
            self._fetch_piece(span.shard, span.numbers[low:high].tolist(), expected // pieces)
        self._unopened_windows.append((span.step, expected))
        self._early_bytes += expected

    def _fetch_piece(self, shard: int, numbers: list[int], expected: int) -> None:
        with self._lock:
            missing = [number for number in numbers if (shard, number) not in self._pieces]
            piece = _Piece(expected, len(missing))
            self._pieces.update(((shard, number), (piece, uses)) for number, uses in Counter(missing).items())
            self._held_bytes += expected if missing else 0
        if missing:
            reading = self._pool.submit(self._read_piece, piece, shard, missing[0], missing[-1])
            reading.add_done_callback(piece.fail_if_cancelled)

    def _read_piece(self, piece: _Piece, shard: int, first: int, last: int) -> None:
        try:
            listing = self._split.load_index(shard)
            piece.start = int(listing.offsets[first])
            piece.data = _allocate_memory(int(listing.offsets[last] + listing.lengths[last]) - piece.start)
            self._split.read_into(shard, piece.start, piece.data)
            piece.ready.set_result(None)
        except BaseException as error:
            piece.ready.set_exception(error)

    def _release_sample(self, piece: _Piece) -> None:
        with self._lock:
            piece.left -= 1
            if piece.left == 0:
                self._held_bytes -= piece.bytes

    def _advise_span(self, span: Span) -> None:
        # Advice only: what is wrong with the shard is raised when a sample of it is read.
        try:
            listing = self._split.load_index(span.shard)
            first, last = int(np.min(span.numbers)), int(np.max(span.numbers))
            start = int(listing.offsets[first])
            self._split.advise(span.shard, start, int(listing.offsets[last] + listing.lengths[last]) - start)
        except (DataError, OSError):
            return

    def _reread(self, shard: int, number: int, offset: int, view: memoryview) -> None:
        """Read a sample once more, from the source, in case it was damaged on its way, else raise DataError."""
        self._split.read_from_source(shard, offset, view)
        listing = self._split.load_index(shard)
        if index.compute_checksum(view) != int(listing.checksums[number]):
            raise DataError(
                f"data: {self._split.redacted_tar_url(shard)}: sample {listing.keys[number]!r} at byte {offset} does "
                "not have the checksum in the index: the shard was changed or damaged after it was indexed; "
                f"`{format_command('shards verify')}` lists all such samples"
            )

    def _get_buffer(self, length: int) -> memoryview:
        """Return the calling thread's own buffer, `length` bytes of it."""
        buffer = getattr(self._buffers, "data", None)
        if buffer is None or len(buffer) < length:
            buffer = self._buffers.data = bytearray(length + length // 4)
        return memoryview(buffer)[:length]


# A rank's first batch is read sample by sample, so that it does not wait for whole windows.
PRIMED_STEPS = 1
PRIMED_DIVISOR = 20  # such a batch is at most this part of what the windows hold


class Span(NamedTuple):
    """Neighbouring samples of a shard that are needed from one batch on."""

    shard: int
    numbers: Int64Array  # ascending numbers within the shard, some perhaps twice; those between them are not needed
    step: int  # batch in which the first of them is needed
    is_single: bool = False  # to be read sample by sample


def plan_epoch(order: EpochOrder, batch_size: int, steps: range, rank: int, workers: int) -> Iterator[Span]:
    """Yield the windows of the rank's lanes, in the order in which they open; memory for the lanes only."""
    # Requested before any window: a window that opens with them then leaves them out. Unless they are many: what lies
    # between them is read with the windows anyway.
    primed = steps[:PRIMED_STEPS] if batch_size * PRIMED_DIVISOR < order.lanes * order.window else ()
    for step in primed:
        mine = select_rank_positions(step, batch_size, order.lanes, rank, workers)
        yield from _plan_singles(*order.locate(mine), steps.start)
    begin, end = steps.start * batch_size, min(steps.stop * batch_size, order.samples)
    heap = []
    for lane in range(rank, order.lanes, workers):
        at, stop = (_count_lane_steps(position, lane, order.lanes) for position in (begin, end))
        if at < stop:
            heap.append((at * order.lanes + lane, lane, at, stop))
    heapq.heapify(heap)
    while heap:
        position, lane, at, stop = heapq.heappop(heap)
        start, past = order.find_window(lane, at)
        step = position // batch_size
        if at > start:
            # Resumed inside a window: only what is left of it is needed.
            left = np.arange(at, min(past, stop), dtype=np.int64) * order.lanes + lane
            yield from _group_by_shard(*order.locate(left), step)
        else:
            for shard, numbers in order.find_spans(lane, start, past):
                yield Span(shard, numbers, step)
        if past < stop:
            heapq.heappush(heap, (past * order.lanes + lane, lane, past, stop))


def plan_id_range(counts: Sequence[int], first: int, past: int, batch_size: int) -> Iterator[Span]:
    """Yield samples `first` .. `past` - 1 by id, in order, in batches from 0 on."""
    start = 0
    for shard, count in enumerate(counts):
        low, high = max(first, start), min(past, start + count)
        for at in range(low, high, batch_size):
            numbers = np.arange(at - start, min(at + batch_size, high) - start, dtype=np.int64)
            yield Span(shard, numbers, (at - first) // batch_size)
        start += count


def _count_lane_steps(position: int, lane: int, lanes: int) -> int:
    """Return how many samples of a lane lie before a position of the epoch."""
    return max(0, -(-(position - lane) // lanes))


def _plan_singles(shard: Int64Array, number: Int64Array, step: int) -> Iterator[Span]:
    for shard_number, row in zip(shard.tolist(), number.tolist(), strict=True):
        yield Span(shard_number, np.array([row], dtype=np.int64), step, is_single=True)


def _group_by_shard(shard: Int64Array, number: Int64Array, step: int) -> Iterator[Span]:
    for shard_number in np.unique(shard).tolist():
        yield Span(shard_number, np.sort(number[shard == shard_number]), step)
