"""A sweep as it goes: which trial is next, what is known of each, when it is enough. Knows no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.config import BudgetConfig
from orchestrator.tuning.samplers import Sampler
from orchestrator.tuning.space import build_recipe
from orchestrator.tuning.trial import Assignment, EpochResult, MetricName, State, Trial
from orchestrator.tuning.trial_run import TrialReport, TrialTask
from orchestrator.tuning.trial_store import StoredTrial, TrialEnd, TrialRecord, TrialStore, sort_for_resume

# A trial that waits for a place keeps the process of one that ends: Tune would end it else.
STAGED_TRIALS = 1


@dataclass(frozen=True)
class StopDecision:
    """What the sweep thinks of a report; see tuning.study.Decision."""

    should_stop: bool = False
    ask_scheduler: bool = True


class TrialObserver(Protocol):
    """Who is told of trials; called from one thread."""

    def on_trial_added(self, spec: RunSpec) -> None:
        """There is a trial, new or from an earlier driver."""

    def on_trial_changed(self, trial: Trial, spec: RunSpec) -> None:
        """A trial began, reported or ended."""


@dataclass(frozen=True)
class SweepContext:
    """What a sweep goes by."""

    base: Recipe
    metric: MetricName
    budget: BudgetConfig
    make_spec: Callable[[Recipe], RunSpec]
    stop_flag: str
    successor: str
    gpus: float  # of each worker
    count_slots: Callable[[], int]  # trials that the cluster holds at once, now
    is_stop_requested: Callable[[], bool]  # a person wants the end


class Sweep:
    """What tuning.study.run steers by. All but `trials` is called from one thread."""

    def __init__(
        self,
        terms: SweepContext,
        ledger: TrialStore,
        entries: Sequence[StoredTrial],
        sampler: Sampler,
        watcher: TrialObserver,
    ) -> None:
        """entries: what the ledger holds from earlier drivers."""
        self._context, self._store, self._sampler, self._observer = terms, ledger, sampler, watcher
        self._lock = threading.Lock()
        self._records = {entry.record.number: entry.record for entry in entries}
        self._trials = {entry.record.number: entry.trial for entry in entries}
        self._resumable = [
            entry for entry in sort_for_resume(entries) if not entry.trial.is_terminal or entry.trial.epochs
        ]
        self._exhausted = False
        self._active_numbers: set[int] = set()  # to the study, and not over
        self._last_reports: dict[int, TrialReport] = {}
        self._start_time = time.monotonic()
        self._stop_reason = ""
        self.new_epochs = 0  # trained by this driver
        for entry in entries:
            watcher.on_trial_added(terms.make_spec(entry.record.recipe))
            watcher.on_trial_changed(entry.trial, terms.make_spec(entry.record.recipe))

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials so far, by number; from any thread."""
        with self._lock:
            return tuple(self._trials[number] for number in sorted(self._trials))

    @property
    def stop_reason(self) -> str:
        """Why no more is tried although there would be more; empty while nothing of that kind happened."""
        return self._stop_reason

    # ------------------------------------------------------------------ asked by the study
    def next_task(self) -> TrialTask | Literal["later"] | None:
        """The next trial; "later" when none may begin now, None when there will be none any more."""
        if self._is_over():
            return None
        if len(self._active_numbers) >= self._context.count_slots() + STAGED_TRIALS:
            return "later"
        if self._resumable:
            return self._make_task(self._resumable.pop(0).record)
        record = self._suggest_trial()
        return None if record is None else self._make_task(record)

    def on_trial_started(self, number: int) -> None:
        """An actor has begun a trial."""
        if not self._trials[number].is_terminal:
            self._update_trial(number, state="running")

    def on_trial_report(self, report: TrialReport) -> StopDecision:
        """A trial reported an epoch, or its end."""
        number, trial = report.number, self._trials[report.number]
        self._last_reports[number] = report
        if report.epoch > trial.trained_epochs:
            self.new_epochs += not report.again
            epoch = EpochResult(report.epoch, report.values, report.seconds, report.samples)
            self._update_trial(number, epochs=(*trial.epochs, epoch))
        trial = self._trials[number]
        if trial.is_terminal or report.state != "running":
            return StopDecision(ask_scheduler=False)
        return StopDecision(should_stop=self._is_over())

    def on_trial_ended(self, number: int, error: str | None) -> None:
        """A trial is over."""
        self._active_numbers.discard(number)
        if self._trials[number].is_terminal:  # it was only told again
            self._observer.on_trial_changed(self._trials[number], self._get_spec(number))
            return
        state, reason = self._decide_state(number, error)
        self._update_trial(number, state=state, reason=reason)
        if self._trials[number].is_terminal:
            self._store.write_end(number, TrialEnd(state=state, reason=reason))

    # ------------------------------------------------------------------ its own
    def _decide_state(self, number: int, error: str | None) -> tuple[State, str]:
        last = self._last_reports.get(number)
        if error is not None:
            return ("stopped", error) if self._context.is_stop_requested() else ("failed", error)
        if last is not None and last.state != "running":
            return last.state, last.reason
        if self._is_over():
            return "stopped", self._stop_reason or "asked to stop"
        return "pruned", f"ended after epoch {self._trials[number].trained_epochs} by the scheduler"

    def _is_over(self) -> bool:
        """Whether a person, or the budget, wants the end."""
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
        """A new trial; None when there are as many as there will be."""
        if self._exhausted or len(self._records) >= self._context.budget.trials:
            return None
        assignment = self._sampler.suggest(self.trials)
        if assignment is None:
            self._exhausted = True
            return None
        return self._add_trial(assignment, build_recipe(self._context.base, assignment))

    def _add_trial(self, assignment: Assignment, recipe: Recipe) -> TrialRecord:
        number = len(self._records) + 1
        named = recipe.model_copy(update={"name": f"{self._context.base.name}-t{number:03d}"})
        record = TrialRecord(number=number, assignment=dict(assignment), recipe=named)
        self._store.add_trial(record)
        self._records[number] = record
        with self._lock:
            self._trials[number] = Trial(number, record.assignment, named)
        self._observer.on_trial_added(self._get_spec(number))
        return record

    def _make_task(self, record: TrialRecord) -> TrialTask:
        self._active_numbers.add(record.number)
        terms = self._context
        return TrialTask(
            number=record.number,
            spec=terms.make_spec(record.recipe).redact_tracking(),
            metric=terms.metric,
            stop_flag=terms.stop_flag,
            successor=terms.successor,
            gpus=terms.gpus,
            ended=self._trials[record.number].is_terminal,
        )

    def _get_spec(self, number: int) -> RunSpec:
        return self._context.make_spec(self._records[number].recipe)

    def _update_trial(self, number: int, **fields: object) -> None:
        with self._lock:
            self._trials[number] = replace(self._trials[number], **fields)  # type: ignore[arg-type]
        self._observer.on_trial_changed(self._trials[number], self._get_spec(number))
