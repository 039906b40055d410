"""The stop flags of trials whose workers are other processes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.ray_backend import ray_trainer
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.storage import file_io
from orchestrator.training.config import Outcome
from orchestrator.tuning import trial_training
from orchestrator.tuning.trial import Metric
from orchestrator.tuning.trial_run import TrialTask
from tests.support import launched
from tests.support.runs import RecordingContext


def test_a_flag_that_an_earlier_launch_left_stops_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[str] = []

    def launch(spec: RunSpec, stop_flag: str, successor: str, gpus: float) -> Outcome:
        assert not file_io.exists(stop_flag)
        file_io.write_bytes(stop_flag, b"")  # and is killed: nothing removes it
        flags.append(stop_flag)
        return Outcome(status="stopped")

    @contextmanager
    def relay(*_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(ray_trainer, "launch_run", launch)
    monkeypatch.setattr(trial_training, "_relay_epochs", relay)
    monkeypatch.setattr(threading, "get_native_id", lambda: 7)  # the kernel gives a thread's number again
    spec = launched.spec(storage=str(tmp_path), workers=2)
    flag, successor = str(tmp_path / "stop"), str(tmp_path / "next")
    task = TrialTask(number=1, spec=spec, metric=Metric(name="top1_error"), stop_flag=flag, successor=successor, gpus=0)
    for _ in range(2):
        trial_training.train_trial(task, RecordingContext())
    assert len(set(flags)) == 2
