"""What a sweep says at its end."""

from dataclasses import replace

import pytest

from orchestrator.recipe.presets import googlenet_digits
from orchestrator.tuning import named_spaces
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.finish_sweep import describe_spent
from orchestrator.tuning.run_sweep import SweepPlan, SweepResult
from orchestrator.tuning.trial import Trial
from tests.tuning import made

FLAG = "; --budget.trials 4 is used up; set a larger one to try more"


def explored(*trials: Trial, enough: str = "", **search: object) -> SweepResult:
    """A sweep of at most four trials that came to these."""
    base = googlenet_digits()
    job = TuneJob.from_dict({"recipe": base.to_dict(), "search": search, "budget": {"trials": 4}})
    return SweepResult(
        SweepPlan(job, base, named_spaces.find_space("schedules", base), "0" * 16), "/sweep", "key", trials, enough, 0
    )


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_spent_budget_of_trials_names_its_flag(sampler: str) -> None:
    ended = [made.trial(number, [10.0]) for number in (1, 2, 3, 4)]
    assert describe_spent(explored(*ended, sampler=sampler)).endswith(FLAG)
    assert "--budget" not in describe_spent(explored(ended[0], sampler=sampler))


def test_trials_that_can_resume_name_what_ended_them() -> None:
    trials = made.trial(1, [10.0]), made.trial(2, [10.0], "stopped")
    message = describe_spent(explored(*trials, enough="--budget.epochs 3 is used up; set a larger one"))
    assert message.endswith("; 1 can resume: --budget.epochs 3 is used up; set a larger one")


def test_a_sweep_keeps_its_name() -> None:
    """Sweeps of earlier versions are found again; a direction other than theirs is another sweep."""
    plan = explored().plan
    assert plan.name == "googlenet-digits-sweep-765a896cc7"
    job = plan.job.model_copy(update={"search": plan.job.search.model_copy(update={"mode": "min"})})
    assert replace(plan, job=job).name == plan.name
    search = plan.job.search.model_copy(update={"metric": "f1", "mode": "max"})
    maximized = replace(plan, job=plan.job.model_copy(update={"search": search}))
    search = search.model_copy(update={"mode": "min"})
    assert maximized.name != replace(plan, job=plan.job.model_copy(update={"search": search})).name
