"""What runs on each Ray Train worker: our training entry inside Ray's context."""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
import torch

from orchestrator.config.output import prepare_output
from orchestrator.ray_backend import preemption_notice
from orchestrator.training import distributed, trainer
from orchestrator.training.config import TrainJob


class RayTrainContext:
    """What the training entry is told by Ray Train. It tells Ray Train nothing: all is in the run's own journal."""

    def report(self, metrics: dict[str, float]) -> None:
        """Nothing: Ray Train drops metrics that come without a checkpoint, and our checkpoints are not its.

        Each report would stop the training for a barrier of all ranks, and until the controller took the one before.
        """

    def has_preemption_notice(self) -> bool:
        """Whether the workers are about to be taken down, as this rank knows."""
        return preemption_notice.is_shutdown_imminent()

    def should_continue(self) -> bool:
        """Always: who wants no more sets the stop flag."""
        return True


def run_training(payload: dict[str, Any]) -> dict[str, Any]:
    """Train as this worker; the outcome as a plain dict."""
    prepare_output()
    job = TrainJob.from_dict(payload)
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return trainer.run_training(job, distributed.get_context(device), RayTrainContext()).to_dict()
