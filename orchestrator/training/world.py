"""Who this process is among the workers of a run, and the few collectives that training needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank, number of workers and device; collectives are no-ops for a single worker."""

    rank: int
    workers: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes journal and checkpoints."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks (float64); every rank must call it."""
        if self.workers == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sum a tensor on the device over all ranks, in place and without waiting; every rank must call it."""
        if self.workers > 1:
            dist.all_reduce(tensor)

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks; every rank must call it."""
        if self.workers == 1:
            return [text]
        # As bytes of a common length: nothing that came from another process is unpickled.
        data = np.frombuffer(text.encode(errors="backslashreplace"), dtype=np.uint8)
        own = [0.0] * self.workers
        own[self.rank] = float(len(data))
        lengths = [int(length) for length in self.sum(own)]
        padded = np.zeros(max(1, *lengths), dtype=np.uint8)
        padded[: len(data)] = data
        mine = torch.from_numpy(padded).to(self.device)
        found = [torch.empty_like(mine) for _ in lengths]
        dist.all_gather(found, mine)
        return [one[:length].cpu().numpy().tobytes().decode() for one, length in zip(found, lengths, strict=True)]

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank; every rank must call it."""
        if self.workers == 1:
            return flag
        tensor = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(tensor, src=0)
        return bool(tensor.item())


def current(device: torch.device) -> World:
    """The world of the initialised process group, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)
