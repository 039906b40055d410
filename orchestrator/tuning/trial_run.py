"""A trial in its actor: it repeats the epochs that are known, then trains, one epoch at a time.

Importable without torch or ray: the training function is an argument.
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
from orchestrator.tuning.trial import EpochResult, Metric, State

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
    metric: Metric
    stop_flag: str
    successor: str
    gpus: float = Field(ge=0, description="of each worker")
    ended: bool = Field(False, description="its end is final: its epochs are repeated, and nothing is trained")


class TrialReport(Config):
    """An epoch, or the end, of a trial."""

    number: int
    epoch: int = Field(ge=0, description="the clock: the run's, so it never decreases when a trial resumes")
    values: dict[str, float] = Field({}, description="of the epoch")
    seconds: float = Field(0.0, description="of training so far")
    samples: int = Field(0, ge=0, description="seen so far")
    again: bool = Field(False, description="known before this actor began")
    score: float | None = Field(None, description="less is better, for schedulers; None when not validated")
    state: State = "running"
    reason: str = ""


TrainFunction = Callable[[TrialTask, LauncherContext], Outcome]


class TrialRun:
    """One trial in this process."""

    def __init__(self, task: TrialTask, train: TrainFunction) -> None:
        """Prepare a trial; `train` trains its run, or what is left of it."""
        self._task = task
        known = trial_history.read_epochs(task.spec.folder)
        self._known_epochs = deque(known)
        self._last_epoch = known[-1] if known else EpochResult(0, {}, 0.0)
        task.spec.save()
        self._training = StepwiseTraining(lambda context: train(task, context))

    def step(self) -> TrialReport:
        """Return the next epoch, or the end, after which this is not called again. Raises what training raised."""
        if self._known_epochs:
            epoch = self._known_epochs.popleft()
            # Of a trial that ended, storage has the true state.
            is_end = self._task.ended and not self._known_epochs
            return self._make_report(epoch, again=True, state="finished" if is_end else "running")
        while True:
            result = self._training.next_epoch()
            if isinstance(result, Outcome):
                return self._report_end(result)
            if int(result["epoch"]) <= self._last_epoch.epoch:
                continue  # trained again after a restart, and reported before
            values = {name: float(value) for name, value in result.items() if name not in ("epoch", "samples")}
            self._last_epoch = trial_history.build_next_epoch(
                self._last_epoch, int(result["epoch"]), values, int(result["samples"])
            )
            if self._last_epoch.epoch < self._task.spec.recipe.epochs:
                return self._make_report(self._last_epoch)
            outcome = self._training.next_epoch()  # it writes its final weights
            assert isinstance(outcome, Outcome)
            return self._report_end(outcome)

    def close(self) -> None:
        """Have the training save and end."""
        self._training.close()

    def _report_end(self, outcome: Outcome) -> TrialReport:
        return self._make_report(self._last_epoch, state=_STATE_BY_STATUS[outcome.status], reason=outcome.message)

    def _make_report(
        self, epoch: EpochResult, again: bool = False, state: State = "running", reason: str = ""
    ) -> TrialReport:
        metric = self._task.metric
        score = epoch.get_score(metric)
        loss = None if score is None else metric.to_loss(score)
        if state in ("diverged", "failed") or (loss is not None and not math.isfinite(loss)):
            loss = metric.worst_loss  # schedulers compare numbers
        return TrialReport(
            number=self._task.number,
            epoch=epoch.epoch,
            values={name: value for name, value in epoch.values.items() if math.isfinite(value)},
            seconds=epoch.seconds,
            samples=epoch.samples,
            again=again,
            score=loss,
            state=state,
            reason=reason,
        )


def decode_task(text: str) -> TrialTask:
    """Return the task that travelled as JSON."""
    return TrialTask.from_dict(json.loads(text))
