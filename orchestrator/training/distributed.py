"""Who this process is among the workers of a run, and the few collectives that training needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class DistributedContext:
    """Rank, number of workers and device; collectives are no-ops for a single worker."""

    rank: int
    workers: int
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which writes journal and checkpoints."""
        return self.rank == 0

    def all_reduce_values(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks (float64); every rank must call it."""
        if self.workers == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def all_reduce_tensor(self, tensor: torch.Tensor) -> None:
        """Sum a tensor on the device over all ranks, in place and without waiting; every rank must call it."""
        if self.workers > 1:
            dist.all_reduce(tensor)

    def all_gather_text(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks; every rank must call it."""
        if self.workers == 1:
            return [text]
        # As bytes of a common length: nothing that came from another process is unpickled.
        data = np.frombuffer(text.encode(errors="backslashreplace"), dtype=np.uint8)
        own = [0.0] * self.workers
        own[self.rank] = float(len(data))
        lengths = [int(length) for length in self.all_reduce_values(own)]
        padded = np.zeros(max(1, *lengths), dtype=np.uint8)
        padded[: len(data)] = data
        mine = torch.from_numpy(padded).to(self.device)
        found = [torch.empty_like(mine) for _ in lengths]
        dist.all_gather(found, mine)
        return [one[:length].cpu().numpy().tobytes().decode() for one, length in zip(found, lengths, strict=True)]

    def broadcast_flag(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank; every rank must call it."""
        if self.workers == 1:
            return flag
        tensor = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(tensor, src=0)
        return bool(tensor.item())


def get_context(device: torch.device) -> DistributedContext:
    """The world of the initialised process group, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return DistributedContext(dist.get_rank(), dist.get_world_size(), device)
    return DistributedContext(0, 1, device)
