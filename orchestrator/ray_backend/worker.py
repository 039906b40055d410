"""The entry of a Ray Train worker: the training inside Ray's context.

The driver imports this module to name the entry, so torch, two seconds of a start, is imported in the workers alone.
"""

from __future__ import annotations

from typing import Any

import ray.train

from orchestrator.config.output import prepare_output
from orchestrator.ray_backend import ray_compat
from orchestrator.training.config import TrainJob


class RayTrainContext:
    """Context of the training inside Ray Train. Nothing is reported to Ray: all is in the run's own journal."""

    def __init__(self, fast_start: bool) -> None:
        """fast_start: whether the controller is that of `fast_start`."""
        self._fast_start = ray_compat.load_fast_start() if fast_start else None

    def report(self, metrics: dict[str, float]) -> None:
        """Do nothing: Ray Train drops metrics that come without a checkpoint, and our checkpoints are not its own.

        Each report would stop the training for a barrier of all ranks, and until the controller took the one before.
        """

    def has_preemption_notice(self) -> bool:
        """Return whether the workers are about to be shut down. All ranks must call this equally often."""
        if self._fast_start is None:  # a barrier: rank 0's answer counts
            return ray.train.get_preemption_info() is not None
        return bool(self._fast_start.is_shutdown_imminent())

    def should_continue(self) -> bool:
        """Return True: only the stop flag ends a training early."""
        return True


def run_train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train as this worker; return the outcome as a dict.

    payload: the TrainJob as a dict under "job"; under "fast_start", whether the controller is that of `fast_start`.
    """
    import ray.train.torch  # in the workers alone: torch takes two seconds
    import torch  # as above

    from orchestrator.training import distributed, trainer  # they import torch

    prepare_output()
    job = TrainJob.from_dict(payload["job"])
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    context = RayTrainContext(payload["fast_start"])
    return trainer.run_training(job, distributed.get_context(device), context).to_dict()
