"""Training a fleet in a session: what is planned, told, skipped, recorded and given more workers."""

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
from orchestrator.scheduler.progress import ProgressMonitor
from orchestrator.training.config import Outcome
from tests.support import tiny_shards
from tests.support.launched import recipe, spec

DONE = Outcome(status="finished", samples=26)


class FakeSession:
    """What a fleet uses of a session; every run ends at once as its name says."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.manifest = tiny_shards.dataset(folder / "data")
        self.capacity, self.gpus = ClusterCapacity((Node(cpus, 0),)), 0.0
        self.console = Console(quiet=True)
        self.interruption = SimpleNamespace(event=threading.Event())
        self.said: list[str] = []
        self.final_statuses: dict[str, str] = {}
        self.trained: list[tuple[str, int]] = []
        self.hold: dict[str, threading.Event] = {}

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
        name, workers = run.recipe.name, run.placement.workers
        self.trained.append((name, workers))
        if name in self.hold and workers == 1:
            assert self.hold[name].wait(10)
            return Outcome(status="stopped", samples=13)
        return Outcome(status="diverged", message="loss nan", samples=3) if "diverges" in name else DONE


def trained(session: FakeSession, specs: list[RunSpec], *rest: Any) -> multi_run.MultiRunResult:
    return multi_run.train_runs(cast(Session, session), specs, "parent", *rest)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(scheduler, "WIDEN_SECONDS", 0.02)


def specs_of(folder: Path, *names: str) -> list[RunSpec]:
    return [spec(recipe(name, batch_size=4), str(folder)) for name in names]


def test_a_member_that_diverges_leaves_six_of_seven(tmp_path: Path) -> None:
    session = FakeSession(tmp_path)
    runs = specs_of(tmp_path, "m1", "m2", "m3-diverges", "m4", "m5", "m6", "m7")
    result = trained(session, runs)
    assert list(result.results) == [run.name for run in runs]
    assert (len(result.list_runs("finished")), result.list_runs("failed")) == (6, [runs[2].name])
    assert session.said[0] == "training 7 models, 2 at once in 4 waves"
    assert f"{runs[2].name}: failed: diverged: loss nan" in session.said
    assert session.final_statuses[f"parent/{runs[2].name}"] == "FAILED"
    assert list(session.final_statuses.values()).count("FINISHED") == 6


def test_with_a_speed_the_plan_is_told_in_minutes(tmp_path: Path) -> None:
    session = FakeSession(tmp_path)
    trained(session, specs_of(tmp_path, "a", "b", "c"), PlanConfig(images_per_second=1.0, start_seconds=0.0))
    # Twice two epochs of 12 images and 5 to validate with, at one a second.
    assert session.said[0] == "training 3 models, 2 at once in 2 waves, about 0:55"


def test_a_recipe_that_was_tuned_on_other_data_is_warned_of_once(tmp_path: Path) -> None:
    session = FakeSession(tmp_path)
    origin = Provenance(sweep="s", trial="t1", dataset_digest="another")
    runs = [run.model_copy(update={"provenance": origin}) for run in specs_of(tmp_path, "a", "b")]
    trained(session, runs)
    assert [text for text in session.said if "tuned on" in text] == [f"warning: {runs[0].dataset_warning}"]


def test_what_is_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, runs = FakeSession(tmp_path), specs_of(tmp_path, "a", "b")
    monkeypatch.setattr(multi_run, "load_finished_outcome", lambda folder: DONE if folder == runs[0].folder else None)
    result = trained(session, runs)
    assert [name for name, _ in session.trained] == ["b"]
    assert result.results[runs[0].name].outcome == DONE
    assert session.said[0] == "1 of 2 models are trained already"


@pytest.mark.parametrize("may", [True, False])
def test_the_last_run_is_widened_only_when_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may: bool
) -> None:
    session = FakeSession(tmp_path)
    session.hold["long"] = threading.Event()
    monkeypatch.setattr(ProgressMonitor, "estimate_seconds_left", lambda *_: 1000.0)
    (short, long), asked = specs_of(tmp_path, "short", "long"), list[str]()

    def stop_run(run: RunSpec) -> None:
        asked.append(run.recipe.name)
        session.hold["long"].set()

    if not may:
        timer = threading.Timer(0.3, session.hold["long"].set)
        timer.daemon = True
        timer.start()
    result = trained(session, [short, long], PlanConfig(most_workers=2 if may else None), stop_run)
    assert asked == (["long"] if may else [])
    assert result.list_runs("finished") == ([short.name, long.name] if may else [short.name])
    assert (("long", 2) in session.trained) == may
