"""SGD with momentum as the recipe says."""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.recipe.config import OptimizerConfig


def build(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over the model's parameters; the rate is set before every step, so it starts at 0.

    Weight decay spares biases, as is usual since the Caffe replication (decay_mult: 0 for biases).
    """
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": biases, "weight_decay": 0.0},
    ]
    # Fused: one kernel over all tensors instead of several passes over each; torch has it for CPU and CUDA.
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)


def set_rate(optimizer: torch.optim.SGD, rate: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
