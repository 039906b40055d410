"""Running sums of an epoch: loss, samples, seconds of waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Meter:
    """Sums over the steps since `start`; losses stay on the device until they are read, which is rarely."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Forget all sums: an epoch (or what is left of one) begins."""
        self.began = time.perf_counter()
        self.waited_seconds = 0.0
        self.weight = 0.0
        self.steps = 0
        self._loss = torch.zeros((), device=self._device)

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, with the time spent waiting for each added up."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited_seconds += time.perf_counter() - asked
            yield batch

    def add(self, loss: Tensor, weight: float) -> None:
        """One step's summed loss and number of samples."""
        self._loss += loss
        self.weight += weight
        self.steps += 1

    def loss(self) -> float:
        """Summed loss; waits for the device."""
        return float(self._loss)

    @property
    def seconds(self) -> float:
        """Since `start`."""
        return time.perf_counter() - self.began
