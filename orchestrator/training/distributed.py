"""The rank of this process, and the few collectives that training needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.config.errors import ConfigError
from orchestrator.data.data_errors import DataError

T = TypeVar("T")
_SHARED_ERRORS = (DataError, CheckpointError, ConfigError)


def pack_numbers(message: Any) -> list[float]:
    """Return all numbers of a message in order: a number, or a (named) tuple or mapping of messages."""
    if not isinstance(message, Mapping | tuple):
        return [float(message)]
    parts = message.values() if isinstance(message, Mapping) else message
    return [value for part in parts for value in pack_numbers(part)]


def unpack_numbers(message: Any, values: Iterator[float]) -> Any:
    """Return a message of the same shape with the next of these numbers."""
    if isinstance(message, Mapping):
        return {name: unpack_numbers(part, values) for name, part in message.items()}
    if not isinstance(message, tuple):
        return next(values)
    parts = [unpack_numbers(part, values) for part in message]
    return type(message)(*parts) if hasattr(message, "_fields") else tuple(parts)


@dataclass(frozen=True)
class DistributedContext:
    """Rank, number of workers and device; with a single worker the collectives return what they are given.

    Every rank must call each collective, in the same order.
    """

    rank: int
    workers: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """True on rank 0, which writes the journal and checkpoints."""
        return self.rank == 0

    def all_reduce_sums(self, message: T) -> T:
        """Return the sums of a message of numbers over all ranks, in float64; on all ranks it has the same shape."""
        values = pack_numbers(message)
        if self.workers > 1:
            tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
            dist.all_reduce(tensor)
            values = tensor.tolist()
        sums: T = unpack_numbers(message, iter(values))
        return sums

    def is_any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        return self.all_reduce_sums(float(flag)) > 0

    def all_reduce_tensor(self, tensor: torch.Tensor) -> None:
        """Sum a tensor on the device over all ranks, in place, without waiting for the result."""
        if self.workers > 1:
            dist.all_reduce(tensor)

    def all_gather_text(self, text: str) -> list[str]:
        """Return the text of every rank, in the order of ranks."""
        if self.workers == 1:
            return [text]
        # As bytes of a common length: nothing that came from another process is unpickled.
        data = np.frombuffer(text.encode(errors="backslashreplace"), dtype=np.uint8)
        own_length = tuple(len(data) if rank == self.rank else 0 for rank in range(self.workers))
        lengths = [int(length) for length in self.all_reduce_sums(own_length)]
        rows = np.zeros((self.workers, max(1, *lengths)), dtype=np.uint8)
        rows[self.rank, : len(data)] = data
        tensor = torch.from_numpy(rows).to(self.device)
        dist.all_reduce(tensor)
        return [row[:length].tobytes().decode() for row, length in zip(tensor.cpu().numpy(), lengths, strict=True)]

    def gather_first_error(self, message: str | None) -> str:
        """Return the error message of the first rank that has one, on every rank; at least one must have one."""
        messages = self.all_gather_text(message or "")
        rank, first = next((rank, text) for rank, text in enumerate(messages) if text)
        return first if self.workers == 1 else f"{first} (reported by rank {rank} of {self.workers})"

    def check_on_all_ranks(self, check: Callable[[], T]) -> T:
        """Return the check's result when it passes on every rank; else raise on every rank, so that none waits.

        Raises the check's DataError, CheckpointError or ConfigError, or one of the kind that another rank has.
        """
        error: Exception | None = None
        try:
            result = check()
        except _SHARED_ERRORS as raised:
            error = raised
        counts = self.all_reduce_sums(tuple(isinstance(error, kind) for kind in _SHARED_ERRORS))
        for kind, count in zip(_SHARED_ERRORS, counts, strict=True):
            if count:
                message = self.gather_first_error(None if error is None else str(error))
                raise error or kind(message)
        return result


def get_context(device: torch.device) -> DistributedContext:
    """Return the context of the initialised process group, or of a single process."""
    if dist.is_available() and dist.is_initialized():
        return DistributedContext(dist.get_rank(), dist.get_world_size(), device)
    return DistributedContext(0, 1, device)
