"""Polyak averaging: the running mean of the weights, used at inference (arXiv 1409.4842, section 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PolyakAverage:
    """The mean of a model's parameters over the updates since averaging began; empty until then."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.updates = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the mean, each update with equal weight."""
        self.updates += 1
        parameters = dict(self._model.named_parameters())
        if not self.mean:
            self.mean = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            return
        torch._foreach_lerp_(list(self.mean.values()), list(parameters.values()), 1.0 / self.updates)

    def state_dict(self) -> dict[str, object]:
        """The mean and how many updates it holds."""
        return {"updates": self.updates, "mean": self.mean}

    def load_state_dict(self, updates: int, mean: dict[str, Tensor]) -> None:
        """Continue a mean that was saved."""
        self.updates = updates
        device = next(self._model.parameters()).device
        self.mean = {name: tensor.to(device).clone() for name, tensor in mean.items()}
