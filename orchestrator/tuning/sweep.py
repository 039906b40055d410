"""A sweep as it goes: which trial is next, what is known of each, when it is enough. Knows no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from orchestrator.launch.config import RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.config import BudgetConfig
from orchestrator.tuning.ledger import End, Entry, Ledger, Origin, Record, in_order
from orchestrator.tuning.samplers import Sampler
from orchestrator.tuning.space import recipe_of
from orchestrator.tuning.trial_run import Fork, Report, TrialTask
from orchestrator.tuning.trials import Assignment, Epoch, Metric, State, Trial

# A trial that waits for a place keeps the process of one that ends: Tune would end it else.
STAGED = 1


@dataclass(frozen=True)
class Verdict:
    """What the sweep thinks of a report; see tuning.study.Decision."""

    end: bool = False
    judged: bool = True


@dataclass(frozen=True)
class Following:
    """A trial that takes over another one's weights and goes on differently."""

    assignment: Assignment
    recipe: Recipe
    origin: Origin


class Watcher(Protocol):
    """Who is told of trials; called from one thread."""

    def added(self, spec: RunSpec) -> None:
        """There is a trial, new or from an earlier driver."""

    def changed(self, trial: Trial, spec: RunSpec) -> None:
        """A trial began, reported or ended."""


class Population(Protocol):
    """Decides, when all trials have come to the same epoch, which of them others take the places of."""

    def meets(self, epoch: int, epochs: int) -> bool:
        """Whether the trials wait for each other after that epoch, of so many."""

    def replacements(self, trials: Sequence[Trial], epoch: int) -> Mapping[int, Following]:
        """By number, what goes on instead of a trial, now that all are at that epoch."""


@dataclass(frozen=True)
class Terms:
    """What a sweep goes by."""

    base: Recipe
    metric: Metric
    budget: BudgetConfig
    spec_of: Callable[[Recipe], RunSpec]
    stop_flag: str
    successor: str
    gpus: float  # of each worker
    slots: Callable[[], int]  # trials that the cluster holds at once, now
    stopped: Callable[[], bool]  # a person wants the end
    # What a new trial of this recipe begins with, of those so far; None: with nothing.
    origin_of: Callable[[Recipe, Sequence[Trial]], Origin | None] = lambda recipe, trials: None


