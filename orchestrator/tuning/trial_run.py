"""What an actor does for a trial: tells again what is known of it, then trains it, an epoch at a time.

Importable without torch or ray: `train` is handed in.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.training.config import LauncherContext, Outcome, OutcomeStatus
from orchestrator.tuning import trial_history
from orchestrator.tuning.stepwise_training import StepwiseTraining
from orchestrator.tuning.trial import EpochResult, MetricName, State

# The error of a trial that has none: schedulers compare numbers, and no error is larger.
WORST_ERROR = 100.0

_STATE_BY_STATUS: dict[OutcomeStatus, State] = {
    "finished": "finished",
    "stopped": "stopped",
    "diverged": "diverged",
    "bad-data": "failed",
    "bad-checkpoint": "failed",
    "refused": "failed",
}


class TrialTask(Config):
    """One trial for the actor that trains it; travels as JSON."""

    number: int = Field(ge=1)
    spec: RunSpec
    metric: MetricName
    stop_flag: str
    successor: str
    gpus: float = Field(ge=0, description="of each worker")
    ended: bool = Field(False, description="how it ended stands: it is told again and not trained")


class TrialReport(Config):
    """What a step of a trial tells the scheduler."""

    number: int
    epoch: int = Field(ge=0, description="the clock: from the run, so it never goes back when a trial is begun again")
    values: dict[str, float] = Field({}, description="of the epoch")
    seconds: float = Field(0.0, description="of training so far")
    samples: int = Field(0, ge=0, description="seen so far")
    again: bool = Field(False, description="known before this actor began")
    score: float | None = Field(None, description="error in percent; None when the epoch was not validated")
    state: State = "running"
    reason: str = ""


TrainFunction = Callable[[TrialTask, LauncherContext], Outcome]


class TrialRun:
    """One trial in this process."""

    def __init__(self, task: TrialTask, train: TrainFunction) -> None:
        """train: trains the trial's run, or what is left of it."""
        self._task = task
        known = trial_history.read_epochs(task.spec.folder)
        self._known_epochs = deque(known)
        self._last_epoch = known[-1] if known else EpochResult(0, {}, 0.0)
        task.spec.save()
        self._training = StepwiseTraining(lambda context: train(task, context))

    def step(self) -> TrialReport:
        """The next epoch, or the end; after the end it is not called again. Raises what training raised."""
        if self._known_epochs:
            epoch = self._known_epochs.popleft()
            if self._task.ended and not self._known_epochs:
                return self._make_report(epoch, again=True, state="finished")  # the ledger knows better
            return self._make_report(epoch, again=True)
        while True:
            told = self._training.next_epoch()
            if isinstance(told, Outcome):
                return self._report_end(told)
            if int(told["epoch"]) <= self._last_epoch.epoch:
                continue  # trained again after a restart, and told before
            values = {name: float(value) for name, value in told.items() if name not in ("epoch", "samples")}
            self._last_epoch = trial_history.build_next_epoch(
                self._last_epoch, int(told["epoch"]), values, int(told["samples"])
            )
            if self._last_epoch.epoch < self._task.spec.recipe.epochs:
                return self._make_report(self._last_epoch)
            ended = self._training.next_epoch()  # it writes its final weights
            assert isinstance(ended, Outcome)
            return self._report_end(ended)

    def close(self) -> None:
        """Have it save where it is."""
        self._training.close()

    def _report_end(self, outcome: Outcome) -> TrialReport:
        return self._make_report(self._last_epoch, state=_STATE_BY_STATUS[outcome.status], reason=outcome.message)

    def _make_report(
        self, epoch: EpochResult, again: bool = False, state: State = "running", reason: str = ""
    ) -> TrialReport:
        score = WORST_ERROR if state in ("diverged", "failed") else epoch.get_score(self._task.metric)
        if score is not None and not math.isfinite(score):
            score = WORST_ERROR
        return TrialReport(
            number=self._task.number,
            epoch=epoch.epoch,
            values={name: value for name, value in epoch.values.items() if math.isfinite(value)},
            seconds=epoch.seconds,
            samples=epoch.samples,
            again=again,
            score=score,
            state=state,
            reason=reason,
        )


def decode_task(text: str) -> TrialTask:
    """The task that travelled as JSON."""
    return TrialTask.from_dict(json.loads(text))
