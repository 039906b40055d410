"""Checkpoints by the clock and by samples, written in the background."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from orchestrator.checkpoint import checkpoint as checkpoints
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.storage import commit, file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.training import attempts
from orchestrator.training import train_state as states
from orchestrator.training.attempts import Attempt, Goodput
from orchestrator.training.callbacks.checkpointer import (
    MONITORED_METRICS,
    PRODUCTIVE_SECONDS_KEY,
    BestCheckpoint,
    Checkpointer,
)
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import Cadence, TrainJob
from orchestrator.training.run_dir import get_attempts_dir, get_best_weights_dir, get_checkpoints_dir
from orchestrator.training.train_state import TrainState
from tests.support import runs
from tests.support.runs import CPU, NEVER, recipe, saved_at, train


def job(folder: Path, seconds: float = NEVER, keep: int = 2) -> TrainJob:
    return TrainJob(
        recipe=recipe(), data="/nowhere", dataset_digest="0", folder=str(folder), stop_flag=str(folder / "stop"),
        cadence=Cadence(checkpoint_seconds=seconds, keep_checkpoints=keep),
    )  # fmt: skip


@pytest.fixture
def state() -> TrainState:
    return states.create_initial_state(recipe(), 3, 6, CPU)


def saver_of(one: TrainJob, number: int = 1, watchdog: Watchdog | None = None) -> Checkpointer:
    attempt = Attempt(get_attempts_dir(one.folder), number, time.time())
    return Checkpointer(
        one, attempt, Goodput(attempt), watchdog or Watchdog(one.cadence.limits, lambda cause, stacks: None)
    )


def advance(state: TrainState) -> None:
    state.progress = state.progress.advance()


def test_the_clock_says_when(tmp_path: Path, state: TrainState) -> None:
    assert not saver_of(job(tmp_path)).is_due(0)
    saver = saver_of(job(tmp_path, seconds=0.5))
    assert not saver.is_due(0)
    time.sleep(0.55)
    assert saver.is_due(0)
    saver.save(state)
    saver.writer.wait()
    assert not saver.is_due(0)


def test_few_are_kept_and_the_attempt_is_in_their_names(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path, keep=2)
    saver = saver_of(one, 7)
    for _ in range(4):
        advance(state)
        saver.save(state)
    saver.writer.wait()
    assert saved_at(one) == [32, 24]
    assert {place.attempt for place in checkpoint_dir.list_checkpoints(get_checkpoints_dir(one.folder))} == {7}


def test_what_was_saved_does_not_follow_the_training(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    saver = saver_of(one)
    state.average.update()
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    advance(state)
    saver.save(state)
    with torch.no_grad():
        for tensor in (*state.model.parameters(), *state.average.mean.values()):
            tensor.zero_()
    saver.writer.wait()
    found = checkpoints.load_newest(get_checkpoints_dir(one.folder)).state
    assert found["recipe"] == one.recipe.to_dict()
    assert (found["samples"], found["average"]["updates"]) == (8, 1)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in before.items())
    assert all(torch.equal(found["average"]["mean"][name], before[name]) for name in found["average"]["mean"])


def test_a_state_is_restored_whole(tmp_path: Path, state: TrainState) -> None:
    for one in state.model.parameters():
        one.grad = torch.randn_like(one)
    state.optimizer.step()
    state.average.update()
    state.audit_record = state.audit_record.add_delivery(0, 2**64 - 1, 8, [])
    advance(state)
    other = states.create_initial_state(
        recipe().model_copy(update={"seeds": recipe().seeds.model_copy(update={"weights": 9})}), 3, 6, CPU
    )
    other.restore(state.snapshot())
    left, right = state.snapshot(), other.snapshot()
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name])
        assert tensor.stride() == right["model"][name].stride()
        assert torch.equal(left["average"]["mean"].get(name, tensor), right["average"]["mean"].get(name, tensor))
    for name, buffer in left["momentum"].items():
        assert torch.equal(buffer, right["momentum"][name])
    assert left["samples"] == right["samples"] == 8
    assert other.progress == state.progress
    assert other.audit_record == state.audit_record


def test_the_same_progress_is_saved_once(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    saver = saver_of(one)
    for _ in range(2):
        saver.save(state)
        saver.writer.wait()
    assert saved_at(one) == [0]


def test_an_error_is_raised_at_the_next_save_and_only_there(tmp_path: Path, state: TrainState) -> None:
    (tmp_path / "checkpoints").write_bytes(b"a file where the folder should be")
    saver = saver_of(job(tmp_path))
    saver.save(state)
    advance(state)
    with pytest.raises(StorageError, match="checkpoints"):
        saver.save(state)
    saver.writer.wait()
    (tmp_path / "checkpoints").unlink()
    saver.save(state)
    saver.writer.wait()
    assert saved_at(job(tmp_path)) == [8]


def test_an_error_of_the_last_save_is_raised_by_wait(tmp_path: Path, state: TrainState) -> None:
    (tmp_path / "checkpoints").write_bytes(b"")
    saver = saver_of(job(tmp_path))
    saver.save(state)
    with pytest.raises(StorageError):
        saver.writer.wait()


def test_samples_say_when_too(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    one = one.model_copy(update={"cadence": one.cadence.model_copy(update={"checkpoint_samples": 20})})
    saver, due = saver_of(one), []
    for _ in range(6):
        advance(state)
        if saver.is_due(state.progress.samples):
            due.append(state.progress.samples)
            saver.save(state)
            saver.writer.wait()
    assert due == [24, 40], "at the first pulse at or after each 20 samples"


def test_a_superseded_attempt_writes_nothing(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    saver = saver_of(one, 1)
    file_io.write_bytes(file_io.join(get_attempts_dir(one.folder), "000002.json"), b"{}")
    saver.save(state)
    saver.writer.wait()
    assert saved_at(one) == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    saver = saver_of(one)
    saver.save(state)
    saver.writer.wait()
    advance(state)
    with torch.no_grad():
        next(state.model.parameters()).fill_(float("nan"))
    saver.save(state)
    saver.writer.wait()
    assert saved_at(one) == [0], "the good one stays; the next loss ends the run"


def test_productive_seconds_travel_with_the_checkpoint(tmp_path: Path, state: TrainState) -> None:
    one = job(tmp_path)
    saver = saver_of(one)
    time.sleep(0.05)
    saver.save(state)
    saver.writer.wait()
    found = checkpoints.load_newest(get_checkpoints_dir(one.folder)).state
    assert 0.05 <= found[PRODUCTIVE_SECONDS_KEY] < 10


def test_one_that_is_superseded_while_it_writes_removes_nothing(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = job(tmp_path, keep=1)
    folder = get_checkpoints_dir(one.folder)
    checkpoints.save(folder, {"samples": 4}, 4, 2)
    advance(state)
    save = checkpoints.save

    def slow(*arguments: Any) -> str:
        file_io.write_bytes(file_io.join(get_attempts_dir(one.folder), "000002.json"), b"{}")
        return save(*arguments)

    monkeypatch.setattr(checkpoints, "save", slow)
    saver = saver_of(one, 1)
    saver.save(state)
    saver.writer.wait()
    assert saved_at(one) == [8, 4], "what the later attempt saved is still there"


def test_what_is_void_does_not_count_as_kept(tmp_path: Path, state: TrainState) -> None:
    """After a damaged checkpoint at 24 the run resumed from 16; at 32 two good ones are to be kept."""
    one = job(tmp_path, keep=2)
    folder = get_checkpoints_dir(one.folder)
    for samples in (16, 24):
        checkpoints.save(folder, {"samples": samples}, samples, 1)
    Attempt(get_attempts_dir(one.folder), 2, time.time()).record_resume(16)
    for _ in range(4):
        advance(state)
    saver = saver_of(one, 2)
    saver.save(state)
    saver.writer.wait()
    assert saved_at(one) == [32, 24, 16]
    void = attempts.load_stale_checkpoint_check(one.folder)
    assert [place.samples for place in checkpoint_dir.list_checkpoints(folder) if void(place) is None] == [32, 16]


# ------------------------------------------------------------------ the weights that validated best are kept
AVERAGED, RAW = MONITORED_METRICS


@pytest.fixture
def one(tmp_path: Path) -> TrainJob:
    return TrainJob(
        recipe=recipe(), data="/nowhere", dataset_digest="0", folder=str(tmp_path), stop_flag=str(tmp_path / "stop")
    )


def best(of: TrainJob) -> BestCheckpoint:
    dog = Watchdog(of.cadence.limits, lambda cause, stacks: None)
    return BestCheckpoint(of, ("a", "b", "c"), attempts.create_attempt(of.folder, 1), dog)


def offer(to: BestCheckpoint, state: TrainState, **errors: float) -> None:
    state.progress = state.progress.advance()
    metrics = {f"validation/{name}_top1_error": value for name, value in errors.items()}
    to.on_epoch_end(cast(Any, SimpleNamespace(state=state)), metrics)
    to.writer.wait()


def kept(of: TrainJob) -> list[int]:
    return [place.samples for place in checkpoint_dir.list_checkpoints(get_best_weights_dir(of.folder))]


def test_only_the_best_is_kept(one: TrainJob, state: TrainState) -> None:
    keeper = best(one)
    offer(keeper, state)
    assert kept(one) == [], "an epoch that was not validated"
    offer(keeper, state, raw=30.0)
    with torch.no_grad():
        next(state.model.parameters()).fill_(0.5)
    offer(keeper, state, raw=20.0)
    offer(keeper, state, raw=25.0)
    assert kept(one) == [24]
    (place,) = checkpoint_dir.list_checkpoints(get_best_weights_dir(one.folder))
    assert commit.read_metadata(place.url)[RAW] == 20.0
    found = checkpoints.load_final_weights(place.url)
    assert torch.equal(next(iter(found.raw.values())), next(state.model.parameters()))


def test_averaged_weights_take_the_place_of_raw_ones_and_never_the_other_way(one: TrainJob, state: TrainState) -> None:
    keeper = best(one)
    offer(keeper, state, raw=10.0)
    offer(keeper, state, raw=9.0, averaged=12.0)
    offer(keeper, state, raw=1.0)
    assert kept(one) == [16]


def test_a_later_attempt_knows_what_is_kept(one: TrainJob, state: TrainState) -> None:
    offer(best(one), state, raw=10.0)
    again = best(one)
    offer(again, state, raw=11.0)
    assert kept(one) == [8]
    offer(again, state, raw=9.0)
    assert kept(one) == [24]


def test_a_failed_write_of_the_best_weights_is_only_a_warning(
    one: TrainJob, state: TrainState, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = Path(get_best_weights_dir(one.folder))
    obstacle.write_bytes(b"a file where the folder should be")
    keeper = best(one)
    offer(keeper, state, raw=10.0)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "the best weights were not saved" in caplog.text
    obstacle.unlink()
    offer(keeper, state, raw=10.0)
    assert kept(one) == [16], "the next epoch is stored as usual"


def test_a_run_keeps_its_best_epoch(small: Path, tmp_path: Path) -> None:
    done = runs.job(small, tmp_path, recipe())
    assert train(done).status == "finished"
    errors = {event.samples: event.values.get(AVERAGED, event.values[RAW]) for event in runs.events(done, "epoch")}
    averaged = {event.samples for event in runs.events(done, "epoch") if AVERAGED in event.values}
    (place,) = checkpoint_dir.list_checkpoints(get_best_weights_dir(done.folder))
    assert place.samples in averaged
    assert errors[place.samples] == min(errors[samples] for samples in averaged)  # type: ignore[type-var]
    assert file_io.exists(file_io.join(place.url, checkpoint_dir.EXPORT_FILE))


def test_an_epoch_that_could_not_be_kept_does_not_count(
    one: TrainJob, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = best(one)
    offer(keeper, state, raw=20.0)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoints, "save_final_weights", _full)
        offer(keeper, state, raw=10.0)
    offer(keeper, state, raw=15.0)
    assert kept(one) == [24], "better than what is there"


def _full(*_: object, **__: object) -> str:
    raise OSError("no space left")
