"""The optimizer of a recipe with its state for checkpoints, and the mean of the weights (Polyak averaging)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import create_plugin, format_failure
from orchestrator.recipe.config import AdamWConfig, AnyAveraging, AnyOptimizer, OptimizerPlugin, RunningMean


class UndecoratedSGD(torch.optim.SGD):
    """torch's SGD, to the bit, without the decorators that import torch._dynamo: more than a second of each start.

    They matter to an optimizer that is compiled itself, which none is here.
    """

    add_param_group = unwrap(torch.optim.SGD.add_param_group)
    zero_grad = unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


def build_optimizer(model: nn.Module, config: AnyOptimizer) -> torch.optim.Optimizer:
    """Build the optimizer of all parameters that are trained; the rate is set before every step, so it starts at 0.

    Weight decay spares biases, as is usual since the Caffe replication (decay_mult: 0 for biases). Raises ConfigError
    when a plug-in does not take these parameter groups and args, or is not an optimizer that steps by itself.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1]},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1]},
    ]
    if isinstance(config, OptimizerPlugin):
        groups = [group for group in groups if group["params"]]
        if "weight_decay" in config.args and groups[-1]["params"][0].ndim <= 1:
            groups[-1]["weight_decay"] = 0.0
        optimizer = create_plugin(config.what, config.kind, config.args, params=groups, lr=0.0)
        if not isinstance(optimizer, torch.optim.Optimizer):
            got = type(optimizer).__name__
            raise ConfigError(f"optimizer {config.kind!r} must return a torch.optim.Optimizer, got {got}")
        return optimizer
    groups[0]["weight_decay"], groups[1]["weight_decay"] = config.weight_decay, 0.0
    # Fused: one kernel over all tensors instead of several passes over each; torch has it for CPU and CUDA.
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.epsilon, fused=True)
    optimizer = UndecoratedSGD(groups, lr=0.0, momentum=config.momentum, fused=True)
    if config.momentum > 0:
        # Zeros are what torch begins with. Left to it, the buffers are made at the first step without being filled,
        # and stay so when float16's scaler skips that step.
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def check_optimizer(config: OptimizerPlugin) -> None:
    """Make one step on a small layer. Raises ConfigError when the plug-in cannot be built or cannot step."""
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(layer, config)
    set_lr(optimizer, 0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(
            f"optimizer {config.kind!r} cannot step{format_failure(error)}; it must step after a backward pass, "
            "without a closure"
        ) from error


def get_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors, not copied: SGD's momentum by the parameter's name, others by "NAME/KEY"."""
    return {name: value for name, value in _iter_state(model, optimizer) if isinstance(value, Tensor)}


def copy_optimizer_values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a copy of what else the optimizer has per parameter, by "NAME/KEY"; nothing for the built-in ones."""
    return {name: deepcopy(value) for name, value in _iter_state(model, optimizer) if not isinstance(value, Tensor)}


def load_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Give the optimizer the state that the two functions above returned; groups and rates stay as they are.

    Raises KeyError, and changes nothing, for a parameter that the model lacks.
    """
    if isinstance(optimizer, UndecoratedSGD):
        for name, tensor in get_optimizer_tensors(model, optimizer).items():
            tensor.copy_(tensors[name])
        return
    parameters = dict(model.named_parameters())
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {id(parameter): number for number, parameter in enumerate(ordered)}
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**tensors, **values}.items():
        name, _, key = path.rpartition("/")
        state.setdefault(numbers[id(parameters[name])], {})[key] = value
    # By torch, which knows the device and dtype that each tensor of it must have.
    optimizer.load_state_dict(deepcopy({"state": state, "param_groups": optimizer.state_dict()["param_groups"]}))


def _iter_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield name if isinstance(optimizer, UndecoratedSGD) else f"{name}/{key}", value


def set_lr(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, config: AnyOptimizer) -> None:
    """Scale all gradients down together where their norm is above `config.clip_norm`.

    The gradients are those of the global batch already, equal on all ranks, so that nothing needs to be agreed on.
    """
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm, foreach=True)


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
    saved = model.state_dict(keep_vars=True)
    floats = ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())
    return {**dict(model.named_parameters()), **{name: buffer for name, buffer in floats if name in saved}}


def compute_update_share(config: AnyAveraging, updates: int, steps_per_epoch: int) -> float:
    """Return the weight of the newest of so many updates in the mean; 1 for the first.

    The exponential average is sum(k^i x_i) / sum(k^i), i being the age in steps, so that it begins at the first
    update's weights and not near 0.
    """
    if isinstance(config, RunningMean):
        return 1.0 / updates
    forgetting = math.log(2.0) / (config.half_life_epochs * steps_per_epoch)
    return math.expm1(-forgetting) / math.expm1(-forgetting * updates)
