"""Running sums of an epoch: loss, correct samples, seconds of steps and of waiting for data."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from orchestrator.data.dataset import ReadStats
from orchestrator.training.distributed import DistributedContext, RankSums

T = TypeVar("T")

PERCENTILES = (50, 90, 99)


class StepSums(NamedTuple):
    """Sums over a rank's samples of one step, as scalars on the device."""

    loss: Tensor
    correct: Tensor  # samples of weight 1 whose best class is right


class EpochMeter:
    """Sums over the steps since `start_time`; sums of steps stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.start_time = time.perf_counter()
        self.waited_seconds = 0.0
        self.weight = 0.0
        self.steps = 0
        self._last_sums = (0.0, 0.0)
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._step_seconds = array("f")

    def time_batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the same batches; add up the wait for each, and record the time between them."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                received = time.perf_counter()
                self.waited_seconds += received - asked
            yield batch
            self._step_seconds.append(time.perf_counter() - received)

    def record_step(self, sums: StepSums, weight: float) -> None:
        """Add a step's sums and its number of samples."""
        self._loss += sums.loss
        self._correct += sums.correct
        self.weight += weight
        self.steps += 1

    def read_sums(self) -> tuple[float, float]:
        """Return the summed loss and the correct samples; waits for the device."""
        return float(self._loss), float(self._correct)

    def compute_mean_since_last(self, loss: float, weight: float) -> float:
        """Return the mean loss since the last call, or the start, from the sums over all ranks at this moment."""
        before, self._last_sums = self._last_sums, (loss, weight)
        return (loss - before[0]) / max(weight - before[1], 1.0)

    def compute_step_percentiles(self) -> dict[int, float]:
        """Return seconds of a step without its wait for data: the median, the 90th and the 99th percentile.

        On a GPU steps are only enqueued, and syncs wait for the queue's end: there the median says little.
        """
        if not self._step_seconds:
            return {}
        values = np.percentile(np.frombuffer(self._step_seconds, dtype=np.float32), PERCENTILES)
        return dict(zip(PERCENTILES, values.tolist(), strict=True))

    def compute_metrics(self, loss: float, weight: float, correct: float, learning_rate: float) -> dict[str, float]:
        """Return an epoch's training metrics; loss, weight and correct are sums over all ranks."""
        seconds = self.elapsed_seconds
        metrics = {
            "train/loss": loss / max(weight, 1.0),
            "train/top1_accuracy": 100 * correct / max(weight, 1.0),
            "train/rate": learning_rate,
            "train/images_per_second": weight / seconds,
            "train/data_wait_share": self.waited_seconds / seconds,
            "train/data_wait_ms_per_step": 1000 * self.waited_seconds / max(1, self.steps),
        }
        percentiles = self.compute_step_percentiles()
        return metrics | {f"train/step_ms_p{rank}": 1000 * value for rank, value in percentiles.items()}

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since `start_time`."""
        return time.perf_counter() - self.start_time


@dataclass(frozen=True)
class _ReadSums(RankSums):
    """Traffic of one rank, or of all, in an epoch; loaders read a few batches ahead of the steps."""

    bytes: float
    requests: float
    retries: float
    cache_hits: float
    cache_misses: float
    cache_off: float  # ranks whose cache has stepped aside


def compute_read_metrics(world: DistributedContext, before: ReadStats, after: ReadStats) -> dict[str, float]:
    """Return what all ranks read between two moments; every rank must call it."""
    own = _ReadSums(*(float(now - then) for now, then in zip(after, before, strict=True)))
    sums = world.all_reduce_sums(replace(own, cache_off=float(after.cache_off)))
    metrics = {
        "train/read_mib": sums.bytes / 2**20,
        "train/read_requests": sums.requests,
        "train/read_retries": sums.retries,
    }
    if lookups := sums.cache_hits + sums.cache_misses:
        metrics |= {"train/cache_hit_share": sums.cache_hits / lookups, "train/cache_off": sums.cache_off}
    return metrics
