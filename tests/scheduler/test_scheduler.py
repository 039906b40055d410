import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint.checkpoint_dir import make_checkpoint_url
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.scheduler import scheduler
from orchestrator.scheduler.run_plan import PlannedRun, RunPlan
from orchestrator.scheduler.scheduler import CapacityMonitor, RunPhase, RunResult, Scheduler
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.config import Outcome, OutcomeStatus
from orchestrator.training.run_dir import get_checkpoints_dir
from tests.support.launched import recipe, spec, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "BACKOFF_SECONDS", (0.05, 0.1))
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(scheduler, "CAPACITY_POLL_SECONDS", 0.02)


def planned(specs: list[RunSpec], slots: int) -> RunPlan:
    return RunPlan(tuple(PlannedRun(run, 0.0, 1.0) for run in specs), slots, min(slots, len(specs)))


class Launcher:
    """A launch that does what each run's script says, one step a call, and notes who ran beside whom."""

    def __init__(self, **scripts: list[OutcomeStatus | Exception | Callable[[], Outcome]]) -> None:
        self.scripts, self.calls = scripts, list[str]()
        self.under_way = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, run: RunSpec) -> Outcome:
        name = run.recipe.name
        with self._lock:
            self.calls.append(name)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            time.sleep(0.02)
            script = self.scripts.get(name.replace("-", "_"), ["finished"])
            step = script.pop(0) if len(script) > 1 else script[0]
            if isinstance(step, Exception):
                raise step
            return Outcome(status=step, message=f"of {name}", samples=7) if isinstance(step, str) else step()
        finally:
            with self._lock:
                self.under_way -= 1


