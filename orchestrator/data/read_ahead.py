"""Reads what is needed next while the loader decodes, and hands samples out as bytes.

Remote windows are fetched in large pieces by several threads into memory, held until their last sample is taken; what
is held is bounded by the open windows and a budget. Local windows are only announced to the operating system, whose
page cache is the read-ahead, and samples are read straight into the decoding thread's buffer.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from orchestrator.data import index
from orchestrator.data.errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.read_plan import Span
from orchestrator.data.split_files import SplitFiles

PIECE_BYTES = 8 * 2**20  # of a remote read: large enough that a round trip costs little
MAPPED_BYTES = 2**20  # from this size on a piece has pages of its own
LOCAL_STEPS = 32  # batches ahead for which local windows are announced
LOCAL_THREADS = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """One encoded image: where it came from, what it is. The image's memory is valid until the thread's next read."""

    listing: ShardIndex
    number: int  # in the listing
    source: str  # shard URL, for error messages
    image: memoryview  # writable

    @property
    def key(self) -> str:
        """The sample's key in its tar."""
        return self.listing.keys[self.number]

    @property
    def offset(self) -> int:
        """Byte of the tar where the image begins."""
        return int(self.listing.offsets[self.number])

    @property
    def label(self) -> int:
        """Its class."""
        return int(self.listing.labels[self.number])


class _Piece:
    """Neighbouring samples of a shard, held in memory while some of them are still to be taken."""

    __slots__ = ("bytes", "data", "left", "ready", "start")

    def __init__(self, expected: int, samples: int) -> None:
        self.bytes, self.left = expected, samples
        self.start, self.data = 0, memoryview(b"")
        self.ready: Future[None] = Future()

    def cancelled_with(self, reading: Future[None]) -> None:
        """Wake who waits for a piece whose reading was not begun."""
        if reading.cancelled():
            self.ready.set_exception(CancelledError())


def _memory(length: int) -> memoryview:
    """Writable memory that goes back to the operating system when its last view does: a heap would keep the holes."""
    if length < MAPPED_BYTES:
        return memoryview(bytearray(length))
    mapped = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # kernels without large pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)


class ReadAhead:
    """Samples of one split, read ahead along a plan. `advance` is for one thread, `take` for any."""

    def __init__(self, split: SplitFiles, plan: Iterator[Span], budget_bytes: int, streams: int) -> None:
        self._split, self._plan, self._budget = split, plan, budget_bytes
        self._next = next(plan, None)
        self._where: dict[tuple[int, int], _Piece] = {}
        self._held = 0
        self._early = 0  # bytes of windows that are not open yet
        self._opening: list[tuple[int, int]] = []  # (batch in which they open, bytes)
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._pool = ThreadPoolExecutor(LOCAL_THREADS if split.local else streams, thread_name_prefix="read")

    @property
    def held_bytes(self) -> int:
        """Bytes of remote samples in memory or on their way."""
        return self._held

    def advance(self, step: int) -> None:
        """Batch `step` is next: start to read what it needs, and what is needed later as far as the budget goes."""
        self._early = sum(size for opens, size in self._opening if opens > step)
        self._opening = [(opens, size) for opens, size in self._opening if opens > step]
        while self._next is not None and (self._next.step <= step or self._affordable(self._next, step)):
            span = self._next
            if self._split.local:
                self._pool.submit(self._announce, span)
            else:
                self._fetch(span)
            self._next = next(self._plan, None)

    def take(self, shard: int, number: int) -> Sample:
        """A sample, its checksum verified.

        Raises DataError when the data is missing, truncated or not what was indexed, StorageError when storage fails.
        """
        with self._lock:
            piece = self._where.pop((shard, number), None)
        listing = self._split.index(shard)
        offset, length = listing.offsets.item(number), listing.lengths.item(number)
        if piece is None:
            view = self._buffer(length)
            self._split.read_into(shard, offset, view)
        else:
            piece.ready.result()
            view = piece.data[offset - piece.start : offset - piece.start + length]
            self._taken(piece)
        if index.checksum(view) != listing.checksums.item(number):
            self._reread(shard, number, offset, view)
        return Sample(listing, number, self._split.tar(shard), view)

    def cancel(self) -> None:
        """Begin no more reads; whoever waits for one that was not begun gets CancelledError."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop reading; waits for what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _affordable(self, span: Span, step: int) -> bool:
        if self._split.local:
            return span.step <= step + LOCAL_STEPS
        return self._early + self._bytes(span) <= self._budget

    def _bytes(self, span: Span) -> int:
        """About as many as the span holds: the index need not be there to tell."""
        facts = self._split.shards[span.shard]
        return int(facts.bytes / max(1, facts.samples) * len(span.numbers))

    def _fetch(self, span: Span) -> None:
        expected = self._bytes(span)
        pieces = 1 if span.single else max(1, -(-expected // PIECE_BYTES))
        cuts = [len(span.numbers) * each // pieces for each in range(pieces + 1)]
        for low, high in pairwise(cuts):
            self._fetch_piece(span.shard, span.numbers[low:high].tolist(), expected // pieces)
        self._opening.append((span.step, expected))
        self._early += expected

    def _fetch_piece(self, shard: int, numbers: list[int], expected: int) -> None:
        with self._lock:
            wanted = [number for number in numbers if (shard, number) not in self._where]
            piece = _Piece(expected, len(wanted))
            self._where.update(((shard, number), piece) for number in wanted)
            self._held += expected if wanted else 0
        if wanted:
            reading = self._pool.submit(self._read, piece, shard, wanted[0], wanted[-1])
            reading.add_done_callback(piece.cancelled_with)

    def _read(self, piece: _Piece, shard: int, first: int, last: int) -> None:
        try:
            listing = self._split.index(shard)
            piece.start = int(listing.offsets[first])
            piece.data = _memory(int(listing.offsets[last] + listing.lengths[last]) - piece.start)
            self._split.read_into(shard, piece.start, piece.data)
            piece.ready.set_result(None)
        except BaseException as error:
            piece.ready.set_exception(error)

    def _taken(self, piece: _Piece) -> None:
        with self._lock:
            piece.left -= 1
            if piece.left == 0:
                self._held -= piece.bytes

    def _announce(self, span: Span) -> None:
        # Advice only: what is wrong with the shard is told when a sample of it is taken.
        try:
            listing = self._split.index(span.shard)
            first, last = int(np.min(span.numbers)), int(np.max(span.numbers))
            start = int(listing.offsets[first])
            self._split.advise(span.shard, start, int(listing.offsets[last] + listing.lengths[last]) - start)
        except (DataError, OSError):
            return

    def _reread(self, shard: int, number: int, offset: int, view: memoryview) -> None:
        """Once more from the source, in case it was damaged on its way."""
        self._split.reread(shard, offset, view)
        listing = self._split.index(shard)
        if index.checksum(view) != int(listing.checksums[number]):
            raise DataError(
                f"data: {self._split.tar(shard)}: sample {listing.keys[number]!r} at byte {offset} does not have the "
                "checksum in the index: the shard was changed or damaged after it was indexed; `jobs/shards.py verify` "
                "tells what else is"
            )

    def _buffer(self, length: int) -> memoryview:
        """The calling thread's own buffer, as long as asked for."""
        held = getattr(self._buffers, "data", None)
        if held is None or len(held) < length:
            held = self._buffers.data = bytearray(length + length // 4)
        return memoryview(held)[:length]
