"""The Polyak average is the arithmetic mean, whole or continued."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orchestrator.recipe.polyak import PolyakAverage


def moved(model: nn.Linear, seed: int) -> torch.Tensor:
    with torch.no_grad():
        model.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.weight.detach().clone()


def test_it_is_empty_before_the_first_update() -> None:
    assert PolyakAverage(nn.Linear(2, 2)).mean == {}


@given(st.integers(1, 40))
def test_it_is_the_mean_of_the_weights(updates: int) -> None:
    model = nn.Linear(3, 2)
    average = PolyakAverage(model)
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
    average = PolyakAverage(model)
    average.update()
    before = average.mean["weight"].clone()
    moved(model, 1)
    assert torch.equal(average.mean["weight"], before)


def test_a_continued_mean_is_bit_identical() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    whole = PolyakAverage(model)
    for seed in range(3):
        moved(model, seed)
        whole.update()
    continued = PolyakAverage(other)
    state = whole.state_dict()
    assert state["updates"] == whole.updates
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
