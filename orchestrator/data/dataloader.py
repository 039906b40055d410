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
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestrator.data import sampler
from orchestrator.data.config import AugmentationConfig, OrderConfig
from orchestrator.data.data_errors import BadSampleError
from orchestrator.data.dataset import Prefetcher, Sample, SampleReader
from orchestrator.data.index import locate_rows
from orchestrator.data.sample_audit import BadEntry, describe_bad_sample
from orchestrator.data.sampler import EpochOrder, Int64Array, Span
from orchestrator.data.transforms import pipeline
from orchestrator.data.transforms.decode import Image, decode_image
from orchestrator.data.transforms.multi_crop import ONE_CROP, cut_crops
from orchestrator.data.transforms.photometric import Draws
from orchestrator.data.transforms.pipeline import FillImage, Targets

READY_BATCHES = 3  # batches kept ready; the back-pressure of the producer
DECODING_BATCHES = 2  # batches being decoded, so that no thread waits for a batch's last image
BUFFERS = READY_BATCHES + DECODING_BATCHES + 3  # those in the queue, those being filled, two that the consumer has
INDEXES_PER_LANE = 4  # a lane's open window and the next one lie in two tars each at most, unless tars are tiny
ROWS_PER_TASK = 8  # images of a decoding task: threads share a batch evenly


class Batch(NamedTuple):
    """N samples of one rank. Bad samples have weight 0 and black pixels."""

    images: Tensor  # N x 3 x S x S uint8, channels_last memory
    labels: Tensor  # N int64; N x classes float32, rows that sum to 1, when batch transforms mix (soft labels)
    weights: Tensor  # N float32, 0 or 1
    ids: Tensor  # N int64, whole numbers in the manifest's order
    bad: tuple[BadEntry, ...] = ()  # those of weight 0, in the order of ids


@dataclass(frozen=True)
class BatchPlan:
    """Samples of one batch of a rank: shard, number in it, id, and the draws for its augmentation (a row each)."""

    shard: Int64Array
    number: Int64Array
    ids: Int64Array
    draw_ids: Int64Array  # ids, other numbers where a sample is repeated in an epoch
    draws: Draws
    mix: Callable[..., Targets] | None = None  # batch transforms


