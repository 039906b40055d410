"""Running sums of an epoch: loss, samples, seconds of steps and of waiting for data."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

PERCENTILES = (50, 90, 99)


class EpochMeter:
    """Sums over the steps since `start`; losses stay on the device until they are read, which is rarely."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Forget all sums: an epoch (or what is left of one) begins."""
        self.start_time = time.perf_counter()
        self.waited_seconds = 0.0
        self.weight = 0.0
        self.steps = 0
        self._told = (0.0, 0.0)
        self._loss = torch.zeros((), device=self._device)
        self._step_seconds = array("f")

    def time_batches(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, with the time spent waiting for each added up, and that between them kept."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                got = time.perf_counter()
                self.waited_seconds += got - asked
            yield batch
            self._step_seconds.append(time.perf_counter() - got)

    def record_step(self, loss: Tensor, weight: float) -> None:
        """One step's summed loss and number of samples."""
        self._loss += loss
        self.weight += weight
        self.steps += 1

    def read_loss_sum(self) -> float:
        """Summed loss; waits for the device."""
        return float(self._loss)

    def compute_mean_since_last(self, loss: float, weight: float) -> float:
        """Return the mean loss since the last call, or the start, from the sums over all ranks at this moment."""
        before, self._told = self._told, (loss, weight)
        return (loss - before[0]) / max(weight - before[1], 1.0)

    def compute_step_percentiles(self) -> dict[int, float]:
        """Seconds of a step without its wait for data: the median, and what one in ten and in a hundred exceed.

        On a GPU steps are only enqueued, and the queue's end is waited for at pulses: there the median says little.
        """
        if not self._step_seconds:
            return {}
        found = np.percentile(np.frombuffer(self._step_seconds, dtype=np.float32), PERCENTILES)
        return dict(zip(PERCENTILES, found.tolist(), strict=True))

    @property
    def elapsed_seconds(self) -> float:
        """Since `start`."""
        return time.perf_counter() - self.start_time
