"""A sweep, step by step, as Tune calls it: no Ray, no training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tuning import trial_store
from orchestrator.tuning.config import BudgetConfig
from orchestrator.tuning.sweep import Sweep, SweepContext
from orchestrator.tuning.trial import Assignment, Metric, Trial, TrialReport, TrialTask
from orchestrator.tuning.trial_store import TrialStoreError
from tests.support.launched import recipe, spec, write_journal

METRIC = Metric(name="top1_error")


class Rates:
    """So many base rates, one after the other."""

    def __init__(self, most: int = 100) -> None:
        self.most = most

    def suggest(self, trials: Sequence[Trial]) -> Assignment | None:
        return {"schedule.base_rate": 0.01 * (len(trials) + 1)} if len(trials) < self.most else None


@dataclass
class Place:
    """A sweep's folder, and what its drivers say."""

    folder: Path
    events: list[tuple[str, str, int]] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    stopped: bool = False
    slots: int = 2

    def on_trial_added(self, trial: Trial) -> None:
        self.added.append(trial.recipe.name)

    def make_task(self, trial: Trial) -> TrialTask:
        own = spec(trial.recipe, str(self.folder))
        return TrialTask(
            number=trial.number,
            spec=own,
            metric=METRIC,
            stop_flag="/stop",
            successor="",
            gpus=0,
            ended=trial.is_terminal,
        )

    def on_trial_ended(self, trial: Trial) -> None:
        self.events.append((trial.name, trial.state, trial.trained_epochs))

    def sweep(self, budget: dict[str, Any] | None = None, most: int = 100) -> Sweep:
        """The sweep of a new driver."""
        context = SweepContext(
            folder=str(self.folder),
            base=recipe(epochs=4),
            metric=METRIC,
            budget=BudgetConfig.from_dict({"trials": 3, **(budget or {})}),
            suggest=Rates(most).suggest,
            make_task=self.make_task,
            count_slots=lambda: self.slots,
            is_stop_requested=lambda: self.stopped,
            on_trial_added=self.on_trial_added,
            on_trial_ended=self.on_trial_ended,
        )
        stored = trial_store.load_trials(str(self.folder), lambda of: spec(of, str(self.folder)).folder)
        return Sweep(context, stored)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def report(number: int, epoch: int, error: float = 50.0, **fields: Any) -> TrialReport:
    values = {"validation/raw_top1_error": error}
    return TrialReport(number=number, epoch=epoch, values=values, seconds=1.0 * epoch, score=error, **fields)


def task(sweep: Sweep) -> TrialTask:
    found = sweep.next_task()
    assert isinstance(found, TrialTask)
    return found


def states(sweep: Sweep) -> list[tuple[str, str]]:
    return [(trial.state, trial.reason) for trial in sweep.trials]


def test_no_more_begin_than_fit_and_one_that_is_staged(place: Place) -> None:
    sweep = place.sweep({"trials": 10})
    assert [task(sweep).number for _ in range(3)] == [1, 2, 3]
    assert sweep.next_task() == "later"
    sweep.on_trial_report(report(1, 4, state="finished"))
    sweep.on_trial_ended(1, None)
    assert task(sweep).number == 4
    place.slots = 4  # a node came
    assert [task(sweep).number for _ in range(2)] == [5, 6]
    assert sweep.next_task() == "later"


def test_a_trial_is_written_down_before_it_begins(place: Place) -> None:
    one = task(place.sweep())
    assert (place.folder / "trials" / "0001.json").exists()
    assert one.spec.recipe.name == "tiny-t001"
    assert one.spec.recipe.schedule.base_rate == 0.01
    assert place.added == ["tiny-t001"]


def test_the_space_or_the_budget_of_trials_ends_it(place: Place) -> None:
    for most, budget, expected in ((2, 3, 2), (5, 3, 3)):
        there = Place(place.folder / str(most), slots=9)
        sweep = there.sweep({"trials": budget}, most)
        for _ in range(expected):
            task(sweep)
        assert sweep.next_task() is None
        assert sweep.stop_reason == ""


def test_how_a_trial_ends(place: Place) -> None:
    place.slots = 9
    sweep = place.sweep({"trials": 6})
    for _ in range(6):
        task(sweep)
    for number in range(1, 7):
        assert sweep.on_trial_report(report(number, 1)) == "judge"
    sweep.on_trial_report(report(1, 4, state="finished"))
    sweep.on_trial_report(report(2, 1, state="diverged", reason="the loss is not finite"))
    sweep.on_trial_report(report(3, 1, state="failed", reason="bad-data"))
    sweep.on_trial_report(report(4, 1, state="stopped", reason="asked to stop"))
    for number, error in ((1, None), (2, None), (3, None), (4, None), (5, None), (6, "OSError: no space")):
        sweep.on_trial_ended(number, error)
    assert states(sweep) == [
        ("finished", ""),
        ("diverged", "the loss is not finite"),
        ("failed", "bad-data"),
        ("stopped", "asked to stop"),
        ("pruned", "ended after epoch 1 by the scheduler"),
        ("failed", "OSError: no space"),
    ]
    assert [event[1] for event in place.events] == [state for state, _ in states(sweep)]
    again = place.sweep({"trials": 6})
    assert states(again) == [one if one[0] != "stopped" else ("waiting", "") for one in states(sweep)]


