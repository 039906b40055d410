"""All that changes while training: weights, momentum, average, progress. There is no random state to save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.checkpoint.checkpoint import CheckpointError, find_tensor_mismatch
from orchestrator.data import sample_audit
from orchestrator.data.data_errors import DataError
from orchestrator.data.sample_audit import AuditRecord
from orchestrator.models.network import Network
from orchestrator.models.registry import create_model
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.optimizer import WeightAverager, get_averaged_tensors


@dataclass
class TrainState:
    """The state of one worker; equal on all workers after every step."""

    model: Network
    optimizer: torch.optim.Optimizer
    average: WeightAverager
    progress: Progress
    scaler: torch.amp.GradScaler  # keeps float16's gradients in range; does nothing for other precisions
    audit_record: AuditRecord = field(default_factory=AuditRecord)  # of the samples of all ranks up to the last sync
    # Host memory for snapshots, by group, reused from one to the next: fresh pages cost more than the copy itself.
    _host: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def snapshot(self) -> dict[str, Any]:
        """Return a copy in host memory that training does not change: tensors by name and plain values.

        The next snapshot overwrites its tensors, so this one must be in storage by then.
        """
        model = self._copy_to_host("model", self.model.state_dict())
        momentum = self._copy_to_host("momentum", sgd.get_optimizer_tensors(self.model, self.optimizer))
        mean = self._copy_to_host("mean", self.average.mean)
        if torch.cuda.is_available():
            # Copies to pinned memory return before they end; the writer's thread would read half of them.
            torch.cuda.current_stream().synchronize()
        values = sgd.copy_optimizer_values(self.model, self.optimizer)
        return {
            "model": model,
            "momentum": momentum,
            "average": {"updates": self.average.updates, "mean": mean},
            "scaler": self.scaler.state_dict(),
            "samples": self.progress.samples,
            "audit": self.audit_record.to_dict(),
            **({"optimizer_values": values} if values else {}),
        }

    @torch.no_grad()
    def _copy_to_host(self, group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        buffers = self._host.setdefault(group, {})
        for name, tensor in tensors.items():
            if name not in buffers:
                buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            buffers[name].copy_(tensor, non_blocking=True)
        return {name: buffers[name] for name in tensors}

    def restore(self, saved: Mapping[str, Any], where: str = "checkpoint") -> None:
        """Continue from a snapshot; `where` names it in errors.

        Learning rates and other values of the recipe are not taken from it. Raises CheckpointError, and changes
        nothing, when the snapshot is of another network, is none, or lacks its audit record.
        """
        try:
            audit_record = sample_audit.parse_record(saved["audit"], where)
            average, samples = saved["average"], saved["samples"]
            _check_fits(saved["model"], self.model.state_dict(), f"{where}: model")
            if present := sgd.get_optimizer_tensors(self.model, self.optimizer):  # most have none before the first step
                _check_fits(saved["momentum"], present, f"{where}: momentum")
            if average["updates"]:
                _check_fits(average["mean"], get_averaged_tensors(self.model), f"{where}: average")
            scaler = saved["scaler"]
        except DataError as error:
            raise CheckpointError(f"{error}; start anew with --new") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{where}: holds no state of a training run ({type(error).__name__}: {error}); start anew with --new"
            ) from None
        self.audit_record = audit_record
        self.model.load_state_dict(saved["model"])
        sgd.load_optimizer_state(self.model, self.optimizer, saved["momentum"], saved.get("optimizer_values", {}))
        self.average.load_state_dict(average["updates"], average["mean"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.progress = Progress(samples, self.progress.batch_size, self.progress.steps_per_epoch)

    def copy_final_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return averaged and raw weights without the auxiliary heads, on the CPU."""
        heads, mean = self.model.get_auxiliary_names(), self.average.mean
        state = {name: tensor.detach() for name, tensor in self.model.state_dict().items() if name not in heads}
        averaged = {name: mean.get(name, tensor).detach().to("cpu", copy=True) for name, tensor in state.items()}
        return averaged, {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}


def create_initial_state(recipe: Recipe, classes: int, steps_per_epoch: int, device: torch.device) -> TrainState:
    """Return the state before the first step."""
    model = create_model(recipe.model, classes, recipe.seeds.weights)
    model = model.to(device=device, memory_format=model.memory_format)  # type: ignore[call-overload]
    if device.type == "cpu":
        _use_contiguous_pointwise_weights(model)
    return TrainState(
        model,
        sgd.build_optimizer(model, recipe.optimizer),
        WeightAverager(model, recipe.averaging, steps_per_epoch),
        Progress(0, recipe.batch_size, steps_per_epoch),
        torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16"),
    )


def _check_fits(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    if (problem := find_tensor_mismatch(saved, expected, "this run's")) is not None:
        raise CheckpointError(
            f"{where}: {problem}; give the recipe and data that it was trained with, or start anew with --new"
        )


def wrap_in_ddp(model: nn.Module, workers: int) -> nn.Module:
    """Return the module for the forward pass. No static_graph: unsynchronised micro-batches are not that graph."""
    if workers == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)


def _use_contiguous_pointwise_weights(model: nn.Module) -> None:
    """Give the weights of 1x1 convolutions the strides of their gradients.

    On CPU they are matrix products, whose gradients have contiguous strides; with channels_last weights DDP would copy
    each gradient into its bucket and warn.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.weight.data = module.weight.detach().clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Progress:
    """Progress of a run. An epoch is `steps_per_epoch` global batches; an incomplete last batch is left out."""

    samples: int
    batch_size: int
    steps_per_epoch: int

    @property
    def step(self) -> int:
        """Global batches done since the start."""
        return self.samples // self.batch_size

    @property
    def epoch(self) -> int:
        """Whole epochs done, which is also the index of the epoch in progress."""
        return self.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        """Global batches done of the epoch in progress."""
        return self.step % self.steps_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch, an incomplete last batch left out."""
        return self.steps_per_epoch * self.batch_size

    def advance(self) -> Progress:
        """Return the progress after one more global batch."""
        return replace(self, samples=self.samples + self.batch_size)