class Sweep:
    """What tuning.study.run steers by. All but `trials` is called from one thread."""

    def __init__(
        self, terms: Terms, ledger: Ledger, entries: Sequence[Entry], sampler: Sampler, watcher: Watcher,
        population: Population | None = None,
    ) -> None:  # fmt: skip
        """entries: what the ledger holds from earlier drivers."""
        self._terms, self._ledger, self._sampler, self._watcher = terms, ledger, sampler, watcher
        self._population = population
        self._lock = threading.Lock()
        self._records = {entry.record.number: entry.record for entry in entries}
        self._trials = {entry.record.number: entry.trial for entry in entries}
        self._before = [entry for entry in in_order(entries) if not entry.trial.done or entry.trial.epochs]
        self._met: list[Record] = []  # members of a population that go on from its last meeting
        self._exhausted = False
        self._handed: set[int] = set()  # to the study, and not over
        self._last: dict[int, Report] = {}
        self._began = time.monotonic()
        self._enough = ""
        self.new_epochs = 0  # trained by this driver
        for entry in entries:
            watcher.added(terms.spec_of(entry.record.recipe))
            watcher.changed(entry.trial, terms.spec_of(entry.record.recipe))

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials so far, by number; from any thread."""
        with self._lock:
            return tuple(self._trials[number] for number in sorted(self._trials))

    @property
    def enough(self) -> str:
        """Why no more is tried although there would be more; empty while nothing of that kind happened."""
        return self._enough

    # ------------------------------------------------------------------ asked by the study
    def next_task(self) -> TrialTask | Literal["later"] | None:
        """The next trial; "later" when none may begin now, None when there will be none any more."""
        if self._over():
            return None
        if len(self._handed) >= self._terms.slots() + STAGED:
            return "later"
        while self._before:
            entry = self._before.pop(0)
            if not self._waits(entry.trial):
                return self._task(entry.record)
        if (record := self._suggested()) is not None:
            return self._task(record)
        if self._population is None:
            return None
        if not self._met and not self._handed:
            self._met = self._meeting(self._population)
        if self._met:
            return self._task(self._met.pop(0))
        return "later" if self._handed else None

    def began(self, number: int) -> None:
        """An actor has begun a trial."""
        if not self._trials[number].done:
            self._change(number, state="running")

    def reported(self, report: Report) -> Verdict:
        """A trial reported an epoch, or its end."""
        number, trial = report.number, self._trials[report.number]
        self._last[number] = report
        if report.epoch > trial.trained_epochs:
            self.new_epochs += not report.again
            epoch = Epoch(report.epoch, report.values, report.seconds, report.samples)
            self._change(number, epochs=(*trial.epochs, epoch))
        trial = self._trials[number]
        if trial.done or report.state != "running":
            return Verdict(judged=False)
        if self._over():
            return Verdict(end=True)
        return Verdict(end=not report.again and self._waits(trial))

    def ended(self, number: int, error: str | None) -> None:
        """A trial is over."""
        self._handed.discard(number)
        if self._trials[number].done:  # it was only told again
            self._watcher.changed(self._trials[number], self._spec(number))
            return
        if error is None and not self._over() and self._waits(self._trials[number]):
            self._change(number, state="waiting", reason="")
            return
        state, reason = self._state_of(number, error)
        self._change(number, state=state, reason=reason)
        if self._trials[number].done:
            self._ledger.end(number, End(state=state, reason=reason))

    # ------------------------------------------------------------------ its own
    def _state_of(self, number: int, error: str | None) -> tuple[State, str]:
        last = self._last.get(number)
        if error is not None:
            return ("stopped", error) if self._terms.stopped() else ("failed", error)
        if last is not None and last.state != "running":
            return last.state, last.reason
        if self._over():
            return "stopped", self._enough or "asked to stop"
        return "pruned", f"ended after epoch {self._trials[number].trained_epochs} by the scheduler"

    def _over(self) -> bool:
        """Whether a person, or the budget, wants the end."""
        budget = self._terms.budget
        if not self._enough:
            if budget.hours is not None and time.monotonic() - self._began > 3600 * budget.hours:
                self._enough = (
                    f"--budget.hours {budget.hours:g} is used up; rerun the same command, or set a larger one"
                )
            spent = sum(trial.own_epochs for trial in self._trials.values())
            if budget.epochs is not None and spent >= budget.epochs:
                self._enough = f"--budget.epochs {budget.epochs:g} is used up; set a larger one"
        return bool(self._enough) or self._terms.stopped()

    def _suggested(self) -> Record | None:
        """A new trial; None when there are as many as there will be."""
        planned = sum(record.replaces is None for record in self._records.values())
        if self._exhausted or planned >= self._terms.budget.trials:
            return None
        assignment = self._sampler.suggest(self.trials)
        if assignment is None:
            self._exhausted = True
            return None
        recipe = recipe_of(self._terms.base, assignment)
        return self._add(assignment, recipe, self._terms.origin_of(recipe, self.trials))

    def _waits(self, trial: Trial) -> bool:
        """Whether a trial waits for the other members of its population: none of them has gone farther."""
        epoch = trial.trained_epochs
        if self._population is None or trial.done or not self._population.meets(epoch, trial.recipe.epochs):
            return False
        if trial.shared >= epoch:  # it came from that meeting
            return False
        return all(other.done or other.trained_epochs <= epoch for other in self._trials.values())

    def _meeting(self, population: Population) -> list[Record]:
        """All members have come to the same epoch: some end, others take their places, and the rest goes on."""
        live = [trial for trial in self.trials if not trial.done]
        late = sorted((trial for trial in live if not self._waits(trial)), key=lambda trial: trial.trained_epochs)
        behind = [self._records[trial.number] for trial in late]
        if behind or not live:  # of an earlier driver
            return behind
        epoch = live[0].trained_epochs
        replaced = {record.replaces for record in self._records.values()}
        going = []
        for number, one in population.replacements(self.trials, epoch).items():
            if number not in replaced:
                going.append(self._add(one.assignment, one.recipe, one.origin, number))
            if not self._trials[number].done:
                reason = f"another took its place at epoch {epoch}, with the weights of a better one"
                self._ledger.end(number, End(state="pruned", reason=reason))
                self._change(number, state="pruned", reason=reason)
        # Those that follow come first: who they take weights over from may finish soon, and keeps none then.
        return [*going, *(self._records[trial.number] for trial in live if not self._trials[trial.number].done)]

    def _add(
        self, assignment: Assignment, recipe: Recipe, origin: Origin | None, replaces: int | None = None
    ) -> Record:
        number = len(self._records) + 1
        named = recipe.model_copy(update={"name": f"{self._terms.base.name}-t{number:03d}"})
        record = Record(number=number, assignment=dict(assignment), recipe=named, origin=origin, replaces=replaces)
        self._ledger.add(record)
        self._records[number] = record
        with self._lock:
            self._trials[number] = Trial(number, record.assignment, named, shared=record.shared)
        self._watcher.added(self._spec(number))
        return record

    def _task(self, record: Record) -> TrialTask:
        self._handed.add(record.number)
        terms, fork = self._terms, None
        if record.origin is not None:
            origin = self._records[record.origin.trial]
            fork = Fork(folder=terms.spec_of(origin.recipe).folder, samples=record.origin.samples)
        return TrialTask(
            number=record.number, spec=terms.spec_of(record.recipe).for_workers(), metric=terms.metric,
            stop_flag=terms.stop_flag, successor=terms.successor, gpus=terms.gpus,
            ended=self._trials[record.number].done, fork=fork,
        )  # fmt: skip

    def _spec(self, number: int) -> RunSpec:
        return self._terms.spec_of(self._records[number].recipe)

    def _change(self, number: int, **fields: object) -> None:
        with self._lock:
            self._trials[number] = replace(self._trials[number], **fields)  # type: ignore[arg-type]
        self._watcher.changed(self._trials[number], self._spec(number))