def test_the_budget_of_epochs_ends_those_under_way(place: Place) -> None:
    sweep = place.sweep({"trials": 9, "epochs": 3})
    first, second = task(sweep).number, task(sweep).number
    assert sweep.on_trial_report(report(first, 1)) != "stop"
    assert sweep.on_trial_report(report(second, 1)) != "stop"
    assert sweep.on_trial_report(report(first, 2)) == "stop"
    assert sweep.next_task() is None
    sweep.on_trial_ended(first, None)
    sweep.on_trial_ended(second, None)
    assert states(sweep) == [("stopped", "--budget.epochs 3 is used up; set a larger one")] * 2
    # A larger one resumes the same trials.
    later = place.sweep({"trials": 9, "epochs": 30})
    assert [task(later).number for _ in range(3)] == [1, 2, 3]


def test_the_budget_of_hours(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("orchestrator.tuning.sweep.time.monotonic", lambda: now[0])
    sweep = place.sweep({"hours": 0.5})
    number = task(sweep).number
    now[0] += 1799
    assert sweep.on_trial_report(report(number, 1)) != "stop"
    now[0] += 2
    assert sweep.on_trial_report(report(number, 2)) == "stop"
    sweep.on_trial_ended(number, None)
    assert states(sweep) == [("stopped", "--budget.hours 0.5 is used up; rerun the same command, or set a larger one")]


def test_a_stop_request(place: Place) -> None:
    sweep = place.sweep()
    number = task(sweep).number
    place.stopped = True
    assert sweep.on_trial_report(report(number, 1)) == "stop"
    assert sweep.next_task() is None
    sweep.on_trial_ended(number, "its process died")  # with the cluster, perhaps
    assert states(sweep)[0][0] == "stopped"


def test_a_new_driver_resumes_the_trials_of_one_that_died(place: Place) -> None:
    sweep = place.sweep()
    one, two, three = task(sweep), task(sweep), task(sweep)
    for number, (each, epochs) in enumerate(((one, 1), (two, 2), (three, 0)), 1):
        write_journal(
            each.spec.folder, 1, [("epoch", 10 * at, {"train/epoch": float(at)}) for at in range(1, epochs + 1)]
        )
        sweep.on_trial_report(report(number, epochs)) if epochs else None
    sweep.on_trial_report(report(2, 2, state="diverged"))
    sweep.on_trial_ended(2, None)

    later = place.sweep()
    assert [(trial.state, trial.trained_epochs) for trial in later.trials] == [
        ("waiting", 1),
        ("diverged", 2),
        ("waiting", 0),
    ]
    first, second, third = task(later), task(later), task(later)
    assert [each.number for each in (first, second, third)] == [2, 1, 3]
    assert [each.ended for each in (first, second, third)] == [True, False, False]
    assert (second.spec, third.spec) == (one.spec, three.spec)
    assert later.next_task() == "later"
    # Repeated reports are not judged, and train nothing.
    assert later.on_trial_report(report(2, 1)) == "continue"
    later.on_trial_ended(2, None)
    assert later.on_trial_report(report(1, 1)) == "judge"
    later.on_trial_report(report(1, 2))
    assert later.trials[0].trained_epochs == 2
    assert later.next_task() is None


def test_a_trial_that_ended_before_its_first_epoch_is_not_repeated(place: Place) -> None:
    sweep = place.sweep()
    sweep.on_trial_ended(task(sweep).number, "ValueError: never works")
    later = place.sweep()
    assert task(later).number == 2


def test_two_drivers_of_one_sweep(place: Place) -> None:
    first, second = place.sweep(), place.sweep()
    task(first)
    with pytest.raises(TrialStoreError, match="another driver runs this sweep"):
        second.next_task()


def test_a_metric_that_validation_lacks_stops_the_sweep(place: Place) -> None:
    sweep = place.sweep({"trials": 9})
    number = task(sweep).number
    not_validated = TrialReport(number=number, epoch=1, values={"train/loss": 1.0})
    assert sweep.on_trial_report(not_validated) != "stop"
    values = {"validation/raw_top5_error": 1.0, "validation/averaged_f1": 0.5, "train/loss": 1.0}
    assert sweep.on_trial_report(TrialReport(number=number, epoch=2, values=values)) == "stop"
    sweep.on_trial_ended(number, None)
    reason = "--metric must be one of f1, top5_error, got 'top1_error'; set another one"
    assert states(sweep) == [("stopped", reason)]
    assert sweep.next_task() is None


def test_a_non_finite_metric_does_not_stop_the_sweep(place: Place) -> None:
    sweep = place.sweep({"trials": 9})
    values = {"validation/raw_top5_error": 1.0}  # the other one was NaN
    assert sweep.on_trial_report(TrialReport(number=task(sweep).number, epoch=1, values=values, score=100.0)) != "stop"
