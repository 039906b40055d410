"""Snapshots: their contents, and errors when they are loaded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.config import Recipe
from orchestrator.training import train_state as states
from orchestrator.training.train_state import Progress, TrainState
from orchestrator.training.train_step import TrainStep
from tests.support.runs import ALONE, CPU, recipe

Change = Callable[[dict[str, Any]], object]


def made(of: Recipe | None = None, classes: int = 3) -> TrainState:
    return states.create_initial_state(of or recipe(), classes, 6, CPU)


def trained(of: Recipe | None = None) -> TrainState:
    state = made(of)
    for one in state.model.parameters():
        one.grad = torch.ones_like(one)
    for group in state.optimizer.param_groups:
        group["lr"] = 0.5
    state.optimizer.step()
    state.average.update()
    state.progress = state.progress.advance()
    return state


def unchanged(state: TrainState, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())


def test_rates_and_flags_are_the_recipes_not_the_snapshots() -> None:
    saved = trained().snapshot()
    state = made(apply_overrides(recipe(), {"optimizer.weight_decay": 0.01}))
    state.restore(saved)
    first, second = state.optimizer.param_groups
    assert (first["lr"], first["fused"], first["weight_decay"], second["weight_decay"]) == (0.0, True, 0.01, 0.0)
    assert all(bool((one == 1.0).all()) for name, one in saved["momentum"].items() if name.endswith("bias"))


def test_only_tensors_by_name_and_plain_values_are_in_a_snapshot() -> None:
    saved = trained().snapshot()
    assert saved.keys() == {"model", "momentum", "average", "scaler", "samples", "audit"}
    assert saved["momentum"].keys() == dict(made().model.named_parameters()).keys()
    assert (saved["samples"], saved["scaler"]) == (8, {})


def test_memory_is_used_again_by_the_next_snapshot() -> None:
    state = trained()
    first = state.snapshot()
    where = {name: one.data_ptr() for name, one in first["model"].items()}
    with torch.no_grad():
        for one in state.model.parameters():
            one.fill_(7.0)
    second = state.snapshot()
    assert where == {name: one.data_ptr() for name, one in second["model"].items()}
    assert float(second["model"]["classifier.bias"][0]) == 7.0


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_without_momentum_there_is_none(momentum: float) -> None:
    of = apply_overrides(recipe(), {"optimizer.momentum": momentum})
    state = made(of)
    state.restore(trained(of).snapshot())
    assert bool(state.snapshot()["momentum"]) == (momentum > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["model"].pop("classifier.bias"), r"here: model: lacks 'classifier.bias' \(1 such"),
        (lambda saved: saved["model"].update(extra=torch.ones(1)), "here: model: has also 'extra'"),
        (lambda saved: saved["momentum"].pop("classifier.bias"), "here: momentum: lacks 'classifier.bias'"),
        (lambda saved: saved["average"]["mean"].pop("classifier.bias"), "here: average: lacks 'classifier.bias'"),
        (lambda saved: saved.pop("momentum"), "here: holds no state of a training run"),
        (lambda saved: saved.update(model=[1]), "here: holds no state of a training run"),
        (lambda saved: saved["model"].update({"classifier.bias": 1.0}), "here: holds no state of a training run"),
    ],
)
def test_what_is_no_snapshot_of_this_network_is_rejected(change: Change, message: str) -> None:
    saved = trained().snapshot()
    change(saved)
    state = made()
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        state.restore(saved, "here")
    assert "--new" in str(caught.value)
    assert unchanged(state, before)


def test_another_number_of_classes_is_rejected() -> None:
    state = made(classes=4)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has shape \(3.*\), this run's has \(4"):
        state.restore(trained().snapshot())
    assert unchanged(state, before)


def test_another_network_is_rejected() -> None:
    with pytest.raises(CheckpointError, match="another network"):
        made(apply_overrides(recipe(), {"model.auxiliary": False})).restore(trained().snapshot())
    with pytest.raises(CheckpointError, match="has shape"):
        made(apply_overrides(recipe(), {"model.width": 0.2})).restore(trained().snapshot())


# ------------------------------------------------------------------ the clock of a run
@pytest.mark.parametrize(
    ("step", "samples", "epoch", "step_in_epoch"),
    [(0, 0, 0, 0), (1, 32, 0, 1), (9, 288, 0, 9), (10, 320, 1, 0), (27, 864, 2, 7)],
)
def test_literals(step: int, samples: int, epoch: int, step_in_epoch: int) -> None:
    found = Progress(samples, 32, 10)
    assert (found.step, found.epoch, found.step_in_epoch) == (step, epoch, step_in_epoch)


@given(st.integers(0, 10_000), st.integers(1, 5000), st.integers(1, 5000))
def test_one_step_at_a_time_is_the_same_as_all_together(step: int, batch_size: int, steps_per_epoch: int) -> None:
    found = Progress(step * batch_size, batch_size, steps_per_epoch)
    assert found.epoch * steps_per_epoch + found.step_in_epoch == found.step == step
    after = found.advance()
    assert after == Progress((step + 1) * batch_size, batch_size, steps_per_epoch)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (0.6, 36), (0.61, 36), (0.99, 59), (0.9999, 59)])
def test_averaging_begins_at_its_share_and_holds_at_least_the_last_step(start: float, first: int) -> None:
    of = apply_overrides(recipe(epochs=6), {"averaging.start": start})
    state = states.create_initial_state(of, 3, 10, CPU)
    assert TrainStep(of, state, state.model, ALONE).averaging_from == first
