"""A sweep as it goes: which trial is next, what is known of each, when it is enough. Knows no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.config import BudgetConfig
from orchestrator.tuning.samplers import Sampler
from orchestrator.tuning.space import build_recipe
from orchestrator.tuning.trial import Assignment, EpochResult, MetricName, State, Trial
from orchestrator.tuning.trial_run import Fork, TrialReport, TrialTask
from orchestrator.tuning.trial_store import ForkPoint, StoredTrial, TrialEnd, TrialRecord, TrialStore, sort_for_resume

# A trial that waits for a place keeps the process of one that ends: Tune would end it else.
STAGED_TRIALS = 1


@dataclass(frozen=True)
class StopDecision:
    """What the sweep thinks of a report; see tuning.study.Decision."""

    should_stop: bool = False
    ask_scheduler: bool = True


@dataclass(frozen=True)
class Replacement:
    """A trial that takes over another one's weights and goes on differently."""

    assignment: Assignment
    recipe: Recipe
    origin: ForkPoint


class TrialObserver(Protocol):
    """Who is told of trials; called from one thread."""

    def on_trial_added(self, spec: RunSpec) -> None:
        """There is a trial, new or from an earlier driver."""

    def on_trial_changed(self, trial: Trial, spec: RunSpec) -> None:
        """A trial began, reported or ended."""


class PopulationPolicy(Protocol):
    """Decides, when all trials have come to the same epoch, which of them others take the places of."""

    def is_exploit_epoch(self, epoch: int, epochs: int) -> bool:
        """Whether the trials wait for each other after that epoch, of so many."""

    def choose_replacements(self, trials: Sequence[Trial], epoch: int) -> Mapping[int, Replacement]:
        """By number, what goes on instead of a trial, now that all are at that epoch."""


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
    # What a new trial of this recipe begins with, of those so far; None: with nothing.
    find_fork_point: Callable[[Recipe, Sequence[Trial]], ForkPoint | None] = lambda recipe, trials: None


