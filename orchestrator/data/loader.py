"""Batches of a rank in the planned order, decoded off the training thread.

A producer thread keeps a few batches ahead; a small pool decodes their samples (simplejpeg and OpenCV release the
GIL) straight into preallocated N x H x W x 3 buffers, which are used in turn: a batch is valid until the next one but
one is asked for. An exception of the producer is raised to the consumer with the name of the object.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data import keyed
from orchestrator.data.augment import DRAWS, augment
from orchestrator.data.config import AugmentationConfig
from orchestrator.data.crops import cut_one
from orchestrator.data.decode import Image, decode
from orchestrator.data.errors import BadSampleError
from orchestrator.data.order import EpochOrder, Ints, batch_positions
from orchestrator.data.reader import SampleReader

AHEAD = 3  # batches kept ready; the back-pressure of the producer


class Batch(NamedTuple):
    """N samples of one rank. Bad samples have weight 0 and black pixels."""

    images: Tensor  # N x 3 x S x S uint8, channels_last memory
    labels: Tensor  # N int64
    weights: Tensor  # N float32, 0 or 1
    ids: Tensor  # N int64, whole numbers in the manifest's order


@dataclass(frozen=True)
class BadSample:
    """A ledger entry: which sample was given weight 0, and why."""

    key: str
    source: str
    offset: int
    reason: str


@dataclass(frozen=True)
class Work:
    """Samples of one batch of a rank: shard, number in it, id, and the draws for its augmentation (N x DRAWS)."""

    shard: Ints
    number: Ints
    ids: Ints
    draws: NDArray[np.float64] | None


Fill = Callable[[Image, Work, int, Image], None]


class Loader:
    """Loads the batches of one rank; use `training` and `evaluation` for iterators over an epoch or a split."""

    def __init__(self, reader: SampleReader, size: int, threads: int, pin: bool = False) -> None:
        self._reader, self._size, self._threads, self._pin = reader, size, threads, pin
        self.ledger: list[BadSample] = []

    def training(
        self, order: EpochOrder, config: AugmentationConfig, seed: int, batch_size: int, steps: range,
        rank: int = 0, workers: int = 1,
    ) -> Iterator[Batch]:  # fmt: skip
        """The rank's part of each global batch of `steps`; ranks together give every position exactly once."""

        def work() -> Iterator[Work]:
            base = keyed.key(seed, "augment", order.epoch)
            for step in steps:
                shard, number = order.locate(batch_positions(step, batch_size, order.lanes, rank, workers))
                ids = order.ids(shard, number)
                yield Work(shard, number, ids, keyed.uniforms(base, ids, DRAWS))

        def fill(image: Image, work: Work, row: int, out: Image) -> None:
            assert work.draws is not None
            augment(image, config, work.draws[row], out)

        return self._run(work(), fill)

    def evaluation(self, counts: tuple[int, ...], batch_size: int, rank: int = 0, workers: int = 1) -> Iterator[Batch]:
        """Centre crops of every sample whose id is `rank` modulo `workers`, each exactly once, the last batch short."""

        def work() -> Iterator[Work]:
            ends = np.cumsum(counts)
            mine = np.arange(rank, sum(counts), workers, dtype=np.int64)
            for start in range(0, len(mine), batch_size):
                ids = mine[start : start + batch_size]
                shard = np.searchsorted(ends, ids, side="right")
                yield Work(shard, ids - (ends[shard] - np.asarray(counts)[shard]), ids, None)

        return self._run(work(), lambda image, _work, _row, out: cut_one(image, self._size, out))

    def _run(self, work: Iterator[Work], fill: Fill) -> Iterator[Batch]:
        ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=AHEAD)
        stopped = threading.Event()
        buffers = _Buffers(self._size, self._pin)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:

            def produce() -> None:
                try:
                    for item in work:
                        _put(ready, self._batch(item, fill, pool, buffers.take(len(item.ids))), stopped)
                    _put(ready, None, stopped)
                except _Stopped:
                    pass
                except Exception as error:
                    _put(ready, error, stopped, quiet=True)

            producer = threading.Thread(target=produce, name="loader", daemon=True)
            with _running(producer, stopped):
                while (item := ready.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    yield item

    def _batch(self, work: Work, fill: Fill, pool: ThreadPoolExecutor, images: Tensor) -> Batch:
        pixels: Image = images.numpy()
        labels = np.zeros(len(work.ids), dtype=np.int64)
        weights = np.ones(len(work.ids), dtype=np.float32)

        def one(row: int) -> None:
            sample = self._reader.read(int(work.shard[row]), int(work.number[row]))
            labels[row] = sample.label
            try:
                fill(decode(sample.image), work, row, pixels[row])
            except BadSampleError as error:
                weights[row], pixels[row] = 0.0, 0
                self.ledger.append(BadSample(sample.key, sample.source, sample.offset, str(error)))

        def some(start: int) -> None:
            for row in range(start, len(work.ids), self._threads):
                one(row)

        if self._threads == 1:
            some(0)
        else:
            list(pool.map(some, range(self._threads)))
        tensors = (torch.from_numpy(array) for array in (labels, weights, work.ids))
        return Batch(images.permute(0, 3, 1, 2), *tensors)


class _Buffers:
    """Preallocated uint8 batches, used in turn: those in the queue, one being filled, two at the consumer's."""

    def __init__(self, size: int, pin: bool) -> None:
        self._size, self._pin = size, pin
        self._ring: list[Tensor] = []
        self._next = 0

    def take(self, samples: int) -> Tensor:
        """Samples x S x S x 3 uint8, a view of the buffer whose turn it is."""
        slot = self._next % (AHEAD + 3)
        self._next += 1
        if slot == len(self._ring):
            self._ring.append(self._empty(samples))
        elif len(self._ring[slot]) < samples:
            self._ring[slot] = self._empty(samples)
        return self._ring[slot][:samples]

    def _empty(self, samples: int) -> Tensor:
        return torch.empty((samples, self._size, self._size, 3), dtype=torch.uint8, pin_memory=self._pin)


class _Stopped(Exception):
    """The consumer has gone; the producer ends."""


def _put(
    ready: queue.Queue[Batch | Exception | None], item: Batch | Exception | None, stopped: threading.Event,
    quiet: bool = False,
) -> None:  # fmt: skip
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
    if not quiet:
        raise _Stopped


@contextmanager
def _running(thread: threading.Thread, stopped: threading.Event) -> Iterator[None]:
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
