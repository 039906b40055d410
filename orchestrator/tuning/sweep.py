"""The state of a sweep: which trial comes next, what each has reported, when the sweep is over. Free of Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.plugin_code import pin_code
from orchestrator.tuning.config import BudgetConfig
from orchestrator.tuning.samplers import Sampler
from orchestrator.tuning.space import build_recipe
from orchestrator.tuning.trial import EpochResult, Metric, State, Trial
from orchestrator.tuning.trial_run import TrialReport, TrialTask
from orchestrator.tuning.trial_store import StoredTrial, TrialEnd, TrialRecord, TrialStore, sort_for_resume

# A trial that waits for a place keeps the process of one that ends: else Tune would stop it.
STAGED_TRIALS = 1


@dataclass(frozen=True)
class StopDecision:
    """The sweep's answer to a report: whether the trial ends, and whether the scheduler may judge it."""

    should_stop: bool = False
    ask_scheduler: bool = True


@dataclass(frozen=True)
class SweepContext:
    """The settings and surroundings of a sweep. Its callbacks are called from one thread."""

    base: Recipe
    metric: Metric
    budget: BudgetConfig
    make_spec: Callable[[Recipe], RunSpec]
    stop_flag: str
    successor: str
    gpus: float  # of each worker
    count_slots: Callable[[], int]  # trials that fit on the cluster now
    is_stop_requested: Callable[[], bool]  # by a person
    on_trial_added: Callable[[RunSpec], None]  # a new trial, or one of an earlier driver
    on_trial_changed: Callable[[Trial, RunSpec], None]  # it began, reported or ended


