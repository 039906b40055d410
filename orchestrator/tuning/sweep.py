"""The state of a sweep: which trial comes next, what each has reported, when the sweep is over. Free of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.config.overrides import apply_overrides
from orchestrator.recipe.config import Recipe, pin_code
from orchestrator.tuning import trial_store
from orchestrator.tuning.config import BudgetConfig
from orchestrator.tuning.trial import Assignment, EpochResult, Metric, State, Trial, TrialReport, TrialTask

# A trial that waits for a place keeps the process of one that ends: else Tune would stop it.
STAGED_TRIALS = 1


# The answer to a report: the trial ends, the scheduler decides, or the trial continues without being judged.
Verdict = Literal["stop", "judge", "continue"]


@dataclass(frozen=True)
class SweepContext:
    """The settings and surroundings of a sweep."""

    folder: str  # its URL
    base: Recipe
    metric: Metric
    budget: BudgetConfig
    suggest: Callable[[Sequence[Trial]], Assignment | None]  # as `samplers.Sampler.suggest`
    make_task: Callable[[Trial], TrialTask]
    count_slots: Callable[[], int]  # trials that fit on the cluster now
    is_stop_requested: Callable[[], bool]  # by a person
    on_trial_added: Callable[[Trial], object]  # a new one
    on_trial_ended: Callable[[Trial], object]  # for this driver


class Sweep:
    """The sweep as `ray_tune.run_tuner` sees it, in one thread."""

    def __init__(self, context: SweepContext, stored: Sequence[Trial]) -> None:
        """Continue with the stored trials of earlier drivers."""
        self._context = context
        self._trials = {trial.number: trial for trial in stored}
        # Ended ones first: the scheduler should know all results before it decides.
        self._resumable = [trial.number for trial in stored if trial.is_terminal and trial.epochs]
        self._resumable += [trial.number for trial in stored if not trial.is_terminal]
        self._exhausted = False
        self._active_numbers: set[int] = set()  # handed to Tune, and not over
        self._last_reports: dict[int, TrialReport] = {}
        self._start_time = time.monotonic()
        self.stop_reason = ""  # why the sweep ended before all its trials did

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials so far, by number."""
        return tuple(self._trials[number] for number in sorted(self._trials))

    def next_task(self) -> TrialTask | Literal["later"] | None:
        """Return the next trial; "later" when none may begin now, None when there are no more."""
        if self._is_over():
            return None
        if len(self._active_numbers) >= self._context.count_slots() + STAGED_TRIALS:
            return "later"
        trial = self._trials[self._resumable.pop(0)] if self._resumable else self._suggest_trial()
        if trial is None:
            return None
        self._active_numbers.add(trial.number)
        return self._context.make_task(trial)

    def on_trial_report(self, report: TrialReport) -> Verdict:
        """Take an epoch, or the end, that a trial reports."""
        number, trial = report.number, self._trials[report.number]
        self._last_reports[number] = report
        if report.epoch > trial.trained_epochs:
            epoch = EpochResult(report.epoch, report.values, report.seconds)
            self._trials[number] = replace(trial, epochs=(*trial.epochs, epoch))
        self._check_metric(report)
        if self._trials[number].is_terminal or report.state != "running":
            return "continue"
        return "stop" if self._is_over() else "judge"

    def on_trial_ended(self, number: int, error: str | None) -> None:
        """Note that a trial is over; error: what it failed with in the end."""
        self._active_numbers.discard(number)
        if self._trials[number].is_terminal:
            return  # it only repeated what is known
        state, reason = self._decide_state(number, error)
        trial = self._trials[number] = replace(self._trials[number], state=state, reason=reason)
        self._context.on_trial_ended(trial)
        if trial.is_terminal:
            trial_store.write_end(self._context.folder, trial)

    def _decide_state(self, number: int, error: str | None) -> tuple[State, str]:
        last = self._last_reports.get(number)
        if error is not None:
            return ("stopped", error) if self._context.is_stop_requested() else ("failed", error)
        if last is not None and last.state != "running":
            return last.state, last.reason
        if self._is_over():
            return "stopped", self.stop_reason or "asked to stop"
        return "pruned", f"ended after epoch {self._trials[number].trained_epochs} by the scheduler"

    def _check_metric(self, report: TrialReport) -> None:
        """Stop the sweep when validations lack the metric, which no trial would ever be compared by."""
        names = {name.removeprefix("validation/") for name in report.values if name.startswith("validation/")}
        if names and report.score is None and not self.stop_reason:
            known = sorted({name.removeprefix("averaged_").removeprefix("raw_") for name in names})
            self.stop_reason = (
                f"--metric must be one of {', '.join(known)}, got {self._context.metric.name!r}; set another one"
            )

    def _is_over(self) -> bool:
        budget = self._context.budget
        if not self.stop_reason:
            if budget.hours is not None and time.monotonic() - self._start_time > 3600 * budget.hours:
                self.stop_reason = (
                    f"--budget.hours {budget.hours:g} is used up; rerun the same command, or set a larger one"
                )
            spent = sum(trial.trained_epochs for trial in self._trials.values())
            if budget.epochs is not None and spent >= budget.epochs:
                self.stop_reason = f"--budget.epochs {budget.epochs:g} is used up; set a larger one"
        return bool(self.stop_reason) or self._context.is_stop_requested()

    def _suggest_trial(self) -> Trial | None:
        number = len(self._trials) + 1
        if self._exhausted or number > self._context.budget.trials:
            return None
        assignment = self._context.suggest(self.trials)
        if assignment is None:
            self._exhausted = True
            return None
        recipe = apply_overrides(self._context.base, assignment)
        named = pin_code(recipe.model_copy(update={"name": f"{self._context.base.name}-t{number:03d}"}))
        trial = Trial(number, assignment, named)
        trial_store.add_trial(self._context.folder, trial)
        self._trials[number] = trial
        self._context.on_trial_added(trial)
        return trial
