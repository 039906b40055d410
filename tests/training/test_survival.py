"""Runs survive notices, stop requests, successors, late writers, hangs; the result is that of an undisturbed run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from orchestrator.checkpoint import checkpoint as checkpoints
from orchestrator.data.dataloader import Batch
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.callbacks import watchdog
from orchestrator.training.config import TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.rank_sync import StepSums
from orchestrator.training.run_dir import get_attempts_dir, get_checkpoints_dir, get_final_weights_dir
from orchestrator.training.train_step import TrainStep
from tests.support import runs
from tests.support.ranks import Ranks
from tests.support.runs import RecordingContext, ask_to_stop, events, final, identical, job, recipe, stop_asking, train


def test_a_notice_is_answered_with_one_checkpoint(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe())
    saved: list[list[int]] = []

    class Notices(RecordingContext):
        def has_preemption_notice(self) -> bool:
            saved.append(runs.saved_at(one))
            return 3 <= len(saved) < 9 or len(saved) >= 12

    assert train(one, context=Notices()).status == "finished"
    samples = [event.samples for event in events(one, "preempted")]
    assert samples == [3 * 8, 12 * 8], "once for each notice"
    assert next(at[0] for at in saved if at) == 24
    assert saved[-1] == [96, 24]


def test_a_stop_without_saving(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe())
    file_io.write_bytes(one.stop_flag, b'{"save": false}')
    assert train(one).status == "stopped"
    assert runs.saved_at(one) == []


@pytest.mark.parametrize("how", ["attempt", "driver"])
def test_one_that_was_taken_over_ends_and_writes_nothing_that_counts(
    small: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "FENCE_SECONDS", 0.002)
    one = job(small, tmp_path, recipe(epochs=200), checkpoint_seconds=0.001)
    one = one.model_copy(update={"successor": str(tmp_path / "000002.json")})
    before: list[int] = []

    class TakenOver(RecordingContext):
        def report(self, metrics: dict[str, float]) -> None:
            if metrics["epoch"] == 2:
                if how == "driver":
                    file_io.write_bytes(one.successor, b"")
                attempts.create_attempt(one.folder, 1)
                before.extend(runs.saved_at(one))

    outcome = train(one, context=TakenOver())
    assert outcome.status == "stopped"
    assert "took this run over" in outcome.message
    assert not file_io.exists(get_final_weights_dir(one.folder))
    assert not file_io.exists(file_io.join(one.folder, "outcome.json"))
    # One write may have been under way.
    assert len(set(runs.saved_at(one)) - set(before)) <= 1


def test_workers_of_a_driver_that_lost_its_run_do_not_begin(small: Path, tmp_path: Path) -> None:
    one = job(small, tmp_path, recipe()).model_copy(update={"successor": str(tmp_path / "000002.json")})
    file_io.write_bytes(one.successor, b"")
    assert train(one).status == "stopped"
    assert file_io.list_names(get_attempts_dir(one.folder)) == [], "nor do they fence the new driver's"


def test_a_late_checkpoint_of_an_earlier_attempt_does_not_count(small: Path, tmp_path: Path, whole: TrainJob) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=4)
    ask_to_stop(one)
    train(one)
    folder = get_checkpoints_dir(one.folder)
    state = checkpoints.load_newest(folder).state
    train(one)
    # Attempt 1 comes back from a partition and writes what it trained meanwhile: another course of events.
    state["samples"] = 72
    for tensor in state["model"].values():
        tensor.add_(torch.ones_like(tensor))
    checkpoints.save(folder, state, 72, 1)
    stop_asking(one)
    assert train(one).status == "finished"
    assert events(one, "started")[-1].samples == 6 * 8
    assert identical(final(one), final(whole))
    (incident,) = events(one, "incident")
    assert "void" in str(incident.values["checkpoints_passed_over"])


_HANGS = """
import json, sys, time
from orchestrator.training import trainer
from orchestrator.training.config import TrainJob
from tests.support.runs import ALONE, RecordingContext

class Context(RecordingContext):
    def report(self, metrics):
        if metrics["epoch"] == 2:
            time.sleep(600)

trainer.run_training(TrainJob.from_dict(json.load(sys.stdin)), ALONE, Context())
"""


@pytest.mark.essential
@pytest.mark.process
def test_a_hang_is_ended_and_named_and_costs_no_more_than_the_replay(
    small: Path, tmp_path: Path, whole: TrainJob
) -> None:
    one = job(small, tmp_path, recipe(), checkpoint_samples=16, limits={"step_seconds": 1.0, "step_times": 2.0})
    hung = subprocess.run(
        [sys.executable, "-c", _HANGS], input=one.to_json(), text=True, check=False, cwd=os.getcwd(), timeout=120
    )
    assert hung.returncode == watchdog.EXIT_STATUS
    assert train(one.model_copy(update={"cadence": whole.cadence})).status == "finished"
    (incident,) = events(one, "incident")
    assert "rank 0: no end of the phase 'step'" in str(incident.values["cause"])
    replayed = incident.values["samples_replayed"]
    assert isinstance(replayed, int)
    assert replayed <= 16
    stacks = Path(one.folder, "tracebacks", "attempt-000001-rank-00000-stacks.txt")
    assert "in report" in stacks.read_text()
    assert identical(final(one), final(whole))
    share = events(one, "epoch")[-1].values["train/goodput"]
    assert isinstance(share, float)
    assert 0 < share < 1


def test_lost_storage_of_attempts_costs_a_number_and_nothing_else(small: Path, tmp_path: Path, whole: TrainJob) -> None:
    one = job(small, tmp_path, recipe(), pulse_steps=4)
    ask_to_stop(one)
    train(one)
    stop_asking(one)
    shutil.rmtree(get_attempts_dir(one.folder))
    assert train(one).status == "finished"
    assert identical(final(one), final(whole))


@pytest.mark.process
def test_all_ranks_hear_of_a_notice_that_one_was_given(small: Path, tmp_path: Path, ranks: Ranks) -> None:
    one = job(small, tmp_path, recipe(epochs=1))
    found = ranks.run(_with_a_notice_on_rank_1, 2, one.to_dict())
    assert found == ["finished", "finished"]
    assert len(events(one, "preempted")) == 1


def _with_a_notice_on_rank_1(rank: int, workers: int, payload: dict[str, object]) -> str:
    world = DistributedContext(rank, workers, runs.CPU)
    return train(TrainJob.from_dict(payload), world, RecordingContext(notice=rank == 1)).status


def test_weights_that_end_as_no_numbers_are_diverged(small: Path, tmp_path: Path) -> None:
    """The last update's doing: every loss was finite."""
    one = job(small, tmp_path, recipe(epochs=1))
    step = TrainStep.__call__

    def poisoned(self: TrainStep, batch: Batch) -> StepSums:
        sums = step(self, batch)
        if self._state.progress.epoch == 1:
            with torch.no_grad():
                next(self._state.model.parameters()).fill_(float("nan"))
        return sums

    with patch.object(TrainStep, "__call__", poisoned):
        outcome = train(one)
    assert outcome.status == "diverged"
    assert "a weight, is not finite" in outcome.message
    assert not file_io.exists(get_final_weights_dir(one.folder))
