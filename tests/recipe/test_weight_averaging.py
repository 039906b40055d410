"""The Polyak average is the arithmetic mean, whole or continued."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.recipe.config import ExponentialAverage, RunningMean
from orchestrator.recipe.optimizer import WeightAverager, compute_update_share


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
