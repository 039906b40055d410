"""Optimizers against numbers computed by hand, and the Polyak average: the arithmetic mean, whole or continued."""

import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.config.errors import ConfigError
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.registry import create_model as build_network
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import (
    AdamWConfig,
    AnyOptimizer,
    ExponentialAverage,
    OptimizerPlugin,
    RunningMean,
    SGDConfig,
)
from orchestrator.recipe.optimizer import WeightAverager, compute_update_share


def linear(weight: float, bias: float) -> nn.Linear:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(weight)
        layer.bias.fill_(bias)
    return layer


def step(layer: nn.Linear, optimizer: torch.optim.Optimizer, gradient: float) -> tuple[float, float]:
    layer.weight.grad = torch.full((1, 1), gradient)
    layer.bias.grad = torch.full((1,), gradient)
    optimizer.step()
    return layer.weight.item(), layer.bias.item()


def test_two_steps_by_hand() -> None:
    layer = linear(2.0, 1.0)
    optimizer = sgd.build_optimizer(layer, SGDConfig(momentum=0.9, weight_decay=0.1))
    sgd.set_lr(optimizer, 0.1)
    # Weight: velocity 0.5 + 0.1 * 2 = 0.7. Bias without decay: velocity 0.5.
    assert step(layer, optimizer, 0.5) == pytest.approx((1.93, 0.95))
    # Weight: 0.9 * 0.7 + 0.5 + 0.1 * 1.93 = 1.323. Bias: 0.9 * 0.5 + 0.5 = 0.95.
    assert step(layer, optimizer, 0.5) == pytest.approx((1.7977, 0.855))


def test_the_rate_applies_from_the_next_step_to_all_parameters() -> None:
    layer = linear(2.0, 1.0)
    optimizer = sgd.build_optimizer(layer, SGDConfig(momentum=0.0, weight_decay=0.0))
    assert step(layer, optimizer, 1.0) == (2.0, 1.0), "before a rate is set, nothing moves"
    sgd.set_lr(optimizer, 0.25)
    assert step(layer, optimizer, 1.0) == (1.75, 0.75)


def test_every_parameter_is_trained_and_only_weights_decay() -> None:
    model = build_network(GoogLeNetConfig(image_size=32, width=0.1), 10, 0)
    optimizer = sgd.build_optimizer(model, SGDConfig(weight_decay=0.5))
    decays = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    assert len(decays) == sum(len(group["params"]) for group in optimizer.param_groups)
    found = {name: decays[id(one)] for name, one in model.named_parameters()}
    assert {name for name, decay in found.items() if decay == 0.0} == {n for n in found if n.endswith(".bias")}
    assert {decay for name, decay in found.items() if name.endswith(".weight")} == {0.5}


def gradients(model: nn.Linear, weight: float, bias: float) -> list[float]:
    model.weight.grad = torch.full((1, 1), weight)
    model.bias.grad = torch.full((1,), bias)
    sgd.clip_gradients(model, SGDConfig(clip_norm=2.5))
    return [model.weight.grad.item(), model.bias.grad.item()]


def test_gradients_are_clipped_by_their_norm_over_all_parameters() -> None:
    model = linear(0.0, 0.0)
    assert gradients(model, 3.0, 4.0) == pytest.approx([1.5, 2.0], rel=1e-5), "a norm of 5 becomes 2.5"
    assert gradients(model, 0.3, 0.4) == pytest.approx([0.3, 0.4], rel=1e-6), "a small one stays"


def test_momentum_is_known_by_the_parameters_names_from_the_start() -> None:
    layer = linear(2.0, 1.0)
    optimizer = sgd.build_optimizer(layer, SGDConfig())
    assert {name: one.tolist() for name, one in sgd.get_optimizer_tensors(layer, optimizer).items()} == {
        "weight": [[0.0]], "bias": [0.0],
    }  # fmt: skip
    step(layer, optimizer, 0.5)
    assert sgd.get_optimizer_tensors(layer, optimizer)["bias"].tolist() == [0.5]
    assert sgd.get_optimizer_tensors(layer, sgd.build_optimizer(layer, SGDConfig(momentum=0.0))) == {}


