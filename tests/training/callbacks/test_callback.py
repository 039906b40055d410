"""Callbacks of the user's: when they are called, what they may add, and how their errors are reported."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestrator.storage import file_io
from orchestrator.training.callbacks.callback import Callback, CallbackError
from orchestrator.training.config import CallbackPlugin, Execution, Outcome, TrainJob
from orchestrator.training.rank_sync import SyncResult
from orchestrator.training.run_dir import get_outcome_path
from orchestrator.training.trainer import Trainer
from tests.support.runs import events, job, recipe, train


class Recording(Callback):
    """Records the calls of its hooks, adds a metric, and raises in the hook `fail_in`."""

    calls: ClassVar[list[str]] = []

    def __init__(self, fail_in: str = "") -> None:
        self.fail_in = fail_in
        self.calls.clear()

    def record(self, call: str, hook: str) -> None:
        self.calls.append(call)
        if hook == self.fail_in:
            raise ValueError("two\nlines")

    def on_start(self, trainer: Trainer) -> None:
        self.record(f"start {trainer.state.progress.samples}", "on_start")

    def on_step_end(self, trainer: Trainer) -> None:
        self.record(f"step {trainer.state.progress.samples}", "on_step_end")

    def on_sync(self, trainer: Trainer, sync: SyncResult) -> None:
        self.record(f"sync {sync.sums.samples:g}", "on_sync")

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        metrics["own/epochs"] = metrics["train/epoch"]
        self.record(f"epoch {trainer.state.progress.epoch}", "on_epoch_end")

    def on_checkpoint(self, trainer: Trainer) -> None:
        self.record(f"checkpoint {trainer.state.progress.samples}", "on_checkpoint")

    def on_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        written = file_io.exists(get_outcome_path(trainer.job.folder))
        self.record(f"end {None if outcome is None else outcome.status} {written}", "on_end")


class NoCallback:
    """Has no hooks."""


def with_callback(data: Path, folder: Path, kind: str = "Recording", **args: Any) -> TrainJob:
    """A run of six steps with a callback of this module."""
    plugin = CallbackPlugin(kind=f"{__name__}:{kind}", args=args)
    one = job(data, folder, recipe(epochs=1), pulse_steps=3, checkpoint_samples=24)
    return one.model_copy(update={"execution": Execution(callbacks=(plugin,))})


def test_hooks_are_called_in_order_and_may_add_metrics(small: Path, tmp_path: Path) -> None:
    one = with_callback(small, tmp_path)
    assert train(one).metrics["own/epochs"] == 1.0
    assert events(one, "epoch")[0].values["own/epochs"] == 1.0, "what a callback adds is recorded"
    steps = [f"step {8 * number}" for number in range(1, 7)]
    assert Recording.calls == [
        "start 0", *steps[:3], "checkpoint 24", "sync 24", *steps[3:], "checkpoint 48", "sync 48", "epoch 1",
        "end finished True",
    ]  # fmt: skip


@pytest.mark.parametrize("hook", ["on_start", "on_step_end", "on_sync", "on_epoch_end", "on_checkpoint"])
def test_an_error_of_a_callback_is_one_line_with_its_name_and_file(small: Path, tmp_path: Path, hook: str) -> None:
    one = with_callback(small, tmp_path, fail_in=hook)
    with pytest.raises(CallbackError) as raised:
        train(one)
    failed = rf"callback {__name__}:Recording failed in {hook} at {__file__}:\d+: ValueError: two lines"
    assert re.fullmatch(failed, str(raised.value))
    assert Recording.calls[-1] == "end None False"
    assert "failed in" in str(events(one, "crashed")[0].values["cause"])


def test_an_error_at_the_end_only_costs_a_warning(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(with_callback(small, tmp_path, fail_in="on_end")).status == "finished"
    assert "failed in on_end at" in caplog.text


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("Missing", {}, "no attribute 'Missing'"),
        ("Recording", {"wrong": 1}, "wrong"),
        ("NoCallback", {}, "must be a Callback, got NoCallback"),
    ],
)
def test_a_callback_that_cannot_be_made_ends_the_run_before_its_first_step(
    small: Path, tmp_path: Path, kind: str, args: dict[str, int], message: str
) -> None:
    outcome = train(with_callback(small, tmp_path, kind, **args))
    assert outcome.status == "refused"
    assert message in outcome.message
