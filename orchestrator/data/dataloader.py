"""Batches of a rank in the planned order, decoded off the training thread.

A producer thread plans and reads ahead; a pool of threads decodes (simplejpeg and OpenCV release the GIL) straight into
preallocated N x H x W x 3 buffers, which are used in turn: a batch is valid until the next one but one is asked for. An
exception of any of them is raised to the consumer with the name of the object.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data import prefetch
from orchestrator.data.config import AugmentationConfig, OrderConfig
from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.dataset import ReadStats, SampleReader
from orchestrator.data.prefetch import Prefetcher, Sample, Span
from orchestrator.data.sampler import EpochOrder, Int64Array, select_rank_positions
from orchestrator.data.transforms import pipeline
from orchestrator.data.transforms.decode import Image, decode_image
from orchestrator.data.transforms.multi_crop import cut_center_crop
from orchestrator.data.transforms.pipeline import Draws, FillImage

READY_BATCHES = 3  # batches kept ready; the back-pressure of the producer
DECODING_BATCHES = 2  # batches being decoded, so that no thread waits for a batch's last image
INDEXES_PER_LANE = 4  # a lane's open window and the next one lie in two tars each at most, unless tars are tiny
ROWS_PER_TASK = 8  # images of a decoding task: threads share a batch evenly


@dataclass(frozen=True)
class BadSample:
    """A ledger entry: which sample was given weight 0, and why."""

    id: int  # whole number in the manifest's order
    key: str
    source: str
    offset: int
    reason: str


class Batch(NamedTuple):
    """N samples of one rank. Bad samples have weight 0 and black pixels."""

    images: Tensor  # N x 3 x S x S uint8, channels_last memory
    labels: Tensor  # N int64
    weights: Tensor  # N float32, 0 or 1
    ids: Tensor  # N int64, whole numbers in the manifest's order
    bad: tuple[BadSample, ...] = ()  # those of weight 0, in the order of ids


@dataclass(frozen=True)
class BatchPlan:
    """Samples of one batch of a rank: shard, number in it, id, and the draws for its augmentation (a row each)."""

    shard: Int64Array
    number: Int64Array
    ids: Int64Array
    draws: Draws


@dataclass
class _PendingBatch:
    """A batch that is being decoded."""

    plan: BatchPlan
    images: Tensor
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    bad: list[BadSample] = field(default_factory=list)
    tasks: list[Future[None]] = field(default_factory=list)

    def result(self) -> Batch:
        """The batch, when it is whole. Raises what a task raised."""
        for task in self.tasks:
            task.result()
        labels, weights, ids = (torch.from_numpy(array) for array in (self.labels, self.weights, self.plan.ids))
        bad = tuple(sorted(self.bad, key=lambda one: one.id))
        return Batch(self.images.permute(0, 3, 1, 2), labels, weights, ids, bad)


class BatchLoader:
    """Loads the batches of one rank; use `training` and `evaluation` for iterators over an epoch or a split."""

    def __init__(self, reader: SampleReader, size: int, threads: int, pin: bool = False) -> None:
        self._reader, self._size, self._threads, self._pin = reader, size, threads, pin
        self._spare: list[_BufferRing] = []  # of iterators that have ended: the next one's
        self._decoding_since: dict[int, tuple[float, Sample]] = {}  # by thread: since when (monotonic) it decodes which

    def check_config(self, order: OrderConfig, config: AugmentationConfig, workers: int) -> None:
        """Raise DataError when this process has no memory for its windows, or cannot import a stage."""
        self._reader.check_windows(-(-order.lanes // workers) * order.window)
        pipeline.build_fill(config, 0, 0, self._reader.classes)

    def get_read_stats(self) -> ReadStats:
        """What was read since the loader's reader was made."""
        return self._reader.get_read_stats()

    def describe_decoding(self, seconds: float = 1.0) -> list[str]:
        """Name the samples whose decoding began more than so long ago, the longest first; for any thread."""
        now = time.monotonic()
        slow = sorted(
            (one for one in list(self._decoding_since.values()) if now - one[0] > seconds), key=lambda one: one[0]
        )
        return [
            f"sample {sample.key!r} of {sample.source} at byte {sample.offset}, decoded for {now - began:.0f} s"
            for began, sample in slow
        ]

    def close(self) -> None:
        """Close files and connections; no batches after this."""
        self._reader.close()

    def iter_training(
        self, order: EpochOrder, config: AugmentationConfig, seed: int, batch_size: int, steps: range,
        rank: int = 0, workers: int = 1,
    ) -> Iterator[Batch]:  # fmt: skip
        """The rank's part of each global batch of `steps`; ranks together give every position exactly once."""

        def work() -> Iterator[BatchPlan]:
            for step in steps:
                shard, number = order.locate(select_rank_positions(step, batch_size, order.lanes, rank, workers))
                ids = order.get_sample_ids(shard, number)
                yield BatchPlan(shard, number, ids, pipeline.draw_uniforms(seed, order.epoch, ids))

        plan = prefetch.plan_epoch(order, batch_size, steps, rank, workers)
        self._reader.keep_indexes(INDEXES_PER_LANE * -(-order.lanes // workers))
        fill = pipeline.build_fill(config, seed, order.epoch, self._reader.classes, self._reader.has_verified_images)
        return self._iter_batches(work(), plan, steps.start, fill)

    def iter_evaluation(
        self, counts: tuple[int, ...], batch_size: int, rank: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        """Centre crops of the rank's stretch of the split, each sample on one rank only, the last batch short."""
        first, past = (sum(counts) * each // workers for each in (rank, rank + 1))

        def work() -> Iterator[BatchPlan]:
            ends = np.cumsum(counts)
            for start in range(first, past, batch_size):
                ids = np.arange(start, min(start + batch_size, past), dtype=np.int64)
                shard = np.searchsorted(ends, ids, side="right")
                yield BatchPlan(shard, ids - (ends[shard] - np.asarray(counts)[shard]), ids, np.empty((len(ids), 0)))

        return self._iter_batches(work(), prefetch.plan_id_range(counts, first, past, batch_size), 0, _fill_center_crop)

    def _iter_batches(
        self, work: Iterator[BatchPlan], plan: Iterator[Span], step: int, fill: FillImage
    ) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=READY_BATCHES)
        stopped = threading.Event()

        def produce() -> None:
            try:
                for batch in self._decode_batches(work, plan, step, fill, stopped):
                    _put_until_stopped(ready, batch, stopped)
                _put_until_stopped(ready, None, stopped)
            except _ConsumerGoneError:
                pass
            except BaseException as error:  # whatever it is, the consumer must not wait for ever
                _put_until_stopped(ready, error, stopped, quiet=True)

        producer = threading.Thread(target=produce, name="loader", daemon=True)
        with _run_thread(producer, stopped):
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    def _decode_batches(
        self, work: Iterator[BatchPlan], plan: Iterator[Span], step: int, fill: FillImage, stopped: threading.Event
    ) -> Iterator[Batch]:
        """Batches in their order, a few of them under way at once."""
        buffers = self._spare.pop() if self._spare else _BufferRing(self._size, self._pin)
        pending: deque[_PendingBatch] = deque()
        closing = threading.Event()

        def ended() -> bool:
            return stopped.is_set() or closing.is_set()

        def noted(sample: Sample, id: int, draws: Draws, out: Image) -> int:
            thread = threading.get_ident()
            self._decoding_since[thread] = time.monotonic(), sample
            try:
                return fill(sample, id, draws, out)
            finally:
                del self._decoding_since[thread]

        with self._reader.open_prefetcher(plan) as ahead:
            pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
            try:
                for number, item in enumerate(work, step):
                    ahead.advance(number)
                    pending.append(_submit_batch(item, buffers.acquire(len(item.ids)), ahead, noted, pool, ended))
                    if len(pending) >= DECODING_BATCHES:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                closing.set()  # decoding ends with the image in hand, and waits for no piece that nobody reads any more
                ahead.cancel()
                pool.shutdown(wait=True, cancel_futures=True)
                self._spare.append(buffers)


def _submit_batch(
    work: BatchPlan,
    images: Tensor,
    ahead: Prefetcher,
    fill: FillImage,
    pool: ThreadPoolExecutor,
    ended: Callable[[], bool],
) -> _PendingBatch:
    """Put a batch's images to the decoding threads."""
    samples = len(work.ids)
    pending = _PendingBatch(work, images, np.zeros(samples, dtype=np.int64), np.ones(samples, dtype=np.float32))
    pixels: Image = images.numpy()

    def some(start: int) -> None:
        for row in range(start, min(start + ROWS_PER_TASK, samples)):
            if ended():
                raise _ConsumerGoneError
            sample = ahead.get_sample(int(work.shard[row]), int(work.number[row]))
            try:
                pending.labels[row] = fill(sample, int(work.ids[row]), work.draws[row], pixels[row])
            except BadSampleError as error:
                pending.labels[row], pending.weights[row], pixels[row] = sample.label, 0.0, 0
                told = BadSample(int(work.ids[row]), sample.key, sample.source, sample.offset, str(error))
                pending.bad.append(told)

    pending.tasks.extend(pool.submit(some, start) for start in range(0, samples, ROWS_PER_TASK))
    return pending


def _fill_center_crop(sample: Sample, _id: int, _draws: Draws, out: Image) -> int:
    cut_center_crop(decode_image(sample.image), out.shape[0], out)
    return sample.label


class _BufferRing:
    """Preallocated uint8 batches, used in turn: those in the queue, those being filled, two at the consumer's."""

    def __init__(self, size: int, pin: bool) -> None:
        self._size, self._pin = size, pin
        self._ring: list[Tensor] = []
        self._next = 0

    def acquire(self, samples: int) -> Tensor:
        """Samples x S x S x 3 uint8, a view of the buffer whose turn it is."""
        slot = self._next % (READY_BATCHES + DECODING_BATCHES + 3)
        self._next += 1
        if slot == len(self._ring):
            self._ring.append(self._allocate(samples))
        elif len(self._ring[slot]) < samples:
            self._ring[slot] = self._allocate(samples)
        return self._ring[slot][:samples]

    def _allocate(self, samples: int) -> Tensor:
        return torch.empty((samples, self._size, self._size, 3), dtype=torch.uint8, pin_memory=self._pin)


class _ConsumerGoneError(Exception):
    """The consumer has gone; the producer ends."""


def _put_until_stopped(
    ready: queue.Queue[Batch | BaseException | None], item: Batch | BaseException | None, stopped: threading.Event,
    quiet: bool = False,
) -> None:  # fmt: skip
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
    if not quiet:
        raise _ConsumerGoneError


@contextmanager
def _run_thread(thread: threading.Thread, stopped: threading.Event) -> Iterator[None]:
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
