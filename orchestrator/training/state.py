"""All that changes while training: weights, momentum, average, progress. No random state exists to be saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.data import audit
from orchestrator.data.audit import AuditRecord
from orchestrator.models import googlenet
from orchestrator.models.googlenet import GoogLeNet
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.polyak import PolyakAverage
from orchestrator.training.progress import Progress


@dataclass
class TrainState:
    """The state of one worker; equal on all workers after every step."""

    model: GoogLeNet
    optimizer: torch.optim.SGD
    average: PolyakAverage
    progress: Progress
    record: AuditRecord = field(default_factory=AuditRecord)  # of what all ranks were given up to the last pulse

    def snapshot(self) -> dict[str, Any]:
        """A copy in host memory that training cannot change any more: tensors and plain values only."""
        return {
            "model": _copied(self.model.state_dict()),
            "optimizer": _copied(self.optimizer.state_dict()),
            "average": _copied(self.average.state_dict()),
            "samples": self.progress.samples,
            "audit": self.record.to_dict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a snapshot. Raises RuntimeError or ValueError when it is of another network or has no audit."""
        self.record = audit.record_of(saved.get("audit"), "checkpoint")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.average.load_state_dict(saved["average"]["updates"], saved["average"]["mean"])
        self.progress = Progress(saved["samples"], self.progress.batch_size, self.progress.steps_per_epoch)

    def final_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Averaged and raw weights without the auxiliary heads, on the CPU."""
        raw = {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith("heads.")}
        averaged = {name: self.average.mean.get(name, tensor) for name, tensor in raw.items()}
        return _copied(averaged), _copied(raw)


def fresh(recipe: Recipe, classes: int, steps_per_epoch: int, device: torch.device) -> TrainState:
    """The state before the first step."""
    model = googlenet.build(recipe.model, classes, recipe.seeds.weights)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type == "cpu":
        _plain_strides(model)
    return TrainState(
        model,
        sgd.build(model, recipe.optimizer),
        PolyakAverage(model),
        Progress(0, recipe.batch_size, steps_per_epoch),
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def wrapped(model: nn.Module, workers: int) -> nn.Module:
    """The model for the forward pass: DDP over the process group, or itself for a single worker."""
    if workers == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)


def _plain_strides(model: nn.Module) -> None:
    """Give 1x1 convolutions' weights the strides of their gradients.

    They are computed as matrix products on CPU, whose gradients have plain strides; in channels_last the same memory
    has other ones, and DDP would copy each gradient into its bucket and warn of it.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.weight.data = module.weight.detach().clone(memory_format=torch.contiguous_format)