class Seen:
    """The changes of phases, and the threads that reported them."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, RunPhase, str]] = []
        self.threads: set[str] = set()

    def __call__(self, run: RunSpec, status: RunPhase, message: str) -> None:
        self.changes.append((run.recipe.name, status, message))
        self.threads.add(threading.current_thread().name)


def supervised(
    launcher: Launcher,
    names: list[str],
    at_once: int = 2,
    stop: threading.Event | None = None,
    storage: str = "/nowhere",
) -> tuple[dict[str, RunResult], Seen]:
    seen, specs = Seen(), [spec(recipe(name), storage) for name in names]
    ended = Scheduler(planned(specs, at_once), launcher, seen, stop or threading.Event()).run()
    assert list(sorted(ended)) == sorted(run.name for run in specs)
    return {name.rsplit("-", 1)[0]: end for name, end in ended.items()}, seen


def test_one_runs_failure_touches_no_other() -> None:
    launcher = Launcher(raises=[RuntimeError("boom")], diverges=["diverged"])
    ended, seen = supervised(launcher, ["a", "raises", "b", "diverges", "c"])
    assert {name: end.status for name, end in ended.items()} == {
        "a": "finished", "b": "finished", "c": "finished", "raises": "failed", "diverges": "failed",
    }  # fmt: skip
    assert ended["raises"].message == "RuntimeError: boom"
    assert ended["diverges"].message == "diverged: of diverges"
    assert ended["diverges"].outcome is not None
    assert ended["a"].outcome == Outcome(status="finished", message="of a", samples=7)
    assert seen.threads == {"MainThread"}
    for name, end in ended.items():
        changes = [change[1:] for change in seen.changes if change[0] == name]
        assert (changes[0], changes[-1]) == (("running", ""), (end.status, end.message))
        assert len(changes) == (6 if name == "raises" else 2)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_all_slots_are_used_and_no_more(at_once: int) -> None:
    launcher = Launcher()
    names = [f"r{number}" for number in range(7)]
    _, seen = supervised(launcher, names, at_once)
    assert launcher.most == at_once
    assert [name for name, status, _ in seen.changes if status == "running"] == names


def test_a_launch_that_raises_is_retried_after_growing_pauses() -> None:
    launcher = Launcher(shaky=[OSError("away"), "finished"], broken=[OSError("away"), OSError("still away")])
    ended, seen = supervised(launcher, ["shaky", "broken"], 1)
    assert (ended["shaky"].status, ended["shaky"].message) == ("finished", "")
    assert (ended["broken"].status, ended["broken"].message) == ("failed", "OSError: still away")
    assert sorted(launcher.calls) == ["broken", "broken", "broken", "shaky", "shaky"]
    assert [change[1:] for change in seen.changes if change[0] == "broken"] == [
        ("running", ""),
        ("waiting", "launch failed, retrying in 0.05 s: OSError: away"),
        ("running", "launched again after OSError: away"),
        ("waiting", "launch failed, retrying in 0.1 s: OSError: still away"),
        ("running", "launched again after OSError: still away"),
        ("failed", "OSError: still away"),
    ]


def test_while_a_run_waits_for_its_next_launch_others_have_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "BACKOFF_SECONDS", (0.3,))
    launcher = Launcher(shaky=[OSError("away"), "finished"])
    ended, _ = supervised(launcher, ["shaky", "b", "c"], 1)
    assert launcher.calls == ["shaky", "b", "c", "shaky"]
    assert {end.status for end in ended.values()} == {"finished"}


def test_launches_that_come_farther_are_not_counted_together(tmp_path: Path) -> None:
    run = spec(recipe("far"), str(tmp_path))
    samples = iter(range(100, 1000, 100))

    def crashes() -> Outcome:
        checkpoint_format.save(get_checkpoints_dir(run.folder), {"samples": 1}, next(samples), 1)
        raise OSError("the controller died")

    launcher = Launcher(far=[*[crashes] * 5, "finished"])
    ended, _ = supervised(launcher, ["far"], 1, storage=str(tmp_path))
    assert len(launcher.calls) == 6
    assert ended["far"].status == "finished"


def test_a_damaged_newest_checkpoint_hides_no_progress(tmp_path: Path) -> None:
    run = spec(recipe("far"), str(tmp_path))
    folder = get_checkpoints_dir(run.folder)
    checkpoint_format.save(folder, {"samples": 1}, 1000, 0)
    file_io.write_bytes(file_io.join(make_checkpoint_url(folder, 1000, 0), checkpoint_format.STATE_FILE), b"cut")
    samples = iter(range(100, 1000, 100))

    def crashes() -> Outcome:
        attempt, reached = attempts.create_attempt(run.folder, 1), next(samples)
        attempt.record_resume(reached - 100)
        checkpoint_format.save(folder, {"samples": 1}, reached, attempt.number)
        raise OSError("the controller died")

    launcher = Launcher(far=[*[crashes] * 5, "finished"])
    ended, _ = supervised(launcher, ["far"], 1, storage=str(tmp_path))
    assert ended["far"].status == "finished"


def test_unreachable_storage_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(folder: str) -> Iterator[None]:
        raise OSError(f"{folder}: away")

    monkeypatch.setattr("orchestrator.checkpoint.checkpoint_dir.iter_committed_checkpoints", away)
    ended, _ = supervised(Launcher(a=[OSError("launch")]), ["a", "b"])
    assert (ended["a"].status, ended["b"].status) == ("failed", "finished")


@pytest.mark.parametrize("status", ["diverged", "bad-data", "bad-checkpoint"])
def test_an_outcome_is_never_retried(status: OutcomeStatus) -> None:
    launcher = Launcher(run=[status])
    ended, _ = supervised(launcher, ["run"])
    assert launcher.calls == ["run"]
    assert (ended["run"].status, ended["run"].message) == ("failed", f"{status}: of run")


def test_after_a_stop_nothing_is_started_and_what_runs_is_waited_for() -> None:
    stop = threading.Event()

    def stopped() -> Outcome:
        stop.set()
        time.sleep(0.2)
        return Outcome(status="stopped", message="asked to stop", samples=3)

    launcher = Launcher(a=[stopped], b=[stopped])
    ended, seen = supervised(launcher, ["a", "b", "c", "d"], 2, stop)
    assert sorted(launcher.calls) == ["a", "b"]
    assert {end.status for end in ended.values()} == {"stopped"}
    assert ended["a"].outcome is not None
    assert ended["c"] == RunResult("stopped", "not started")
    assert not [change for change in seen.changes if change[0] in "cd"]


def test_a_failure_after_a_stop_is_a_stop_and_is_not_retried() -> None:
    stop = threading.Event()

    def killed() -> Outcome:
        stop.set()
        raise RuntimeError("the workers are gone")

    launcher = Launcher(a=[killed])
    ended, _ = supervised(launcher, ["a"], 1, stop)
    assert launcher.calls == ["a"]
    assert ended["a"] == RunResult("stopped", "RuntimeError: the workers are gone")


def test_a_stop_before_the_start_starts_nothing() -> None:
    stop = threading.Event()
    stop.set()
    launcher = Launcher()
    ended, _ = supervised(launcher, ["a", "b"], 2, stop)
    assert launcher.calls == []
    assert all(end.status == "stopped" for end in ended.values())


def test_a_stop_ends_the_wait_for_another_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "BACKOFF_SECONDS", (600.0,))
    stop = threading.Event()
    launcher = Launcher(a=[OSError("away")])
    timer = threading.Timer(0.2, stop.set)
    timer.daemon = True
    timer.start()
    ended, _ = supervised(launcher, ["a"], 1, stop)
    assert (ended["a"].status, launcher.calls) == ("stopped", ["a"])


# ------------------------------------------------------------------ nodes that come and go
@contextmanager
def released(launcher: Launcher, names: list[str]) -> Iterator[threading.Event]:
    """Runs of these names end when the event is set."""
    go = threading.Event()

    def held() -> Outcome:
        assert go.wait(10)
        return Outcome(status="finished", samples=7)

    launcher.scripts |= {name: [held] for name in names}
    try:
        yield go
    finally:
        go.set()


def in_background(made: RunPlan, launcher: Launcher, now: CapacityMonitor | None = None) -> list[dict[str, RunResult]]:
    """Supervise in a daemon thread; where the result will be."""
    result: list[dict[str, RunResult]] = []
    work = threading.Thread(
        target=lambda: result.append(Scheduler(made, launcher, Seen(), threading.Event(), now).run()), daemon=True
    )
    work.start()
    return result


def test_new_nodes_start_runs_and_lost_slots_are_not_filled() -> None:
    launcher, there = Launcher(), [1]
    names = [f"r{number}" for number in range(6)]
    specs = [spec(recipe(name)) for name in names]
    with released(launcher, names) as go, CapacityMonitor(1, lambda: there[0]) as now:
        result = in_background(planned(specs, 1), launcher, now)
        until(lambda: launcher.under_way == 1)
        there[0] = 3
        until(lambda: launcher.under_way == 3)
        there[0] = 1
        until(lambda: now.slots == 1)
        go.set()
        until(lambda: bool(result))
    assert launcher.most == 3
    assert {end.status for end in result[0].values()} == {"finished"}


def test_a_failed_capacity_query_leaves_the_last_number() -> None:
    calls = []

    def away() -> int:
        calls.append(1)
        raise ConnectionError("no answer")

    launcher = Launcher()
    specs = [spec(recipe(f"r{number}")) for number in range(4)]
    with CapacityMonitor(2, away) as now:
        until(lambda: len(calls) > 2)
        ended = Scheduler(planned(specs, 2), launcher, Seen(), threading.Event(), now).run()
        assert now.slots == 2
    assert launcher.most == 2
    assert {end.status for end in ended.values()} == {"finished"}


def test_a_capacity_query_that_hangs_delays_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "JOIN_TIMEOUT_SECONDS", 0.05)
    hang = threading.Event()
    began = time.monotonic()
    with CapacityMonitor(1, lambda: int(hang.wait(60))) as now:
        ended = Scheduler(planned([spec(recipe("a"))], 1), Launcher(), Seen(), threading.Event(), now).run()
    hang.set()
    assert [end.status for end in ended.values()] == ["finished"]
    assert time.monotonic() - began < 30


def test_a_change_of_the_capacity_is_reported() -> None:
    changes = []
    with CapacityMonitor(2, lambda: 5, lambda before, now: changes.append((before, now))) as now:
        until(lambda: now.slots == 5)
    assert changes == [(2, 5)]


def test_a_run_that_fits_nowhere_starts_and_waits_in_ray() -> None:
    launcher = Launcher()
    with CapacityMonitor(0, lambda: 0) as now:
        ended = Scheduler(planned([spec(recipe("a"))], 1), launcher, Seen(), threading.Event(), now).run()
    assert [end.status for end in ended.values()] == ["finished"]


def test_no_more_runs_are_under_way_than_the_placement_allows() -> None:
    launcher = Launcher()
    specs = [spec(recipe(f"r{number}"), at_once=2) for number in range(5)]
    with CapacityMonitor(9, lambda: 9) as now:
        Scheduler(planned(specs, 9), launcher, Seen(), threading.Event(), now).run()
    assert launcher.most == 2
