"""SGD with momentum as the recipe says."""

from __future__ import annotations

from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.recipe.config import OptimizerConfig

MOMENTUM_KEY = "momentum_buffer"  # torch's name


class UndecoratedSGD(torch.optim.SGD):
    """torch's SGD, to the bit, without the decorators that import torch._dynamo: more than a second of each start.

    They matter to an optimizer that is compiled itself, which none is here.
    """

    _add = staticmethod(unwrap(torch.optim.SGD.add_param_group))
    _zero = staticmethod(unwrap(torch.optim.SGD.zero_grad))
    _step = staticmethod(unwrap(torch.optim.SGD.step))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        self._add(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self._zero(self, set_to_none)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """As torch's, without a closure."""
        with torch.no_grad():
            self._step(self, closure)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
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
    optimizer = UndecoratedSGD(groups, lr=0.0, momentum=config.momentum, fused=True)
    if config.momentum > 0:
        # Zeros are what torch begins with. Left to it, the buffers are made at the first step without being filled,
        # and stay so when float16's scaler skips that step.
        for parameter in model.parameters():
            optimizer.state[parameter][MOMENTUM_KEY] = torch.zeros_like(parameter)
    return optimizer


def get_momentum_buffers(model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """The momentum of each parameter by the parameter's name, not copied; empty without momentum."""
    named = ((name, optimizer.state[parameter]) for name, parameter in model.named_parameters())
    return {name: state[MOMENTUM_KEY] for name, state in named if state.get(MOMENTUM_KEY) is not None}


def set_lr(optimizer: torch.optim.SGD, rate: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, config: OptimizerConfig) -> None:
    """Scale all gradients down together where their norm is above `config.clip_norm`.

    The gradients are those of the global batch already, equal on all ranks, so that nothing needs to be agreed on.
    """
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm, foreach=True)