class Sweep:
    """What tuning.study.run steers by. All but `trials` is called from one thread."""

    def __init__(
        self,
        terms: SweepContext,
        ledger: TrialStore,
        entries: Sequence[StoredTrial],
        sampler: Sampler,
        watcher: TrialObserver,
        population: PopulationPolicy | None = None,
    ) -> None:
        """entries: what the ledger holds from earlier drivers."""
        self._context, self._store, self._sampler, self._observer = terms, ledger, sampler, watcher
        self._population = population
        self._lock = threading.Lock()
        self._records = {entry.record.number: entry.record for entry in entries}
        self._trials = {entry.record.number: entry.trial for entry in entries}
        self._resumable = [
            entry for entry in sort_for_resume(entries) if not entry.trial.is_terminal or entry.trial.epochs
        ]
        self._pending_members: list[TrialRecord] = []  # members of a population that go on from its last meeting
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
        while self._resumable:
            entry = self._resumable.pop(0)
            if not self._is_waiting(entry.trial):
                return self._make_task(entry.record)
        if (record := self._suggest_trial()) is not None:
            return self._make_task(record)
        if self._population is None:
            return None
        if not self._pending_members and not self._active_numbers:
            self._pending_members = self._exploit_population(self._population)
        if self._pending_members:
            return self._make_task(self._pending_members.pop(0))
        return "later" if self._active_numbers else None

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
        if self._is_over():
            return StopDecision(should_stop=True)
        return StopDecision(should_stop=not report.again and self._is_waiting(trial))

    def on_trial_ended(self, number: int, error: str | None) -> None:
        """A trial is over."""
        self._active_numbers.discard(number)
        if self._trials[number].is_terminal:  # it was only told again
            self._observer.on_trial_changed(self._trials[number], self._get_spec(number))
            return
        if error is None and not self._is_over() and self._is_waiting(self._trials[number]):
            self._update_trial(number, state="waiting", reason="")
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
            spent = sum(trial.own_epochs for trial in self._trials.values())
            if budget.epochs is not None and spent >= budget.epochs:
                self._stop_reason = f"--budget.epochs {budget.epochs:g} is used up; set a larger one"
        return bool(self._stop_reason) or self._context.is_stop_requested()

    def _suggest_trial(self) -> TrialRecord | None:
        """A new trial; None when there are as many as there will be."""
        planned = sum(record.replaces is None for record in self._records.values())
        if self._exhausted or planned >= self._context.budget.trials:
            return None
        assignment = self._sampler.suggest(self.trials)
        if assignment is None:
            self._exhausted = True
            return None
        recipe = build_recipe(self._context.base, assignment)
        return self._add_trial(assignment, recipe, self._context.find_fork_point(recipe, self.trials))

    def _is_waiting(self, trial: Trial) -> bool:
        """Whether a trial waits for the other members of its population: none of them has gone farther."""
        epoch = trial.trained_epochs
        if (
            self._population is None
            or trial.is_terminal
            or not self._population.is_exploit_epoch(epoch, trial.recipe.epochs)
        ):
            return False
        if trial.inherited_epochs >= epoch:  # it came from that meeting
            return False
        return all(other.is_terminal or other.trained_epochs <= epoch for other in self._trials.values())

    def _exploit_population(self, population: PopulationPolicy) -> list[TrialRecord]:
        """All members have come to the same epoch: some end, others take their places, and the rest goes on."""
        live = [trial for trial in self.trials if not trial.is_terminal]
        late = sorted((trial for trial in live if not self._is_waiting(trial)), key=lambda trial: trial.trained_epochs)
        behind = [self._records[trial.number] for trial in late]
        if behind or not live:  # of an earlier driver
            return behind
        epoch = live[0].trained_epochs
        replaced = {record.replaces for record in self._records.values()}
        going = []
        for number, one in population.choose_replacements(self.trials, epoch).items():
            if number not in replaced:
                going.append(self._add_trial(one.assignment, one.recipe, one.origin, number))
            if not self._trials[number].is_terminal:
                reason = f"another took its place at epoch {epoch}, with the weights of a better one"
                self._store.write_end(number, TrialEnd(state="pruned", reason=reason))
                self._update_trial(number, state="pruned", reason=reason)
        # Those that follow come first: who they take weights over from may finish soon, and keeps none then.
        return [*going, *(self._records[trial.number] for trial in live if not self._trials[trial.number].is_terminal)]

    def _add_trial(
        self, assignment: Assignment, recipe: Recipe, origin: ForkPoint | None, replaces: int | None = None
    ) -> TrialRecord:
        number = len(self._records) + 1
        named = recipe.model_copy(update={"name": f"{self._context.base.name}-t{number:03d}"})
        record = TrialRecord(number=number, assignment=dict(assignment), recipe=named, origin=origin, replaces=replaces)
        self._store.add_trial(record)
        self._records[number] = record
        with self._lock:
            self._trials[number] = Trial(number, record.assignment, named, inherited_epochs=record.inherited_epochs)
        self._observer.on_trial_added(self._get_spec(number))
        return record

    def _make_task(self, record: TrialRecord) -> TrialTask:
        self._active_numbers.add(record.number)
        terms, fork = self._context, None
        if record.origin is not None:
            origin = self._records[record.origin.trial]
            fork = Fork(folder=terms.make_spec(origin.recipe).folder, samples=record.origin.samples)
        return TrialTask(
            number=record.number,
            spec=terms.make_spec(record.recipe).redact_tracking(),
            metric=terms.metric,
            stop_flag=terms.stop_flag,
            successor=terms.successor,
            gpus=terms.gpus,
            ended=self._trials[record.number].is_terminal,
            fork=fork,
        )

    def _get_spec(self, number: int) -> RunSpec:
        return self._context.make_spec(self._records[number].recipe)

    def _update_trial(self, number: int, **fields: object) -> None:
        with self._lock:
            self._trials[number] = replace(self._trials[number], **fields)  # type: ignore[arg-type]
        self._observer.on_trial_changed(self._trials[number], self._get_spec(number))
