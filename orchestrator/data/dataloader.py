"""Batches of a rank in the planned order, decoded off the training thread.

A producer thread plans and reads ahead; a pool of threads decodes (simplejpeg and OpenCV release the GIL) straight into
preallocated N x H x W x 3 buffers, which are used in turn: a batch is valid until the next one but one is asked for. An
exception of any of them is raised to the consumer with the name of the object. Batch transforms run in the producer.
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
from orchestrator.data.index import locate_rows
from orchestrator.data.prefetch import Prefetcher, Sample, Span
from orchestrator.data.sampler import EpochOrder, Int64Array, select_rank_positions
from orchestrator.data.transforms import pipeline
from orchestrator.data.transforms.batch_mixing import BatchMixer
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
    labels: Tensor  # N int64; N x classes float32, rows that sum to 1, when batch transforms mix (soft labels)
    weights: Tensor  # N float32, 0 or 1
    ids: Tensor  # N int64, whole numbers in the manifest's order
    bad: tuple[BadSample, ...] = ()  # those of weight 0, in the order of ids


@dataclass(frozen=True)
class BatchPlan:
    """Samples of one batch of a rank: shard, number in it, id, and the draws for its augmentation (a row each)."""

    shard: Int64Array
    number: Int64Array
    ids: Int64Array
    draw_ids: Int64Array  # ids, other numbers where a sample is repeated in an epoch
    draws: Draws
    step: int = 0
    lanes: Int64Array | None = None  # of each sample, in training


@dataclass
class _PendingBatch:
    """A batch that is being decoded."""

    plan: BatchPlan
    mixer: BatchMixer | None
    images: Tensor
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    bad: list[BadSample] = field(default_factory=list)
    tasks: list[Future[None]] = field(default_factory=list)

    def result(self) -> Batch:
        """Return the batch when it is whole. Raises what a task raised."""
        for task in self.tasks:
            task.result()
        labels, weights, ids = (torch.from_numpy(array) for array in (self.labels, self.weights, self.plan.ids))
        if self.mixer is not None and self.plan.lanes is not None:
            is_good, lanes = self.weights > 0, self.plan.lanes
            labels = torch.from_numpy(self.mixer.mix(self.images.numpy(), self.labels, is_good, lanes, self.plan.step))
        bad = tuple(sorted(self.bad, key=lambda sample: sample.id))
        return Batch(self.images.permute(0, 3, 1, 2), labels, weights, ids, bad)


class BatchLoader:
    """Loads the batches of one rank: `iter_training` those of an epoch, `iter_evaluation` those of a split."""

    def __init__(self, reader: SampleReader, size: int, threads: int, pin: bool = False) -> None:
        self._reader, self._size, self._threads, self._pin = reader, size, threads, pin
        self._spare: list[_BufferRing] = []  # of iterators that have ended: the next one's
        self._decoding_since: dict[int, tuple[float, Sample]] = {}  # by thread: since when (monotonic) it decodes which

    def check_config(self, order: OrderConfig, config: AugmentationConfig, workers: int) -> None:
        """Raise DataError when this process has no memory for its windows, or cannot import a stage."""
        self._reader.check_windows(-(-order.lanes // workers) * order.window)
        pipeline.build_fill(config, 0, 0, self._reader.classes)

    def get_read_stats(self) -> ReadStats:
        """Return what was read since the loader's reader was made."""
        return self._reader.get_read_stats()

    def describe_decoding(self, seconds: float = 1.0) -> list[str]:
        """Name the samples whose decoding began more than so long ago, the longest first; for any thread."""
        now = time.monotonic()
        started = list(self._decoding_since.values())
        slow = sorted((entry for entry in started if now - entry[0] > seconds), key=lambda entry: entry[0])
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
        """Yield the rank's part of each global batch of `steps`; ranks together give every position exactly once."""
        mixer = pipeline.build_batch_mixer(config, seed, order.epoch, self._reader.classes)

        def work() -> Iterator[BatchPlan]:
            for step in steps:
                positions = select_rank_positions(step, batch_size, order.lanes, rank, workers)
                shard, number = order.locate(positions)
                ids = order.get_sample_ids(shard, number)
                draw_ids = order.get_draw_ids(positions, ids)
                draws = pipeline.draw_uniforms(seed, order.epoch, draw_ids)
                yield BatchPlan(shard, number, ids, draw_ids, draws, step, positions % order.lanes)

        plan = prefetch.plan_epoch(order, batch_size, steps, rank, workers)
        self._reader.keep_indexes(INDEXES_PER_LANE * -(-order.lanes // workers))
        fill = pipeline.build_fill(config, seed, order.epoch, self._reader.classes, self._reader.has_verified_images)
        return self._iter_batches(work(), plan, steps.start, fill, mixer)

    def iter_evaluation(
        self, counts: tuple[int, ...], batch_size: int, rank: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        """Yield centre crops of the rank's stretch of the split, each sample on one rank only, the last batch short."""
        first, past = (sum(counts) * each // workers for each in (rank, rank + 1))

        def work() -> Iterator[BatchPlan]:
            for start in range(first, past, batch_size):
                ids = np.arange(start, min(start + batch_size, past), dtype=np.int64)
                yield BatchPlan(*locate_rows(counts, ids), ids, ids, np.empty((len(ids), 0)))

        return self._iter_batches(work(), prefetch.plan_id_range(counts, first, past, batch_size), 0, _fill_center_crop)

    def _iter_batches(
        self,
        work: Iterator[BatchPlan],
        plan: Iterator[Span],
        step: int,
        fill: FillImage,
        mixer: BatchMixer | None = None,
    ) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=READY_BATCHES)
        stopped = threading.Event()

        def produce() -> None:
            try:
                for batch in self._decode_batches(work, plan, step, fill, mixer, stopped):
                    _put_until_stopped(ready, batch, stopped)
                _put_until_stopped(ready, None, stopped)
            except _ConsumerGoneError:
                pass
            except BaseException as error:  # of any kind: the consumer must not wait for ever
                _put_until_stopped(ready, error, stopped, quiet=True)

        producer = threading.Thread(target=produce, name="loader", daemon=True)
        with _run_thread(producer, stopped):
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    def _decode_batches(
        self,
        work: Iterator[BatchPlan],
        plan: Iterator[Span],
        step: int,
        fill: FillImage,
        mixer: BatchMixer | None,
        stopped: threading.Event,
    ) -> Iterator[Batch]:
        """Yield batches in their order, a few of them in flight at the same time."""
        buffers = self._spare.pop() if self._spare else _BufferRing(self._size, self._pin)
        pending: deque[_PendingBatch] = deque()
        closing = threading.Event()

        def ended() -> bool:
            return stopped.is_set() or closing.is_set()

        def fill_and_note(sample: Sample, id: int, draws: Draws, out: Image) -> int:
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
                    images = buffers.acquire(len(item.ids))
                    batch = _PendingBatch(item, mixer, images, *_allocate_rows(len(item.ids)))
                    _submit_batch(batch, ahead, fill_and_note, pool, ended)
                    pending.append(batch)
                    if len(pending) >= DECODING_BATCHES:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                closing.set()  # threads end with the image in hand and wait for no piece that will not be read
                ahead.cancel()
                pool.shutdown(wait=True, cancel_futures=True)
                self._spare.append(buffers)


def _allocate_rows(samples: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return labels 0 and weights 1."""
    return np.zeros(samples, dtype=np.int64), np.ones(samples, dtype=np.float32)


def _submit_batch(
    batch: _PendingBatch, ahead: Prefetcher, fill: FillImage, pool: ThreadPoolExecutor, ended: Callable[[], bool]
) -> None:
    """Submit a batch's images to the decoding threads."""
    plan, samples = batch.plan, len(batch.plan.ids)
    pixels: Image = batch.images.numpy()

    def decode_rows(start: int) -> None:
        for row in range(start, min(start + ROWS_PER_TASK, samples)):
            if ended():
                raise _ConsumerGoneError
            sample = ahead.get_sample(int(plan.shard[row]), int(plan.number[row]))
            try:
                batch.labels[row] = fill(sample, int(plan.draw_ids[row]), plan.draws[row], pixels[row])
            except BadSampleError as error:
                batch.labels[row], batch.weights[row], pixels[row] = sample.label, 0.0, 0
                batch.bad.append(BadSample(int(plan.ids[row]), sample.key, sample.source, sample.offset, str(error)))

    batch.tasks.extend(pool.submit(decode_rows, start) for start in range(0, samples, ROWS_PER_TASK))


def _fill_center_crop(sample: Sample, _id: int, _draws: Draws, out: Image) -> int:
    cut_center_crop(decode_image(sample.image), out.shape[0], out)
    return sample.label


class _BufferRing:
    """Preallocated uint8 batches, used in turn: those in the queue, those being filled, two that the consumer has."""

    def __init__(self, size: int, pin: bool) -> None:
        self._size, self._pin = size, pin
        self._ring: list[Tensor] = []
        self._next = 0

    def acquire(self, samples: int) -> Tensor:
        """Return samples x S x S x 3 uint8, a view of the next buffer."""
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
    """The consumer has stopped; the producer ends."""


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
