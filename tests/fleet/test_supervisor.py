import threading
import time
from collections.abc import Callable

import pytest

from orchestrator.fleet.plan import Plan
from orchestrator.fleet.supervisor import Ended, RunStatus, supervise
from orchestrator.launch.config import RunSpec
from orchestrator.training.job import Outcome, Status
from tests.support.launched import recipe, spec


class Launcher:
    """A launch that does what each run's script says, one step a call, and notes who ran beside whom."""

    def __init__(self, **scripts: list[Status | Exception | Callable[[], Outcome]]) -> None:
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
    """The changes of state, and the thread that told them."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, RunStatus, str]] = []
        self.threads: set[str] = set()

    def __call__(self, run: RunSpec, status: RunStatus, message: str) -> None:
        self.changes.append((run.recipe.name, status, message))
        self.threads.add(threading.current_thread().name)


def supervised(
    launcher: Launcher, names: list[str], at_once: int = 2, stop: threading.Event | None = None
) -> tuple[dict[str, Ended], Seen]:
    seen, specs = Seen(), tuple(spec(recipe(name)) for name in names)
    ended = supervise(Plan(specs, at_once, 1.0), launcher, seen, stop or threading.Event())
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
        assert [change[1:] for change in seen.changes if change[0] == name] == [
            ("running", ""), (end.status, end.message),
        ]  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_at_most_so_many_are_under_way_and_the_slots_are_used(at_once: int) -> None:
    launcher = Launcher()
    names = [f"r{number}" for number in range(7)]
    _, seen = supervised(launcher, names, at_once)
    assert launcher.most == at_once
    assert [name for name, status, _ in seen.changes if status == "running"] == names


def test_a_launch_that_raises_is_tried_once_more() -> None:
    launcher = Launcher(shaky=[OSError("away"), "finished"], broken=[OSError("away"), OSError("still away")])
    ended, _ = supervised(launcher, ["shaky", "broken"], 1)
    assert (ended["shaky"].status, ended["shaky"].message) == ("finished", "")
    assert (ended["broken"].status, ended["broken"].message) == ("failed", "OSError: still away")
    assert launcher.calls == ["shaky", "shaky", "broken", "broken"]


@pytest.mark.parametrize("status", ["diverged", "bad-data", "bad-checkpoint"])
def test_an_outcome_is_never_tried_again(status: Status) -> None:
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
    assert ended["c"] == Ended("stopped", "not started")
    assert not [change for change in seen.changes if change[0] in "cd"]


def test_a_failure_after_a_stop_is_a_stop_and_is_not_tried_again() -> None:
    stop = threading.Event()

    def killed() -> Outcome:
        stop.set()
        raise RuntimeError("the workers are gone")

    launcher = Launcher(a=[killed])
    ended, _ = supervised(launcher, ["a"], 1, stop)
    assert launcher.calls == ["a"]
    assert ended["a"] == Ended("stopped", "RuntimeError: the workers are gone")


def test_a_stop_before_the_start_starts_nothing() -> None:
    stop = threading.Event()
    stop.set()
    launcher = Launcher()
    ended, _ = supervised(launcher, ["a", "b"], 2, stop)
    assert launcher.calls == []
    assert all(end.status == "stopped" for end in ended.values())