def test_steps_are_torchs_to_the_bit() -> None:
    found = []
    kinds: tuple[type[torch.optim.SGD], ...] = (sgd.UndecoratedSGD, torch.optim.SGD)
    for kind in kinds:
        generator = torch.Generator().manual_seed(1)
        weights = [nn.Parameter(torch.randn(7, 5, generator=generator)) for _ in range(3)]
        groups: list[dict[str, Any]] = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:]}]
        optimizer = kind(groups, 0.1, 0.9, fused=True)
        for _ in range(4):
            optimizer.zero_grad()
            for one in weights:
                one.grad = torch.randn(7, 5, generator=generator)
            optimizer.step()
        found.append(
            [*(one.detach() for one in weights), *(optimizer.state[one]["momentum_buffer"] for one in weights)]
        )
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------ other kinds
OTHERS: list[AnyOptimizer] = [
    AdamWConfig(weight_decay=0.1),
    OptimizerPlugin(kind="torch.optim:RMSprop", args={"alpha": 0.9, "momentum": 0.5, "weight_decay": 0.1}),
    OptimizerPlugin(kind="torch.optim:Adadelta"),
    OptimizerPlugin(kind=f"{__name__}:Counting"),
]


class Counting(torch.optim.Optimizer):
    """Has a number and a list of its own for each parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                state = self.state[one]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("norms", []).append(float(one.grad.norm()))
                one.sub_(one.grad, alpha=group["lr"] / state["count"] * sum(state["norms"]))


class Closure(Counting):
    """Needs a closure."""

    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


def train_layer(layer: nn.Linear, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    sgd.set_lr(optimizer, 0.1)
    for number in range(first, last):
        step(layer, optimizer, 1.0 + number)


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.kind)
def test_any_optimizer_resumes_to_the_bit(config: AnyOptimizer) -> None:
    whole, part = linear(2.0, 1.0), linear(2.0, 1.0)
    train_layer(whole, sgd.build_optimizer(whole, config), 0, 6)
    optimizer = sgd.build_optimizer(part, config)
    sgd.load_optimizer_state(part, optimizer, {}, {})  # a checkpoint from before the first step
    train_layer(part, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((sgd.get_optimizer_tensors(part, optimizer), sgd.copy_optimizer_values(part, optimizer)), file)
    file.seek(0)
    resumed = linear(part.weight.item(), part.bias.item())
    other = sgd.build_optimizer(resumed, config)
    sgd.load_optimizer_state(resumed, other, *torch.load(file, weights_only=True))
    train_layer(resumed, other, 3, 6)
    assert (resumed.weight.item(), resumed.bias.item()) == (whole.weight.item(), whole.bias.item())


@pytest.mark.parametrize("config", OTHERS[:2], ids=lambda config: config.kind)
def test_weight_decay_of_any_optimizer_spares_biases(config: AnyOptimizer) -> None:
    optimizer = sgd.build_optimizer(linear(2.0, 1.0), config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


def test_adamw_is_torchs() -> None:
    ours, theirs = linear(2.0, 1.0), linear(2.0, 1.0)
    config = AdamWConfig(weight_decay=0.1, betas=(0.8, 0.9), epsilon=1e-6)
    train_layer(ours, sgd.build_optimizer(ours, config), 0, 3)
    groups: list[dict[str, Any]] = [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}]
    train_layer(theirs, torch.optim.AdamW(groups, 0.1, (0.8, 0.9), 1e-6, 0.1), 0, 3)
    assert ours.weight.item() == pytest.approx(theirs.weight.item())
    assert ours.bias.item() == pytest.approx(theirs.bias.item())


def test_parameters_that_are_not_trained_have_no_state() -> None:
    layer = linear(2.0, 1.0)
    layer.bias.requires_grad_(False)
    for config in (SGDConfig(), *OTHERS):
        optimizer = sgd.build_optimizer(layer, config)
        assert [one for group in optimizer.param_groups for one in group["params"]] == [layer.weight]


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("torch.optim:NoSuch", {}, "has no attribute 'NoSuch'"),
        ("torch.optim:RMSprop", {"beta": 1}, "unexpected keyword argument 'beta'"),
        ("torch.optim:RMSprop", {"lr": 1}, "multiple values for keyword argument 'lr'"),
        ("torch.optim:RMSprop", {"alpha": -1}, "failed.*: ValueError: Invalid alpha value"),
        ("torch.optim:LBFGS", {}, "failed.*: ValueError: LBFGS doesn't support per-parameter options"),
        (f"{__name__}:Closure", {}, r"cannot step.*; it must step after a backward pass, without a closure"),
        ("builtins:dict", {}, "must return a torch.optim.Optimizer, got dict"),
    ],
)
def test_a_bad_optimizer_says_why_in_a_line(kind: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sgd.check_optimizer(OptimizerPlugin(kind=kind, args=args))
    assert f"optimizer {kind!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_optimizers_pass() -> None:
    configs = [config for config in OTHERS if isinstance(config, OptimizerPlugin)]
    assert configs
    for config in configs:
        sgd.check_optimizer(config)


_TRAINS = """
import sys, torch
from torch import nn
from orchestrator.recipe import optimizer as sgd
from orchestrator.recipe.config import SGDConfig
layer = nn.Linear(2, 2)
optimizer = sgd.build_optimizer(layer, SGDConfig())
optimizer.zero_grad()
layer(torch.ones(1, 2)).sum().backward()
optimizer.step()
sys.exit("torch._dynamo" in sys.modules)
"""


def test_no_start_waits_for_the_compiler() -> None:
    assert subprocess.run([sys.executable, "-c", _TRAINS], check=False, timeout=60).returncode == 0


# ------------------------------------------------------------------ the mean of the weights
def moved(model: nn.Linear, seed: int) -> torch.Tensor:
    with torch.no_grad():
        model.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.weight.detach().clone()


def test_it_is_empty_before_the_first_update() -> None:
    assert WeightAverager(nn.Linear(2, 2), RunningMean(), 1).mean == {}


@given(st.integers(1, 40))
def test_it_is_the_mean_of_the_weights(updates: int) -> None:
    model = nn.Linear(3, 2)
    average = WeightAverager(model, RunningMean(), 1)
    taken = []
    for seed in range(updates):
        taken.append(moved(model, seed))
        average.update()
    assert average.updates == updates
    mean = torch.stack(taken).double().mean(dim=0)
    assert torch.allclose(average.mean["weight"].double(), mean, rtol=0, atol=1e-6)
    assert torch.allclose(average.mean["bias"], model.bias, rtol=0, atol=1e-6)


def test_the_mean_does_not_follow_the_model() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverager(model, RunningMean(), 1)
    average.update()
    before = average.mean["weight"].clone()
    moved(model, 1)
    assert torch.equal(average.mean["weight"], before)


def test_a_continued_mean_is_bit_identical() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    whole = WeightAverager(model, RunningMean(), 1)
    for seed in range(3):
        moved(model, seed)
        whole.update()
    continued = WeightAverager(other, RunningMean(), 1)
    continued.load_state_dict(whole.updates, whole.mean)
    for seed in range(3, 7):
        moved(model, seed)
        moved(other, seed)
        other.load_state_dict(model.state_dict())
        whole.update()
        continued.update()
    for name, mean in whole.mean.items():
        assert torch.equal(mean, continued.mean[name])
        assert mean.data_ptr() != continued.mean[name].data_ptr()


@given(st.integers(1, 40), st.floats(0.01, 50.0))
def test_the_exponential_average_halves_with_each_half_life(updates: int, half_life: float) -> None:
    model = nn.Linear(3, 2)
    average = WeightAverager(model, ExponentialAverage(half_life_epochs=half_life), steps_per_epoch=5)
    taken = []
    for seed in range(updates):
        taken.append(moved(model, seed))
        average.update()
    kept = 0.5 ** (torch.arange(updates - 1, -1, -1).double() / (5 * half_life))
    mean = (torch.stack(taken).double() * kept[:, None, None]).sum(dim=0) / kept.sum()
    assert torch.allclose(average.mean["weight"].double(), mean, rtol=0, atol=1e-5)


def test_the_batch_size_does_not_change_how_long_it_remembers() -> None:
    """After the same two epochs, in 20 steps or in 2000, the last epoch counts four times the first."""
    for steps in (10, 1000):
        config, kept = ExponentialAverage(half_life_epochs=0.5), 1.0
        for update in range(steps + 1, 2 * steps + 1):
            kept *= 1.0 - compute_update_share(config, update, steps)
        # Of what the mean held after one epoch: weights of 1 + 4 against 1.
        assert kept == pytest.approx(1 / 5)


def test_an_endless_memory_is_the_running_mean() -> None:
    for update in (1, 2, 1000):
        assert compute_update_share(ExponentialAverage(half_life_epochs=1e5), update, 10_000) == pytest.approx(
            1 / update
        )


def test_statistics_of_batch_norms_are_averaged_and_counters_are_not() -> None:
    model = nn.BatchNorm2d(2)
    average = WeightAverager(model, RunningMean(), 1)
    assert model.running_mean is not None
    for value in (1.0, 3.0):
        model.running_mean.fill_(value)
        average.update()
    assert average.mean.keys() == {"weight", "bias", "running_mean", "running_var"}
    assert average.mean["running_mean"].tolist() == [2.0, 2.0]


def test_buffers_that_are_no_state_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.ones(2), persistent=False)
    average = WeightAverager(model, RunningMean(), 1)
    average.update()
    assert average.mean.keys() == {"weight", "bias"}
