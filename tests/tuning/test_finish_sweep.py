"""The lines of a sweep before its start and at its end, its name, and the version of the code."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.recipe.presets import googlenet_digits
from orchestrator.tuning import finish_sweep, named_spaces
from orchestrator.tuning.config import TuneJob
from orchestrator.tuning.finish_sweep import describe_spent
from orchestrator.tuning.run_sweep import SweepPlan, SweepResult
from orchestrator.tuning.trial import Trial
from tests.tuning import made

FLAG = "; --budget.trials 4 is used up; set a larger one to try what is left of the space"


def explored(*trials: Trial, enough: str = "", **search: object) -> SweepResult:
    """A sweep of at most four trials that came to these."""
    base = googlenet_digits()
    job = TuneJob.from_dict({"recipe": base.to_dict(), "search": search, "budget": {"trials": 4}})
    return SweepResult(
        SweepPlan(job, base, named_spaces.find_space("schedules", base), "0" * 16), "/sweep", "key", trials, enough
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


def test_the_dry_run_shows_the_rungs_the_grace_times_the_reduction() -> None:
    lines = finish_sweep.format_plan(explored().plan)
    assert "scheduler: asha, rungs at epochs [6, 18]" in lines
    assert lines[-4].startswith("  t001: {'schedule.base_rate': ")
    grown = finish_sweep.format_plan(explored(grace_epochs=3).plan)
    assert "scheduler: asha, rungs at epochs [3, 9]" in grown


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


# ------------------------------------------------------------------ the version of the code
def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A package of two files."""
    made = tmp_path / "clone"
    (made / "orchestrator" / "room").mkdir(parents=True)
    (made / "orchestrator" / "one.py").write_text("1\n")
    (made / "orchestrator" / "room" / "two.py").write_text("2\n")
    return made


def test_a_copy_is_known_by_its_contents_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "job")
    version = finish_sweep.get_code_version(root)
    assert version.startswith("sha256:")
    assert finish_sweep.get_code_version(tmp_path / "job") == version
    (tmp_path / "job" / "orchestrator" / "room" / "two.py").write_text("3\n")
    assert finish_sweep.get_code_version(tmp_path / "job") != version
    (root / "orchestrator" / "one.py").rename(root / "orchestrator" / "other.py")
    assert finish_sweep.get_code_version(root) != version, "names count, too"


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_a_checkout_is_known_by_its_commit_with_packed_references_and_in_a_worktree(root: Path, tmp_path: Path) -> None:
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    commit = git(root, "rev-parse", "HEAD")
    assert finish_sweep.get_code_version(root) == commit
    git(root, "pack-refs", "--all")
    assert finish_sweep.get_code_version(root) == commit
    git(root, "worktree", "add", "-q", str(tmp_path / "tree"))
    assert finish_sweep.get_code_version(tmp_path / "tree") == commit
    (root / "orchestrator" / "one.py").write_text("changed\n")
    assert finish_sweep.get_code_version(root) == f"{commit}, changed: {finish_sweep.compute_source_digest(root)}"


def test_a_folder_inside_of_another_checkout_is_none(root: Path) -> None:
    subprocess.run(["git", "-C", str(root.parent), "init", "-q"], check=False)
    assert finish_sweep.get_code_version(root).startswith("sha256:")


def test_this_package_has_a_version() -> None:
    assert finish_sweep.get_code_version()