class Sweep:
    """The sweep as `ray_tune.run_tuner` sees it. All but `trials` is called from one thread."""

    def __init__(
        self, context: SweepContext, store: TrialStore, entries: Sequence[StoredTrial], sampler: Sampler
    ) -> None:
        """Continue from `entries`, the trials of earlier drivers."""
        self._context, self._store, self._sampler = context, store, sampler
        self._lock = threading.Lock()
        self._records = {entry.record.number: entry.record for entry in entries}
        self._trials = {entry.record.number: entry.trial for entry in entries}
        self._resumable = [
            entry for entry in sort_for_resume(entries) if not entry.trial.is_terminal or entry.trial.epochs
        ]
        self._exhausted = False
        self._active_numbers: set[int] = set()  # handed to Tune, and not over
        self._last_reports: dict[int, TrialReport] = {}
        self._start_time = time.monotonic()
        self._stop_reason = ""
        self.new_epochs = 0  # trained by this driver
        for entry in entries:
            spec = context.make_spec(entry.record.recipe)
            context.on_trial_added(spec)
            context.on_trial_changed(entry.trial, spec)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials so far, by number; from any thread."""
        with self._lock:
            return tuple(self._trials[number] for number in sorted(self._trials))

    @property
    def stop_reason(self) -> str:
        """Why the sweep ended before all its trials did; empty otherwise."""
        return self._stop_reason

    def next_task(self) -> TrialTask | Literal["later"] | None:
        """Return the next trial; "later" when none may begin now, None when there are no more."""
        if self._is_over():
            return None
        if len(self._active_numbers) >= self._context.count_slots() + STAGED_TRIALS:
            return "later"
        if self._resumable:
            return self._make_task(self._resumable.pop(0).record)
        record = self._suggest_trial()
        return None if record is None else self._make_task(record)

    def on_trial_started(self, number: int) -> None:
        """Note that an actor has begun a trial."""
        if not self._trials[number].is_terminal:
            self._update_trial(number, state="running")

    def on_trial_report(self, report: TrialReport) -> StopDecision:
        """Take an epoch, or the end, that a trial reports."""
        number, trial = report.number, self._trials[report.number]
        self._last_reports[number] = report
        if report.epoch > trial.trained_epochs:
            self.new_epochs += not report.again
            epoch = EpochResult(report.epoch, report.values, report.seconds, report.samples)
            self._update_trial(number, epochs=(*trial.epochs, epoch))
        self._check_metric(report)
        if self._trials[number].is_terminal or report.state != "running":
            return StopDecision(ask_scheduler=False)
        return StopDecision(should_stop=self._is_over())

    def on_trial_ended(self, number: int, error: str | None) -> None:
        """Note that a trial is over; error: what it failed with in the end."""
        self._active_numbers.discard(number)
        if self._trials[number].is_terminal:  # it only repeated what is known
            self._context.on_trial_changed(self._trials[number], self._get_spec(number))
            return
        state, reason = self._decide_state(number, error)
        self._update_trial(number, state=state, reason=reason)
        if self._trials[number].is_terminal:
            self._store.write_end(number, TrialEnd(state=state, reason=reason))

    def _decide_state(self, number: int, error: str | None) -> tuple[State, str]:
        last = self._last_reports.get(number)
        if error is not None:
            return ("stopped", error) if self._context.is_stop_requested() else ("failed", error)
        if last is not None and last.state != "running":
            return last.state, last.reason
        if self._is_over():
            return "stopped", self._stop_reason or "asked to stop"
        return "pruned", f"ended after epoch {self._trials[number].trained_epochs} by the scheduler"

    def _check_metric(self, report: TrialReport) -> None:
        """Stop the sweep when validations lack the metric, which no trial would ever be compared by."""
        names = {name.removeprefix("validation/") for name in report.values if name.startswith("validation/")}
        if names and report.score is None and not self._stop_reason:
            known = sorted({name.removeprefix("averaged_").removeprefix("raw_") for name in names})
            self._stop_reason = (
                f"--metric must be one of {', '.join(known)}, got {self._context.metric.name!r}; set another one"
            )

    def _is_over(self) -> bool:
        """Return whether a person, the budget or a wrong metric ends the sweep."""
        budget = self._context.budget
        if not self._stop_reason:
            if budget.hours is not None and time.monotonic() - self._start_time > 3600 * budget.hours:
                self._stop_reason = (
                    f"--budget.hours {budget.hours:g} is used up; rerun the same command, or set a larger one"
                )
            spent = sum(trial.trained_epochs for trial in self._trials.values())
            if budget.epochs is not None and spent >= budget.epochs:
                self._stop_reason = f"--budget.epochs {budget.epochs:g} is used up; set a larger one"
        return bool(self._stop_reason) or self._context.is_stop_requested()

    def _suggest_trial(self) -> TrialRecord | None:
        """Record a new trial; None when the space or the budget of trials is used up."""
        number = len(self._records) + 1
        if self._exhausted or number > self._context.budget.trials:
            return None
        assignment = self._sampler.suggest(self.trials)
        if assignment is None:
            self._exhausted = True
            return None
        recipe = build_recipe(self._context.base, assignment)
        named = pin_code(recipe.model_copy(update={"name": f"{self._context.base.name}-t{number:03d}"}))
        record = TrialRecord(number=number, assignment=dict(assignment), recipe=named)
        self._store.add_trial(record)
        self._records[number] = record
        with self._lock:
            self._trials[number] = Trial(number, record.assignment, named)
        self._context.on_trial_added(self._get_spec(number))
        return record

    def _make_task(self, record: TrialRecord) -> TrialTask:
        self._active_numbers.add(record.number)
        return TrialTask(
            number=record.number,
            spec=self._get_spec(record.number).redact_tracking(),
            metric=self._context.metric,
            stop_flag=self._context.stop_flag,
            successor=self._context.successor,
            gpus=self._context.gpus,
            ended=self._trials[record.number].is_terminal,
        )

    def _get_spec(self, number: int) -> RunSpec:
        return self._context.make_spec(self._records[number].recipe)

    def _update_trial(self, number: int, **fields: object) -> None:
        with self._lock:
            self._trials[number] = replace(self._trials[number], **fields)  # type: ignore[arg-type]
        self._context.on_trial_changed(self._trials[number], self._get_spec(number))