class BatchLoader:
    """Loads the batches of one rank: `iter_training` those of an epoch, `iter_evaluation` those of a split."""

    def __init__(self, reader: SampleReader, size: int, threads: int, pin: bool = False) -> None:
        self.reader, self._size, self._threads, self._pin = reader, size, threads, pin
        self._spare: list[deque[Tensor]] = []  # buffers of iterators that have ended: the next one's
        self._decoding_since: dict[int, tuple[float, Sample]] = {}  # by thread: since when (monotonic) it decodes which

    def check_config(self, order: OrderConfig, config: AugmentationConfig, workers: int) -> None:
        """Raise DataError when this process has no memory for its windows, or cannot import a stage."""
        self.reader.check_windows(-(-order.lanes // workers) * order.window)
        pipeline.build_fill(config, 0, 0, self.reader.classes)

    def describe_decoding(self, seconds: float = 1.0) -> list[str]:
        """Name the samples whose decoding began more than so long ago, the longest first; for any thread."""
        now = time.monotonic()
        started = sorted([*self._decoding_since.values()], key=lambda entry: entry[0])
        return [
            f"sample {sample.key!r} of {sample.source} at byte {sample.offset}, decoded for {now - began:.0f} s"
            for began, sample in started
            if now - began > seconds
        ]

    def close(self) -> None:
        """Close files and connections; no batches after this."""
        self.reader.close()

    def iter_training(
        self, order: EpochOrder, config: AugmentationConfig, seed: int, batch_size: int, steps: range,
        rank: int = 0, workers: int = 1,
    ) -> Iterator[Batch]:  # fmt: skip
        """Yield the rank's part of each global batch of `steps`; ranks together give every position exactly once."""
        mixer = pipeline.build_batch_mixer(config, seed, order.epoch, self.reader.classes)

        def plan_batches() -> Iterator[BatchPlan]:
            for step in steps:
                positions = sampler.select_rank_positions(step, batch_size, order.lanes, rank, workers)
                shard, number = order.locate(positions)
                ids = order.get_sample_ids(shard, number)
                draw_ids = order.get_draw_ids(positions, ids)
                draws = pipeline.draw_uniforms(seed, order.epoch, draw_ids)
                mix = None if mixer is None else partial(mixer, lanes=positions % order.lanes, step=step)
                yield BatchPlan(shard, number, ids, draw_ids, draws, mix)

        spans = sampler.plan_epoch(order, batch_size, steps, rank, workers)
        self.reader.keep_indexes(INDEXES_PER_LANE * -(-order.lanes // workers))
        fill = pipeline.build_fill(config, seed, order.epoch, self.reader.classes, self.reader.has_verified_images)
        return self._iter_batches(plan_batches(), spans, steps.start, fill)

    def iter_evaluation(
        self, counts: tuple[int, ...], batch_size: int, rank: int = 0, workers: int = 1
    ) -> Iterator[Batch]:
        """Yield centre crops of the rank's stretch of the split, each sample on one rank only, the last batch short."""
        first, past = (sum(counts) * each // workers for each in (rank, rank + 1))

        def plan_batches() -> Iterator[BatchPlan]:
            for start in range(first, past, batch_size):
                ids = np.arange(start, min(start + batch_size, past), dtype=np.int64)
                yield BatchPlan(*locate_rows(counts, ids), ids, ids, np.empty((len(ids), 0)))

        spans = sampler.plan_id_range(counts, first, past, batch_size)
        return self._iter_batches(plan_batches(), spans, 0, _fill_center_crop)

    def _iter_batches(
        self, plans: Iterator[BatchPlan], spans: Iterator[Span], step: int, fill: FillImage
    ) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=READY_BATCHES)
        stopped = threading.Event()

        def produce() -> None:
            try:
                for batch in self._decode_batches(plans, spans, step, fill, stopped):
                    ready.put(batch)
                    if stopped.is_set():
                        return
                ready.put(None)
            except BaseException as error:  # of any kind: the consumer must not wait for ever
                ready.put(error)

        producer = threading.Thread(target=produce, name="loader", daemon=True)
        producer.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            while not ready.empty():  # the producer may wait for room
                ready.get()
            producer.join()

    def _decode_batches(
        self, plans: Iterator[BatchPlan], spans: Iterator[Span], step: int, fill: FillImage, stopped: threading.Event
    ) -> Iterator[Batch]:
        """Yield batches in their order, a few of them in flight at the same time."""
        none = torch.empty((0, self._size, self._size, 3), dtype=torch.uint8)
        buffers = self._spare.pop() if self._spare else deque([none] * BUFFERS)
        pending: deque[Callable[[], Batch]] = deque()
        with self.reader.open_prefetcher(spans) as ahead:
            pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
            try:
                for number, plan in enumerate(plans, step):
                    ahead.advance(number)
                    buffers.rotate(-1)
                    if len(buffers[0]) < len(plan.ids):
                        shape = (len(plan.ids), self._size, self._size, 3)
                        buffers[0] = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
                    images = buffers[0][: len(plan.ids)]
                    pending.append(self._submit_batch(plan, images, ahead, fill, pool, stopped))
                    if len(pending) >= DECODING_BATCHES:
                        yield pending.popleft()()
                while pending:
                    yield pending.popleft()()
            finally:
                ahead.cancel()  # threads wait for no piece that will not be read
                pool.shutdown(wait=True, cancel_futures=True)
                self._spare.append(buffers)

    def _submit_batch(
        self, plan: BatchPlan, images: Tensor, ahead: Prefetcher, fill: FillImage, pool: ThreadPoolExecutor,
        stopped: threading.Event,
    ) -> Callable[[], Batch]:  # fmt: skip
        """Submit a batch's images to the decoding threads; return what waits for them and raises what they raised."""
        samples = len(plan.ids)
        labels, weights = np.zeros(samples, dtype=np.int64), np.ones(samples, dtype=np.float32)
        pixels: Image = images.numpy()
        bad: list[BadEntry] = []

        def decode_rows(start: int) -> None:
            thread = threading.get_ident()
            for row in range(start, min(start + ROWS_PER_TASK, samples)):
                if stopped.is_set():
                    raise CancelledError
                sample = ahead.get_sample(int(plan.shard[row]), int(plan.number[row]))
                self._decoding_since[thread] = time.monotonic(), sample
                try:
                    labels[row] = fill(sample, int(plan.draw_ids[row]), plan.draws[row], pixels[row])
                except BadSampleError as error:
                    labels[row], weights[row], pixels[row] = sample.label, 0.0, 0
                    bad.append(describe_bad_sample(int(plan.ids[row]), sample, str(error)))
                finally:
                    del self._decoding_since[thread]

        tasks = [pool.submit(decode_rows, start) for start in range(0, samples, ROWS_PER_TASK)]

        def finish() -> Batch:
            for task in tasks:
                task.result()
            targets = labels if plan.mix is None else plan.mix(pixels, labels, weights > 0)
            tensors = [torch.from_numpy(array) for array in (targets, weights, plan.ids)]
            entries = tuple(sorted(bad, key=lambda entry: entry.id))
            return Batch(images.permute(0, 3, 1, 2), tensors[0], tensors[1], tensors[2], entries)

        return finish


def _fill_center_crop(sample: Sample, _id: int, _draws: Draws, out: Image) -> int:
    cut_crops(decode_image(sample.image), out.shape[0], ONE_CROP, out[None])
    return sample.label
