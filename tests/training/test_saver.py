"""Checkpoints by the clock, written behind the training's back."""

import time
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import format as checkpoints
from orchestrator.storage.files import StorageError
from orchestrator.training import state as states
from orchestrator.training.job import Cadence, TrainJob, checkpoints_of
from orchestrator.training.saver import Saver
from orchestrator.training.state import TrainState
from tests.support.runs import CPU, NEVER, recipe, saved_at


def job(folder: Path, seconds: float = NEVER, keep: int = 2) -> TrainJob:
    return TrainJob(
        recipe=recipe(), data="/nowhere", dataset_digest="0", folder=str(folder), stop_flag=str(folder / "stop"),
        cadence=Cadence(checkpoint_seconds=seconds, keep_checkpoints=keep),
    )  # fmt: skip


@pytest.fixture
def state() -> TrainState:
    return states.fresh(recipe(), 3, 6, CPU)


def advance(state: TrainState) -> None:
    state.progress = state.progress.advance()


def test_the_clock_says_when(tmp_path: Path, state: TrainState) -> None:
    assert not Saver(job(tmp_path), 1).due()
    saver = Saver(job(tmp_path, seconds=0.05), 1)
    assert not saver.due()
    time.sleep(0.06)
    assert saver.due()
    saver.save(state)
    saver.wait()
    assert not saver.due()


def test_few_are_kept_and_the_attempt_is_in_their_names(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path, keep=2)
    saver = Saver(one, 7)
    for _ in range(4):
        advance(state)
        saver.save(state)
    saver.wait()
    assert saved_at(one) == [32, 24]
    assert {place.attempt for place in checkpoints.places(checkpoints_of(one.folder))} == {7}


def test_what_was_saved_does_not_follow_the_training(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    saver = Saver(one, 1)
    state.average.update()
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    advance(state)
    saver.save(state)
    with torch.no_grad():
        for tensor in (*state.model.parameters(), *state.average.mean.values()):
            tensor.zero_()
    saver.wait()
    found = checkpoints.newest(checkpoints_of(one.folder)).state
    assert found["recipe"] == one.recipe.to_dict()
    assert (found["samples"], found["average"]["updates"]) == (8, 1)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in before.items())
    assert all(torch.equal(found["average"]["mean"][name], before[name]) for name in found["average"]["mean"])


def test_a_state_is_restored_whole(tmp_path: Path, state: TrainState) -> None:
    for one in state.model.parameters():
        one.grad = torch.randn_like(one)
    state.optimizer.step()
    state.average.update()
    state.record = state.record.with_delivered(0, 2**64 - 1, 8, [])
    advance(state)
    other = states.fresh(
        recipe().model_copy(update={"seeds": recipe().seeds.model_copy(update={"weights": 9})}), 3, 6, CPU
    )
    other.restore(state.snapshot())
    left, right = state.snapshot(), other.snapshot()
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name])
        assert tensor.stride() == right["model"][name].stride()
        assert torch.equal(left["average"]["mean"].get(name, tensor), right["average"]["mean"].get(name, tensor))
    for key, buffers in left["optimizer"]["state"].items():
        assert torch.equal(buffers["momentum_buffer"], right["optimizer"]["state"][key]["momentum_buffer"])
    assert left["samples"] == right["samples"] == 8
    assert other.progress == state.progress
    assert other.record == state.record


def test_the_same_progress_is_saved_once(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    saver = Saver(one, 1)
    for _ in range(2):
        saver.save(state)
        saver.wait()
    assert saved_at(one) == [0]


def test_an_error_is_raised_at_the_next_save_and_only_there(tmp_path: Path, state: TrainState) -> None:
    (tmp_path / "checkpoints").write_bytes(b"a file where the folder should be")
    saver = Saver(job(tmp_path), 1)
    saver.save(state)
    advance(state)
    with pytest.raises(StorageError, match="checkpoints"):
        saver.save(state)
    saver.wait()
    (tmp_path / "checkpoints").unlink()
    saver.save(state)
    saver.wait()
    assert saved_at(job(tmp_path)) == [8]


def test_an_error_of_the_last_save_is_raised_by_wait(tmp_path: Path, state: TrainState) -> None:
    (tmp_path / "checkpoints").write_bytes(b"")
    saver = Saver(job(tmp_path), 1)
    saver.save(state)
    with pytest.raises(StorageError):
        saver.wait()
