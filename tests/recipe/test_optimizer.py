"""SGD with momentum against numbers computed by hand."""

import pytest
import torch
from torch import nn

from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.googlenet import build as build_network
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import OptimizerConfig


def linear(weight: float, bias: float) -> nn.Linear:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(weight)
        layer.bias.fill_(bias)
    return layer


def step(layer: nn.Linear, optimizer: torch.optim.SGD, gradient: float) -> tuple[float, float]:
    layer.weight.grad = torch.full((1, 1), gradient)
    layer.bias.grad = torch.full((1,), gradient)
    optimizer.step()
    return layer.weight.item(), layer.bias.item()


def test_two_steps_by_hand() -> None:
    layer = linear(2.0, 1.0)
    optimizer = sgd.build(layer, OptimizerConfig(momentum=0.9, weight_decay=0.1))
    sgd.set_rate(optimizer, 0.1)
    # Weight: velocity 0.5 + 0.1 * 2 = 0.7. Bias without decay: velocity 0.5.
    assert step(layer, optimizer, 0.5) == pytest.approx((1.93, 0.95))
    # Weight: 0.9 * 0.7 + 0.5 + 0.1 * 1.93 = 1.323. Bias: 0.9 * 0.5 + 0.5 = 0.95.
    assert step(layer, optimizer, 0.5) == pytest.approx((1.7977, 0.855))


def test_the_rate_applies_from_the_next_step_to_all_parameters() -> None:
    layer = linear(2.0, 1.0)
    optimizer = sgd.build(layer, OptimizerConfig(momentum=0.0, weight_decay=0.0))
    assert step(layer, optimizer, 1.0) == (2.0, 1.0), "before a rate is set, nothing moves"
    sgd.set_rate(optimizer, 0.25)
    assert step(layer, optimizer, 1.0) == (1.75, 0.75)


def test_every_parameter_is_trained_and_only_weights_decay() -> None:
    model = build_network(GoogLeNetConfig(image_size=32, width=0.1), 10, 0)
    optimizer = sgd.build(model, OptimizerConfig(weight_decay=0.5))
    decays = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert len(decays) == sum(len(group["params"]) for group in optimizer.param_groups)
    found = {name: decays[id(one)] for name, one in model.named_parameters()}
    assert {name for name, decay in found.items() if decay == 0.0} == {n for n in found if n.endswith(".bias")}
    assert {decay for name, decay in found.items() if name.endswith(".weight")} == {0.5}
