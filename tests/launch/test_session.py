"""A session's runs: one is stopped by itself, a stop by the user stops all."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.data.packer import pack
from orchestrator.launch import session as sessions
from orchestrator.launch.config import RunSpec
from orchestrator.launch.lease import Lease
from orchestrator.launch.session import Session
from orchestrator.training.job import Outcome
from tests.support import launched, shards
from tests.support import sessions as support
from tests.support.launched import until


class Launches:
    """Stands for Ray: a run goes on until its stop flag is there, or until `done` is set."""

    def __init__(self) -> None:
        self.under_way: dict[str, Lease] = {}
        self.done = threading.Event()

    def __call__(self, spec: RunSpec, held: Lease, gpus: float) -> Outcome:
        self.under_way[spec.name] = held
        until(lambda: self.done.is_set() or held.stop_requested(), 20)
        return Outcome(status="finished" if self.done.is_set() else "stopped")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(sessions, "launch", made)
    monkeypatch.setattr(sessions, "FLAG_SECONDS", 0.02)
    monkeypatch.setattr(Session, "follow", lambda *_: "key")
    monkeypatch.setattr(Session, "_preview", lambda *_: None)
    return made


@pytest.fixture
def session(tmp_path: Path) -> Session:
    pack(str(tmp_path / "data"), "tiny", shards.CLASSES, {"validation": shards.samples(2)}, 2)
    return support.session(tmp_path)


def specs(tmp_path: Path) -> list[RunSpec]:
    return [launched.spec(launched.recipe(name), str(tmp_path)) for name in ("one", "other")]


def test_one_run_is_stopped_and_launched_again_while_the_other_goes_on(
    tmp_path: Path, session: Session, launches: Launches
) -> None:
    one, other = specs(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(session.train, one), pool.submit(session.train, other)
        until(lambda: len(launches.under_way) == 2)
        session.stop_one(one)
        assert first.result(20).status == "stopped"
        again = pool.submit(session.train, one)
        until(lambda: launches.under_way[one.name].number == 2)
        assert not launches.under_way[one.name].stop_requested()
        assert not second.done()
        assert not session.interruption.event.is_set()
        launches.done.set()
        assert (again.result(20).status, second.result(20).status) == ("finished", "finished")


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_stop_by_the_user_stops_all(asked_before: bool, tmp_path: Path, session: Session, launches: Launches) -> None:
    one, other = specs(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(session.train, spec) for spec in (one, other)]
        until(lambda: len(launches.under_way) == 2)
        launches.under_way[one.name].request_stop()  # as jobs/stop.py does
        if asked_before:
            session.stop_one(one)
        assert [run.result(20).status for run in runs] == ["stopped", "stopped"]
        assert session.interruption.event.is_set()


def test_a_run_that_is_not_under_way_is_left(tmp_path: Path, session: Session, launches: Launches) -> None:
    session.stop_one(specs(tmp_path)[0])
    assert not session.interruption.event.is_set()


class Tracked:
    """Stands for the replayer: how long it was waited for."""

    def __init__(self, clean: bool) -> None:
        self.clean = clean
        self.cause = "MLflow is down."
        self.waits: list[float] = []

    def drain(self, timeout: float) -> bool:
        self.waits.append(timeout)
        return self.clean

    def run_url(self, key: str, timeout: float) -> str:
        return "http://there"

    def stop(self, statuses: dict[str, str], timeout: float) -> bool:
        self.waits.append(timeout)
        return self.clean


@pytest.mark.parametrize(("clean", "waits"), [(True, [60.0, 60.0]), (False, [60.0, 10.0])])
def test_a_tracker_that_was_waited_for_in_vain_is_not_waited_for_as_long_again(
    clean: bool, waits: list[float], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked, said = Tracked(clean), []
    monkeypatch.setattr(Session, "say", lambda _, text: said.append(text))
    session.replayer = tracked  # type: ignore[assignment]
    session.tell_places("/r", "key")
    lacking = sessions._close(session)
    assert tracked.waits == waits
    assert (lacking is None) is clean
    assert lacking is None or "not everything is recorded: MLflow is down." in lacking
    assert lacking is None or "run the same command again" in lacking
