"""A trial in its actor: it repeats known epochs, then trains; every end has a name."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ray_backend import ray_trainer
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.storage import file_io
from orchestrator.training.config import LauncherContext, Outcome, OutcomeStatus
from orchestrator.tuning import trial_run
from orchestrator.tuning.trial import Metric, TrialReport, TrialTask
from orchestrator.tuning.trial_run import StepwiseTraining, TrialRun
from tests.support.launched import recipe, spec, write_journal
from tests.support.runs import RecordingContext

METRIC = Metric(name="top1_error")


def task(folder: Path, **fields: Any) -> TrialTask:
    return TrialTask(
        number=3,
        spec=spec(recipe(epochs=3), str(folder)),
        metric=METRIC,
        stop_flag=str(folder / "stop"),
        successor=str(folder / "successor"),
        gpus=0.0,
        **fields,
    )


def make_values(number: int, error: float) -> dict[str, float]:
    return {"train/epoch": float(number), "train/images_per_second": 10.0, "validation/raw_top1_error": error}


def training(errors: dict[int, float], status: OutcomeStatus = "finished", message: str = "") -> Any:
    """Trains epochs with these errors, then ends so."""

    def train(task: TrialTask, context: LauncherContext) -> Outcome:
        for number, error in errors.items():
            context.report({"epoch": number, "samples": 20 * number, **make_values(number, error)})
            if number < 3 and not context.should_continue():
                return Outcome(status="stopped", samples=20 * number)
        return Outcome(status=status, message=message)

    return train


def journal(one: TrialTask, *errors: float) -> None:
    write_journal(
        one.spec.folder, 1, [("epoch", 20 * at, make_values(at, error)) for at, error in enumerate(errors, 1)]
    )


def brief(report: TrialReport) -> tuple[int, float | None, str]:
    return report.epoch, report.score, report.state


def test_epochs_then_the_end_with_the_last(tmp_path: Path) -> None:
    run = TrialRun(task(tmp_path), training({1: 60.0, 2: 50.0, 3: 40.0}))
    reports = [run.step() for _ in range(3)]
    assert [brief(one) for one in reports] == [
        (1, 60.0, "running"),
        (2, 50.0, "running"),
        (3, 40.0, "finished"),
    ]
    assert [one.seconds for one in reports] == [2.0, 4.0, 6.0]
    assert {one.number for one in reports} == {3}
    assert (Path(task(tmp_path).spec.folder) / "spec.json").exists(), "other jobs find the run"


def test_known_epochs_are_repeated_and_trained_ones_reported_once(tmp_path: Path) -> None:
    one = task(tmp_path)
    journal(one, 60.0, 50.0)
    # Its checkpoint was older than its last report: the second epoch is trained again.
    run = TrialRun(one, training({2: 51.0, 3: 40.0}))
    assert [brief(run.step()) for _ in range(3)] == [
        (1, 60.0, "running"),
        (2, 50.0, "running"),
        (3, 40.0, "finished"),
    ]


def test_a_trial_that_ended_is_repeated_and_not_trained(tmp_path: Path) -> None:
    one = task(tmp_path, ended=True)
    journal(one, 60.0, 50.0)

    def never(task: TrialTask, context: LauncherContext) -> Outcome:
        raise AssertionError("trained")

    run = TrialRun(one, never)
    first, last = run.step(), run.step()
    assert (first.state, last.state) == ("running", "finished")
    assert (first.epoch, last.epoch) == (1, 2)


def test_a_trial_that_finished_unrecorded_reports_its_end(tmp_path: Path) -> None:
    one = task(tmp_path)
    journal(one, 60.0, 50.0, 40.0)
    run = TrialRun(one, training({}))
    assert [brief(run.step()) for _ in range(4)][2:] == [(3, 40.0, "running"), (3, 40.0, "finished")]


@pytest.mark.parametrize(
    ("status", "state", "score"),
    [
        ("diverged", "diverged", METRIC.worst_loss),
        ("bad-data", "failed", METRIC.worst_loss),
        ("bad-checkpoint", "failed", METRIC.worst_loss),
        ("refused", "failed", METRIC.worst_loss),
        ("stopped", "stopped", 60.0),
    ],
)
def test_every_end_has_a_name(tmp_path: Path, status: OutcomeStatus, state: str, score: float) -> None:
    run = TrialRun(task(tmp_path), training({1: 60.0}, status, "why"))
    run.step()
    last = run.step()
    assert (last.epoch, last.score, last.state, last.reason) == (1, score, state, "why")


def test_a_non_finite_score_is_the_worst(tmp_path: Path) -> None:
    assert TrialRun(task(tmp_path), training({1: float("nan")})).step().score == METRIC.worst_loss


def test_an_epoch_that_was_not_validated_has_no_score(tmp_path: Path) -> None:
    def train(task: TrialTask, context: LauncherContext) -> Outcome:
        context.report({"epoch": 1, "samples": 20, "train/images_per_second": 10.0})
        return Outcome(status="finished")

    assert TrialRun(task(tmp_path), train).step().score is None


def test_a_crash_is_raised_so_that_tune_retries(tmp_path: Path) -> None:
    def train(task: TrialTask, context: LauncherContext) -> Outcome:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        TrialRun(task(tmp_path), train).step()


def test_a_task_travels_as_text(tmp_path: Path) -> None:
    one = task(tmp_path, ended=True)
    assert TrialTask.from_dict(json.loads(one.to_json())) == one


def test_a_report_travels_as_text() -> None:
    one = TrialReport(number=1, epoch=2, values={"a": 0.5}, seconds=1.5, score=3.0, state="diverged", reason="why")
    assert TrialReport.from_dict(one.to_dict()) == one


def test_a_metric_to_maximize_is_reported_as_a_loss(tmp_path: Path) -> None:
    def train(task: TrialTask, context: LauncherContext) -> Outcome:
        context.report({"epoch": 1, "samples": 20, "validation/raw_accuracy": 0.75})
        context.report({"epoch": 2, "samples": 40, "validation/raw_accuracy": float("nan")})
        return Outcome(status="finished")

    metric = Metric(name="accuracy", maximize=True)
    run = TrialRun(task(tmp_path).model_copy(update={"metric": metric}), train)
    assert [run.step().score, run.step().score] == [-0.75, metric.worst_loss]


# ------------------------------------------------------------------ training in steps
class Training:
    """Epochs up to a last one; resumes where it was, as a run does from its checkpoint."""

    def __init__(self, epochs: int, error: Exception | None = None) -> None:
        self.epochs, self.done, self.begun, self.error = epochs, 0, 0, error

    def __call__(self, context: LauncherContext) -> Outcome:
        self.begun += 1
        while self.done < self.epochs:
            self.done += 1
            context.report({"epoch": self.done, "samples": 10 * self.done})
            if self.error is not None:
                raise self.error
            if self.done < self.epochs and not context.should_continue():
                return Outcome(status="stopped", samples=10 * self.done)
        return Outcome(status="finished", samples=10 * self.done)


def test_no_epoch_is_trained_before_it_is_requested() -> None:
    training = Training(3)
    steps = StepwiseTraining(training)
    assert training.begun == 0
    assert steps.next_epoch() == {"epoch": 1, "samples": 10}
    assert training.done == 1
    assert steps.next_epoch() == {"epoch": 2, "samples": 20}
    assert steps.next_epoch() == {"epoch": 3, "samples": 30}
    assert steps.next_epoch() == Outcome(status="finished", samples=30)


def test_a_closed_training_saves_and_resumes_on_request() -> None:
    training = Training(3)
    steps = StepwiseTraining(training)
    steps.next_epoch()
    steps.close()
    steps.close()
    assert training.done == 1
    assert steps.next_epoch() == {"epoch": 2, "samples": 20}
    assert training.begun == 2


def test_closing_before_the_first_epoch_trains_nothing() -> None:
    training = Training(3)
    StepwiseTraining(training).close()
    assert training.begun == 0


def test_an_error_of_the_training_is_raised_to_the_caller() -> None:
    steps = StepwiseTraining(Training(3, OSError("no space")))
    steps.next_epoch()
    with pytest.raises(OSError, match="no space"):
        steps.next_epoch()


def test_closing_raises_no_error_of_the_training() -> None:
    training = Training(3, OSError("no space"))
    steps = StepwiseTraining(training)
    steps.next_epoch()
    steps.close()
    assert training.done == 1


def test_a_training_without_requests_saves_and_resumes_on_the_next() -> None:
    training = Training(3)
    steps = StepwiseTraining(training, timeout_seconds=0.01)
    steps.next_epoch()
    for thread in threading.enumerate():
        if thread.name == "training":
            thread.join(5)
    assert training.begun == 1
    assert steps.next_epoch() == {"epoch": 2, "samples": 20}
    assert training.begun == 2, "it had saved and ended, and resumed from there"


# ------------------------------------------------------------------ workers in other processes
def test_a_flag_that_an_earlier_launch_left_stops_no_later_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[str] = []

    def launch(launched: RunSpec, stop_flag: str, successor: str, gpus: float) -> Outcome:
        assert not file_io.exists(stop_flag)
        file_io.write_bytes(stop_flag, b"")  # and is killed: nothing removes it
        flags.append(stop_flag)
        return Outcome(status="stopped")

    monkeypatch.setattr(ray_trainer, "launch_run", launch)
    monkeypatch.setattr(trial_run, "_relay_epochs", lambda *_: None)
    monkeypatch.setattr(threading, "get_native_id", lambda: 7)  # the kernel gives a thread's number again
    two = spec(storage=str(tmp_path), workers=2)
    flag, successor = str(tmp_path / "stop"), str(tmp_path / "next")
    one = TrialTask(number=1, spec=two, metric=METRIC, stop_flag=flag, successor=successor, gpus=0)
    for _ in range(2):
        trial_run.train_trial(one, RecordingContext())
    assert len(set(flags)) == 2
