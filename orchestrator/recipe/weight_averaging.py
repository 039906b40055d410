"""Polyak averaging: a mean of the weights, used at inference (arXiv 1409.4842, section 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orchestrator.recipe.config import AnyAveraging, RunningMean


class WeightAverager:
    """The mean of a model's parameters and float buffers over the updates since averaging began; empty until then.

    Buffers too: averaged weights need the statistics that batch norms saw with them.
    """

    def __init__(self, model: nn.Module, config: AnyAveraging, steps_per_epoch: int) -> None:
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self._tensors = get_averaged_tensors(model)
        self.updates = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Add the model's present weights to the mean; once per step."""
        self.updates += 1
        if not self.mean:
            self.mean = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
            return
        share = compute_update_share(self._config, self.updates, self._steps_per_epoch)
        torch._foreach_lerp_(list(self.mean.values()), list(self._tensors.values()), share)

    def load_state_dict(self, updates: int, mean: dict[str, Tensor]) -> None:
        """Continue a mean that was saved."""
        self.updates = updates
        self.mean = {name: tensor.to(self._tensors[name].device, copy=True) for name, tensor in mean.items()}


def get_averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to average, not copied: parameters and the float buffers of the model's state."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    if buffers:
        saved = model.state_dict()
        tensors |= {name: buffer for name, buffer in buffers.items() if name in saved}
    return tensors


def compute_update_share(config: AnyAveraging, updates: int, steps_per_epoch: int) -> float:
    """Return the weight of the newest of so many updates in the mean; 1 for the first.

    The exponential average is sum(k^i x_i) / sum(k^i), i being the age in steps, so that it begins at the first
    update's weights and not near 0.
    """
    if isinstance(config, RunningMean):
        return 1.0 / updates
    forgetting = math.log(2.0) / (config.half_life_epochs * steps_per_epoch)
    return math.expm1(-forgetting) / math.expm1(-forgetting * updates)
