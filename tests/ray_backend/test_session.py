"""The runs of a session: a stop of one stops all; each has its identity in the tracker."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.data.build.tar_writer import write_dataset
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend import session as sessions
from orchestrator.ray_backend.launch_errors import PreflightError
from orchestrator.ray_backend.run_spec import Destination, RunSpec
from orchestrator.ray_backend.session import RunRecorder, Session
from orchestrator.recipe.recipe_file import Provenance
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.tracking.replay import JournalReplayer
from orchestrator.tracking.tracker import Tracker
from orchestrator.training.config import Outcome
from tests.support import launched, tiny_shards
from tests.support import sessions as support
from tests.support.launched import until
from tests.support.tracker import RecordingTracker


class Launches:
    """Stands for Ray: a run lasts until its stop flag is there, or until `done` is set."""

    def __init__(self) -> None:
        self.under_way: dict[str, str] = {}
        self.done = threading.Event()

    def __call__(self, spec: RunSpec, stop_flag: str, successor: str, gpus: float) -> Outcome:
        self.under_way[spec.name] = stop_flag
        until(lambda: self.done.is_set() or file_io.exists(stop_flag), 20)
        return Outcome(status="finished" if self.done.is_set() else "stopped")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(sessions, "launch_run", made)
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(RunRecorder, "record_run", lambda *_: "key")
    monkeypatch.setattr(RunRecorder, "submit", lambda *_: None)
    return made


@pytest.fixture
def session(tmp_path: Path) -> Session:
    write_dataset(str(tmp_path / "data"), "tiny", tiny_shards.CLASSES, {"validation": tiny_shards.samples(2)}, 2)
    return support.session(tmp_path)


def specs(tmp_path: Path) -> list[RunSpec]:
    return [launched.spec(launched.recipe(name), str(tmp_path)) for name in ("one", "other")]


def test_the_stop_flag_of_one_run_stops_all(tmp_path: Path, session: Session, launches: Launches) -> None:
    one, other = specs(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(session.train_run, spec) for spec in (one, other)]
        until(lambda: len(launches.under_way) == 2)
        file_io.write_bytes(launches.under_way[one.name], b"")  # as jobs/stop.py does
        assert [run.result(20).status for run in runs] == ["stopped", "stopped"]
        assert session.interruption.event.is_set()
    assert lease.read_lease(one.folder).released  # type: ignore[union-attr]


def test_an_unsupported_tracking_uri_is_a_problem_to_fix_before_the_start(tmp_path: Path) -> None:
    places = Destination(data="digits", storage=str(tmp_path), tracking="postgresql://host/mlflow")
    with pytest.raises(PreflightError, match=r"^tracking: .*'postgresql' is not supported; give http"):
        sessions._make_tracker_factory(places)


# ------------------------------------------------------------------ identity in the tracker
def test_a_storage_has_the_same_keys_wherever_it_lies(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "a" / "data"), "tiny", tiny_shards.CLASSES, {"validation": tiny_shards.samples(2)}, 2)
    write_dataset(
        str(tmp_path / "other" / "data"), "tiny", tiny_shards.CLASSES, {"validation": tiny_shards.samples(2)}, 2
    )
    key = support.session(tmp_path / "a").recorder.make_tracking_key("run", "/parent")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert support.session(tmp_path / "link").recorder.make_tracking_key("run", "/parent") == key
    (tmp_path / "a").rename(tmp_path / "b")
    assert support.session(tmp_path / "b").recorder.make_tracking_key("run", "/parent") == key
    assert support.session(tmp_path / "other").recorder.make_tracking_key("run", "/parent") != key


def test_a_run_is_recorded_with_its_recipe_and_where_that_comes_from(tmp_path: Path, session: Session) -> None:
    tracker = RecordingTracker()

    def factory() -> Tracker:
        return tracker

    recorder = RunRecorder(str(tmp_path), "tiny", JournalReplayer(factory, poll_seconds=0.01))
    origin = Provenance(sweep="tiny-pbt", trial="t003")
    one, other = specs(tmp_path)
    keys = [recorder.record_run(run) for run in (one, other.model_copy(update={"provenance": origin}))]
    assert recorder.close(interrupted=False) is None
    plain, tuned = (tracker.runs[f"id-{key}"] for key in keys)
    assert (plain.tags["orchestrator.folder"], plain.texts) == (one.folder, {"recipe.json": one.recipe.to_json()})
    assert plain.tags["orchestrator.dataset"] == f"tiny {one.dataset_digest}"
    assert "orchestrator.sweep" not in plain.tags
    assert tuned.tags["orchestrator.sweep"] == "tiny-pbt t003"
    assert tuned.texts["provenance.json"] == origin.to_json()


def test_a_storage_that_takes_no_id_is_named(tmp_path: Path, session: Session) -> None:
    (tmp_path / "storage.json").write_text("{}")
    with pytest.raises(StorageError, match=r"storage\.json: must be"):
        session.recorder.make_tracking_key("run")


def test_the_dataset_of_a_moved_storage_is_found(tmp_path: Path) -> None:
    run = launched.spec(launched.recipe("one"), f"{tmp_path}/old")
    inside = run.destination.model_copy(update={"data": f"{tmp_path}/old/data/digits"})
    outside = run.destination.model_copy(update={"data": "/elsewhere/data"})
    for destination, found in ((inside, f"{tmp_path}/new/data/digits"), (outside, "/elsewhere/data")):
        spec = run.model_copy(update={"destination": destination})
        assert run_lookup.resolve_dataset_url(spec.to_dict(), f"{tmp_path}/new/models/{run.name}") == found
        assert run_lookup.resolve_dataset_url(spec.to_dict(), spec.folder) == destination.data
    (tmp_path / "old" / "data" / "digits").mkdir(parents=True)
    (tmp_path / "old" / "data" / "digits" / "manifest.json").write_text("{}")
    spec = run.model_copy(update={"destination": inside})
    assert run_lookup.resolve_dataset_url(spec.to_dict(), f"{tmp_path}/new/models/{run.name}") == inside.data, (
        "it is still there"
    )


class Tracked:
    """Stands for the replayer: how long it was waited for."""

    def __init__(self, clean: bool) -> None:
        self.clean = clean
        self.first_error = "MLflow is down."
        self.waits: list[float] = []

    def drain(self, timeout: float) -> bool:
        self.waits.append(timeout)
        return self.clean

    def wait_for_run_url(self, key: str, timeout: float) -> str:
        return "http://there"

    def stop(self, statuses: dict[str, str], timeout: float) -> bool:
        self.waits.append(timeout)
        return self.clean


@pytest.mark.parametrize(("clean", "waits"), [(True, [60.0, 60.0]), (False, [60.0, 10.0])])
def test_after_a_drain_that_timed_out_the_end_waits_less(
    clean: bool, waits: list[float], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked, said = Tracked(clean), []
    monkeypatch.setattr(Session, "print_line", lambda _, text: said.append(text))
    session.recorder.replayer = tracked  # type: ignore[assignment]
    session.print_locations("/r", "key")
    lacking = session.recorder.close(interrupted=False)
    assert tracked.waits == waits
    assert (lacking is None) is clean
    assert lacking is None or "not everything is recorded: MLflow is down." in lacking
    assert lacking is None or "run the same command again" in lacking


def test_a_run_has_one_key_whichever_ensemble_it_is_in_and_one_of_a_sweep_is_the_sweeps(
    tmp_path: Path, session: Session
) -> None:
    own = specs(tmp_path)[0]
    own = own.model_copy(update={"destination": session.destination})
    assert (
        session.recorder.make_run_key(own)
        == session.recorder.make_run_key(own, "/x7@a")
        == session.recorder.make_run_key(own, "/x8@a")
    )
    places = session.destination.model_copy(update={"storage": f"{session.destination.storage}/sweeps/s"})
    trial = own.model_copy(update={"destination": places})
    assert (
        session.recorder.make_run_key(trial, "/sweep@a")
        == session.recorder.make_tracking_key(own.name, "/sweep@a")
        != session.recorder.make_run_key(trial, "/other@a")
    )
