"""Training several runs in a session: planned, reported, skipped and recorded."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.ray_backend.session import Session
from orchestrator.recipe.recipe_file import Provenance
from orchestrator.scheduler import multi_run, scheduler
from orchestrator.scheduler.config import PlanConfig
from orchestrator.storage import file_io
from orchestrator.training.config import Outcome
from tests.support import tiny_shards
from tests.support.launched import recipe, spec

DONE = Outcome(status="finished", samples=26)


class FakeSession:
    """A session whose runs end immediately, as their names say."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.manifest = tiny_shards.dataset(folder / "data")
        self.capacity, self.gpus = ClusterCapacity((Node(cpus, 0),)), 0.0
        self.console = Console(quiet=True)
        self.interruption = SimpleNamespace(event=threading.Event())
        self.said: list[str] = []
        self.final_statuses: dict[str, str] = {}
        self.trained: list[str] = []
        self.recorder = self

    def print_line(self, text: str) -> None:
        self.said.append(text)

    def make_run_key(self, spec: RunSpec, parent: str | None = None) -> str:
        return self.make_tracking_key(spec.name, parent or "")

    def make_tracking_key(self, name: str, parent: str = "") -> str:
        return f"{parent}/{name}"

    def record_run(self, run: RunSpec, parent: str | None = None) -> str:
        return self.make_tracking_key(run.name, parent or "")

    def set_final_status(self, key: str, status: str) -> None:
        self.final_statuses[key] = status

    def train_run(self, run: RunSpec, parent: str | None = None) -> Outcome:
        name = run.recipe.name
        self.trained.append(name)
        return Outcome(status="diverged", message="loss nan", samples=3) if "diverges" in name else DONE


def trained(session: FakeSession, specs: list[RunSpec], *rest: Any) -> multi_run.MultiRunResult:
    return multi_run.train_runs(cast(Session, session), specs, "parent", *rest)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.02)


def specs_of(folder: Path, *names: str) -> list[RunSpec]:
    return [spec(recipe(name, batch_size=4), str(folder)) for name in names]


def test_a_member_that_diverges_leaves_six_of_seven(tmp_path: Path) -> None:
    session = FakeSession(tmp_path)
    runs = specs_of(tmp_path, "m1", "m2", "m3-diverges", "m4", "m5", "m6", "m7")
    result = trained(session, runs)
    assert list(result.results) == [run.name for run in runs]
    assert [end.status for end in result.results.values()] == ["finished"] * 2 + ["failed"] + ["finished"] * 4
    assert session.said[0] == "training 7 models, 2 at a time in 4 waves"
    assert f"{runs[2].name}: failed: diverged: loss nan" in session.said
    assert session.final_statuses[f"parent/{runs[2].name}"] == "FAILED"
    assert list(session.final_statuses.values()).count("FINISHED") == 6


def test_a_storage_that_two_drivers_could_write_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_io, "find_conditional_create_problem", lambda url: f"{url} has no locks")
    session = FakeSession(tmp_path)
    trained(session, specs_of(tmp_path, "m1"))
    assert f"warning: storage: {tmp_path} has no locks" in session.said


def test_a_recipe_that_was_tuned_on_other_data_is_warned_of_once(tmp_path: Path) -> None:
    session = FakeSession(tmp_path)
    origin = Provenance(sweep="s", trial="t1", dataset_digest="another")
    runs = [run.model_copy(update={"provenance": origin}) for run in specs_of(tmp_path, "a", "b")]
    trained(session, runs)
    warning = f"warning: the recipe was tuned on a dataset of digest another, this one's is {runs[0].dataset_digest}"
    assert [text.partition(": it may")[0] for text in session.said if "tuned on" in text] == [warning]


def test_with_a_speed_the_plan_is_printed_in_minutes(tmp_path: Path) -> None:
    session = FakeSession(tmp_path)
    trained(session, specs_of(tmp_path, "a", "b", "c"), PlanConfig(images_per_second=1.0, start_seconds=0.0))
    # Twice two epochs of 12 images and 5 to validate with, at one a second.
    assert session.said[0] == "training 3 models, 2 at a time in 2 waves, about 0:55"


def test_finished_runs_are_not_retrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, runs = FakeSession(tmp_path), specs_of(tmp_path, "a", "b")
    monkeypatch.setattr(multi_run, "load_finished_outcome", lambda folder: DONE if folder == runs[0].folder else None)
    result = trained(session, runs)
    assert session.trained == ["b"]
    assert result.results[runs[0].name].outcome == DONE
    assert session.said[0] == "1 of 2 models are trained already"
