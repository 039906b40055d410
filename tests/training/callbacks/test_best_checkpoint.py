"""The weights that validated best are kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from orchestrator.checkpoint import checkpoint, checkpoint_dir
from orchestrator.storage import commit, file_io
from orchestrator.training import attempts
from orchestrator.training import train_state as states
from orchestrator.training.callbacks.checkpointer import MONITORED_METRICS, BestCheckpoint
from orchestrator.training.callbacks.watchdog import Watchdog
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_best_weights_dir
from orchestrator.training.train_state import TrainState
from tests.support import runs
from tests.support.runs import CPU, job, recipe, train

AVERAGED, RAW = MONITORED_METRICS


@pytest.fixture
def one(tmp_path: Path) -> TrainJob:
    return TrainJob(
        recipe=recipe(), data="/nowhere", dataset_digest="0", folder=str(tmp_path), stop_flag=str(tmp_path / "stop")
    )


@pytest.fixture
def state() -> TrainState:
    return states.create_initial_state(recipe(), 3, 6, CPU)


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
    found = checkpoint.load_final_weights(place.url)
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


def test_what_cannot_be_written_costs_the_run_nothing(one: TrainJob, state: TrainState) -> None:
    Path(one.folder, "best").write_bytes(b"a file where the folder should be")
    offer(best(one), state, raw=10.0)


def test_a_run_keeps_its_best_epoch(small: Path, tmp_path: Path) -> None:
    done = job(small, tmp_path, recipe())
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
        broken.setattr(checkpoint, "save_final_weights", _full)
        offer(keeper, state, raw=10.0)
    offer(keeper, state, raw=15.0)
    assert kept(one) == [24], "better than what is there"


def _full(*_: object, **__: object) -> str:
    raise OSError("no space left")
