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
from orchestrator.launch.config import RunSpec
from orchestrator.training.job import Context, Outcome, Status
from orchestrator.tuning import history
from orchestrator.tuning.stepping import Steps
from orchestrator.tuning.trials import Epoch, Metric, State

# The error of a trial that has none: schedulers compare numbers, and no error is larger.
WORST = 100.0

_STATES: dict[Status, State] = {
    "finished": "finished",
    "stopped": "stopped",
    "diverged": "diverged",
    "bad-data": "failed",
    "bad-checkpoint": "failed",
    "refused": "failed",
}


class Fork(Config):
    """A checkpoint that a trial begins from, instead of training its first epochs again."""

    folder: str = Field(description="URL of the folder of the run that has it")
    samples: int = Field(ge=1)


class TrialTask(Config):
    """One trial for the actor that trains it; travels as JSON."""

    number: int = Field(ge=1)
    spec: RunSpec
    metric: Metric
    stop_flag: str
    successor: str
    gpus: float = Field(ge=0, description="of each worker")
    ended: bool = Field(False, description="how it ended stands: it is told again and not trained")
    fork: Fork | None = None


class Report(Config):
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


Train = Callable[[TrialTask, Context], Outcome]


class TrialRun:
    """One trial in this process."""

    def __init__(self, task: TrialTask, train: Train) -> None:
        """train: trains the trial's run, or what is left of it."""
        self._task = task
        known = history.read(task.spec.folder)
        self._known = deque(known)
        self._last = known[-1] if known else Epoch(0, {}, 0.0)
        task.spec.keep()
        self._steps = Steps(lambda context: train(task, context))

    def step(self) -> Report:
        """The next epoch, or the end; after the end it is not called again. Raises what training raised."""
        if self._known:
            epoch = self._known.popleft()
            if self._task.ended and not self._known:
                return self._report(epoch, again=True, state="finished")  # the ledger knows better
            return self._report(epoch, again=True)
        while True:
            told = self._steps.next()
            if isinstance(told, Outcome):
                return self._ended(told)
            if int(told["epoch"]) <= self._last.epoch:
                continue  # trained again after a restart, and told before
            values = {name: float(value) for name, value in told.items() if name not in ("epoch", "samples")}
            self._last = history.following(self._last, int(told["epoch"]), values, int(told["samples"]))
            if self._last.epoch < self._task.spec.recipe.epochs:
                return self._report(self._last)
            ended = self._steps.next()  # it writes its final weights
            assert isinstance(ended, Outcome)
            return self._ended(ended)

    def close(self) -> None:
        """Have it save where it is."""
        self._steps.close()

    def _ended(self, outcome: Outcome) -> Report:
        return self._report(self._last, state=_STATES[outcome.status], reason=outcome.message)

    def _report(self, epoch: Epoch, again: bool = False, state: State = "running", reason: str = "") -> Report:
        score = WORST if state in ("diverged", "failed") else epoch.score(self._task.metric)
        if score is not None and not math.isfinite(score):
            score = WORST
        return Report(
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


def decode(text: str) -> TrialTask:
    """The task that travelled as JSON."""
    return TrialTask.from_dict(json.loads(text))
