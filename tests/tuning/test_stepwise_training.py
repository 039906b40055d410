"""Training in steps: each epoch is asked for, and whatever happens in the thread comes out of `next`."""

import threading

import pytest

from orchestrator.training.config import LauncherContext, Outcome
from orchestrator.tuning.stepwise_training import StepwiseTraining


class Training:
    """Epochs up to a last one; goes on where it was, as a run does from its checkpoint."""

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


def test_no_epoch_is_trained_before_it_is_asked_for() -> None:
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


def test_an_error_of_the_training_is_raised_to_who_asks() -> None:
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
    assert training.begun == 2, "it had saved and ended, and went on from there"
