import json
import math
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest
from mlflow.entities import Metric, Run, ViewType
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import OperationalError

from orchestrator.tracking import mlflow_errors, mlflow_tracker
from orchestrator.tracking.mlflow_tracker import HEARTBEAT_TAG, KEY_TAG, MlflowTracker
from orchestrator.tracking.tracker import MetricPoint, TrackedRun, TrackerUnreachableError, TrackingError

NOW = 1_700_000_000.0


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the file: a fresh one costs two seconds of migrations."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/deep/mlflow.db"


@pytest.fixture
def tracker(database: str, request: pytest.FixtureRequest) -> MlflowTracker:
    return MlflowTracker(database, request.node.name)


@pytest.fixture
def again(database: str, request: pytest.FixtureRequest) -> Callable[[], MlflowTracker]:
    """Another driver on the same experiment."""
    return lambda: MlflowTracker(database, request.node.name)


@pytest.fixture
def client(database: str) -> MlflowClient:
    return MlflowClient(database, database)


def run_named(name: str, **more: object) -> TrackedRun:
    return TrackedRun(f"key-{name}", name, **more)  # type: ignore[arg-type]


def curve(*steps: int, name: str = "loss") -> list[MetricPoint]:
    return [MetricPoint(name, float(step) / 2, step, NOW + step) for step in steps]


def steps(client: MlflowClient, run_id: str, name: str = "loss") -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def test_new_run(tracker: MlflowTracker, client: MlflowClient) -> None:
    tracker.check()
    run_id = tracker.open_run(run_named("a", params={"lr": "0.1", "long": "x" * 7000}, tags={"host": "h1"}))
    tracker.log_metrics(
        run_id, [*curve(10, 20), MetricPoint("bad", math.nan, 20, NOW), MetricPoint("huge", math.inf, 20, NOW)]
    )
    run = client.get_run(run_id)
    assert run.info.run_name == "a"
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "0.1", "long": "x" * 6000}
    assert run.data.tags["host"] == "h1"
    assert run.data.tags[KEY_TAG] == "key-a"
    assert float(run.data.tags[HEARTBEAT_TAG]) == pytest.approx(time.time(), abs=60)
    (first, second) = client.get_metric_history(run_id, "loss")
    assert isinstance(first, Metric)
    assert (first.value, first.step, first.timestamp) == (5.0, 10, 1_700_000_010_000)
    assert second.step == 20
    assert math.isnan(run.data.metrics["bad"])
    assert run.data.metrics["huge"] > 1e300


def test_a_key_finds_its_run_permanently(
    tracker: MlflowTracker,
    again: Callable[[], MlflowTracker],
    client: MlflowClient,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_id = tracker.open_run(run_named("a", params={"lr": "0.1"}))
    tracker.log_metrics(run_id, curve(10, 20, 30))
    tracker.close_run(run_id, "KILLED")
    ended = client.get_run(run_id).info
    assert ended.status == "KILLED"
    assert ended.end_time / 1000 == pytest.approx(time.time(), abs=60)

    later = again()
    assert later.open_run(run_named("a", params={"lr": "0.2", "new": "1"}, tags={"host": "h2"})) == run_id
    later.log_metrics(run_id, curve(20, 30, 40))
    later.log_metrics(run_id, curve(30, 40, 50))
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"lr": "0.1", "new": "1"}
    assert "['lr']" in caplog.text
    assert run.data.tags["host"] == "h2"
    assert steps(client, run_id) == [10, 20, 30, 40, 50]


def test_replay_of_part_of_the_metrics_makes_no_duplicates(
    tracker: MlflowTracker, again: Callable[[], MlflowTracker], client: MlflowClient
) -> None:
    run_id = tracker.open_run(run_named("a"))
    tracker.log_metrics(run_id, [*curve(10, 20), *curve(10, name="top5")])
    later = again()
    later.log_metrics(run_id, [*curve(10, 20, 30), *curve(10, 20, 30, name="top5"), *curve(5, name="new")])
    assert steps(client, run_id) == [10, 20, 30]
    assert steps(client, run_id, "top5") == [10, 20, 30]
    assert steps(client, run_id, "new") == [5]


def test_lost_answer_makes_no_duplicates(
    tracker: MlflowTracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = tracker.open_run(run_named("a"))
    real = MlflowClient.log_batch

    def lose_answer(self: MlflowClient, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        raise ConnectionError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lose_answer)
        with pytest.raises(TrackerUnreachableError, match="the answer was lost"):
            tracker.log_metrics(run_id, curve(10, 20))
    # Same steps, other values: only the last-step rule can tell that they are there already.
    tracker.log_metrics(run_id, [MetricPoint("loss", 99.0, step, NOW + step) for step in (10, 20, 30)])
    assert [metric.value for metric in client.get_metric_history(run_id, "loss")] == [5.0, 10.0, 99.0]


def test_many_points_params_and_tags(tracker: MlflowTracker, client: MlflowClient) -> None:
    many = {f"name{index}": str(index) for index in range(250)}
    run_id = tracker.open_run(run_named("a", params=many, tags=many))
    tracker.log_metrics(run_id, curve(*range(2500)))
    tracker.set_tags(run_id, {"long": "y" * 9000})
    run = client.get_run(run_id)
    assert run.data.params == many
    assert many.items() <= run.data.tags.items()
    assert run.data.tags["long"] == "y" * 5000
    assert steps(client, run_id) == list(range(2500))


def test_names_that_mlflow_rejects_are_corrected(tracker: MlflowTracker, client: MlflowClient) -> None:
    run_id = tracker.open_run(run_named("a", params={"lr(base)": "1"}))
    tracker.log_metrics(run_id, [MetricPoint("top5@144 crops %", 7.9, 1, NOW)])
    tracker.log_metrics(run_id, [MetricPoint("top5@144 crops %", 7.9, 1, NOW)])
    assert client.get_run(run_id).data.params == {"lr_base_": "1"}
    assert steps(client, run_id, "top5_144 crops _") == [1]


def test_nesting(tracker: MlflowTracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tracker.open_run(run_named("ensemble"))
    child = tracker.open_run(run_named("member", parent_id=parent))
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert parent != child


def test_a_run_that_is_nested_stays_where_it_is(tracker: MlflowTracker, client: MlflowClient) -> None:
    first, second = (tracker.open_run(run_named(name)) for name in ("x7", "x8"))
    member = tracker.open_run(TrackedRun("/m_1@a", "m_1", parent_id=first))
    assert tracker.open_run(TrackedRun("/m_1@a", "m_1", parent_id=second)) == member
    assert tracker.open_run(TrackedRun("/m_1@a", "m_1")) == member
    assert client.get_run(member).data.tags["mlflow.parentRunId"] == first
    fresh = tracker.open_run(TrackedRun("/m_2@a", "m_2"))
    assert tracker.open_run(TrackedRun("/m_2@a", "m_2", parent_id=second)) == fresh
    assert client.get_run(fresh).data.tags["mlflow.parentRunId"] == second


def test_run_id_in_the_environment_is_scrubbed(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "another tool's")
    MlflowTracker(database, "x")
    assert "MLFLOW_RUN_ID" not in os.environ


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_final_status(tracker: MlflowTracker, client: MlflowClient, status: str) -> None:
    run_id = tracker.open_run(run_named("a"))
    tracker.close_run(run_id, status)  # type: ignore[arg-type]
    assert client.get_run(run_id).info.status == status


def test_artifacts_lie_beside_the_database(
    tracker: MlflowTracker,
    client: MlflowClient,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plot.png").write_bytes(b"png")
    run_id = tracker.open_run(run_named("a"))
    tracker.log_text(run_id, "incidents.json", "[]")
    tracker.log_text(run_id, "incidents.json", "[1]")
    tracker.log_file(run_id, str(tmp_path / "plot.png"), "plots")
    for _ in range(2):
        tracker.log_table(run_id, "tables/crops.json", {"crops": [1, 10], "top5": [10.1, 9.2]})
    beside = Path(database.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
    found = {str(path.relative_to(beside)) for path in beside.rglob("*") if path.is_file() and run_id in str(path)}
    base = f"{run_id}/artifacts"
    assert found == {f"{base}/incidents.json", f"{base}/plots/plot.png", f"{base}/tables/crops.json"}
    assert (beside / base / "incidents.json").read_text() == "[1]"
    table = json.loads((beside / base / "tables/crops.json").read_text())
    assert table == {"columns": ["crops", "top5"], "data": [[1, 10.1], [10, 9.2]]}
    shown = client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(shown) == [{"path": "tables/crops.json", "type": "table"}]
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("edited", ["", "5", "[not json"])
def test_a_table_is_shown_although_someone_edited_the_tag(
    tracker: MlflowTracker, client: MlflowClient, edited: str
) -> None:
    run_id = tracker.open_run(run_named("a"))
    tracker.set_tags(run_id, {"mlflow.loggedArtifacts": edited})
    tracker.log_table(run_id, "crops.json", {"crops": [1]})
    shown = client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(shown) == [{"path": "crops.json", "type": "table"}]


def test_invalid_calls_raise_with_the_reason(tracker: MlflowTracker, tmp_path: Path) -> None:
    run_id = tracker.open_run(run_named("a"))
    with pytest.raises(TrackingError, match="not a file"):
        tracker.log_file(run_id, str(tmp_path / "absent.png"))
    with pytest.raises(TrackingError, match="refused to log"):
        tracker.log_metrics("no-such-run", curve(1))
    with pytest.raises(TrackingError, match="quote"):
        tracker.open_run(TrackedRun("it's", "a"))


def test_stale_runs_are_closed_and_no_others(
    tracker: MlflowTracker, again: Callable[[], MlflowTracker], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "STALE_HEARTBEAT_SECONDS", 0.0)
    stale, fresh, done = (tracker.open_run(run_named(name)) for name in ("stale", "fresh", "done"))
    old = time.time() - 1000
    for run_id in (stale, done):
        tracker.set_tags(run_id, {HEARTBEAT_TAG: str(old)})
    tracker.close_run(done, "FINISHED")
    experiment_id = client.get_run(fresh).info.experiment_id
    foreign = client.create_run(experiment_id).info.run_id
    assert tracker.close_stale_runs(600) == []  # its own
    observer = again()
    assert [observer.close_stale_runs(600), observer.close_stale_runs(600), observer.close_stale_runs(600)] == [
        [],
        [stale],
        [],
    ]
    ended = client.get_run(stale).info
    assert ended.status == "KILLED"
    assert ended.end_time / 1000 == pytest.approx(old, abs=1)
    states = {run_id: client.get_run(run_id).info.status for run_id in (fresh, done, foreign)}
    assert states == {fresh: "RUNNING", done: "FINISHED", foreign: "RUNNING"}


@pytest.mark.parametrize("ahead", [-5000.0, 5000.0])
def test_a_driver_with_another_clock_is_not_closed_as_stale(
    ahead: float, tracker: MlflowTracker, again: Callable[[], MlflowTracker], client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run_id, observer = tracker.open_run(run_named("alive")), again()
    for beat in range(3):
        tracker.set_tags(run_id, {HEARTBEAT_TAG: f"{time.time() + ahead + beat:.1f}"})
        monkeypatch.setattr(mlflow_tracker, "STALE_HEARTBEAT_SECONDS", 0.0)
        assert observer.close_stale_runs(600) == []
    assert client.get_run(run_id).info.status == "RUNNING"
    monkeypatch.setattr(mlflow_tracker, "STALE_HEARTBEAT_SECONDS", 60.0)
    assert observer.close_stale_runs(600) == []  # it has not been silent for long
    monkeypatch.setattr(mlflow_tracker, "STALE_HEARTBEAT_SECONDS", 0.0)
    own = observer.open_run(run_named("own"))
    observer._heartbeats[own] = -100.0
    observer.log_metrics(own, [])  # what a live driver calls all the time
    assert client.get_run(run_id).info.status == "KILLED"


@pytest.mark.parametrize("beat", ["soon", "inf", "nan", "9e300", "-5"])
def test_an_invalid_heartbeat_is_ignored(
    beat: str, tracker: MlflowTracker, again: Callable[[], MlflowTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_tracker, "STALE_HEARTBEAT_SECONDS", 0.0)
    tracker.set_tags(tracker.open_run(run_named("odd")), {HEARTBEAT_TAG: beat})
    observer = again()
    assert [observer.close_stale_runs(600), observer.close_stale_runs(600)] == [[], []]


def test_heartbeat_without_points(
    tracker: MlflowTracker, again: Callable[[], MlflowTracker], client: MlflowClient
) -> None:
    run_id = tracker.open_run(run_named("a"))
    tracker.set_tags(run_id, {HEARTBEAT_TAG: "1.0"})
    tracker.log_metrics(run_id, [])
    assert client.get_run(run_id).data.tags[HEARTBEAT_TAG] == "1.0"  # at most every 10 s
    again().log_metrics(run_id, [])
    assert float(client.get_run(run_id).data.tags[HEARTBEAT_TAG]) > NOW


def test_deleted_runs_and_experiments(
    tracker: MlflowTracker, again: Callable[[], MlflowTracker], client: MlflowClient, database: str
) -> None:
    run_id = tracker.open_run(run_named("a"))
    client.delete_run(run_id)
    other = again().open_run(run_named("a"))
    assert other != run_id
    run = client.get_run(other)
    assert isinstance(run, Run)
    assert len(client.search_runs([run.info.experiment_id], run_view_type=ViewType.ALL)) == 2
    client.delete_experiment(run.info.experiment_id)
    restore = f"{mlflow_errors.MLFLOW} experiments restore --experiment-id {run.info.experiment_id}"
    restore = f"MLFLOW_TRACKING_URI={database} {restore}"
    with pytest.raises(TrackingError, match=re.escape(restore)) as raised:
        again().check()
    assert not isinstance(raised.value, TrackerUnreachableError)


@pytest.mark.parametrize("revision", ["451aebb31d03", "ffffffffffff"], ids=["older", "newer"])
def test_the_schema_of_another_mlflow_is_no_outage(revision: str, database: str, tmp_path: Path) -> None:
    MlflowTracker(database, "e").check()
    path = tmp_path / "mlflow.db"
    shutil.copyfile(database.removeprefix("sqlite:///"), path)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("update alembic_version set version_num = ?", (revision,))
    with pytest.raises(
        TrackingError, match=rf"cannot record runs.*\(revision {revision}\).*mlflow db upgrade sqlite:"
    ) as raised:
        MlflowTracker(f"sqlite:///{path}", "e").check()
    assert not isinstance(raised.value, TrackerUnreachableError)


@pytest.mark.parametrize(
    ("error", "message"),
    [("attempt to write a readonly database", "owner"), ("database or disk is full", "Free space")],
)
def test_a_database_that_takes_no_writes_fails_the_check(
    error: str, message: str, tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OperationalError("INSERT INTO experiment_tags", {}, sqlite3.OperationalError(error))

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", fail)
    with pytest.raises(TrackerUnreachableError, match=f"{error}.*{message}") as raised:
        tracker.check()
    assert "INSERT" not in str(raised.value)


def test_url_of_a_database_is_a_command(tracker: MlflowTracker, database: str) -> None:
    run_id = tracker.open_run(run_named("a"))
    url = tracker.get_run_url(run_id)
    assert url.startswith(f"{sys.executable} -m mlflow server --app-name orchestrator --backend-store-uri {database} ")
    assert url.endswith(f"/runs/{run_id}")


def test_a_closed_port_is_reported_quickly_and_without_the_password(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(TrackerUnreachableError) as caught:
        MlflowTracker(f"http://ann:geh%40im@127.0.0.1:{port}", "x").check()
    assert time.monotonic() - started < 15
    message = str(caught.value)
    assert f"http://***@127.0.0.1:{port}" in message
    assert "cannot record runs (tried before the start): Connection refused. Check that" in message
    assert "--tracking" in message
    assert "HTTPConnectionPool" not in message
    assert "geh" not in message
    assert caught.value.__suppress_context__
    assert "Retrying" not in caplog.text


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield server.getsockname()[1]


def test_a_silent_server_is_reported_in_about_ten_seconds(silent_port: int) -> None:
    before = os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT")
    started = time.monotonic()
    with pytest.raises(TrackerUnreachableError):
        MlflowTracker(f"http://127.0.0.1:{silent_port}", "x").check()
    assert time.monotonic() - started < 15
    assert os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") == before


def test_unusable_database_file(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database, it is a text" * 100)
    with pytest.raises(TrackingError, match=r"mlflow\.db"):
        MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", "x").check()


OPEN_RUN = (
    "import sys; from orchestrator.tracking.mlflow_tracker import *;"
    "MlflowTracker(sys.argv[1], 'x').open_run(TrackedRun(sys.argv[2], 'n'))"
)


def test_a_driver_killed_while_it_creates_the_database_leaves_none(tmp_path: Path) -> None:
    uri, old = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / ".mlflow-part-x"
    old.touch()
    os.utime(old, (NOW, NOW))
    with subprocess.Popen([sys.executable, "-c", OPEN_RUN, uri, "k"]) as driver:
        deadline = time.monotonic() + 60
        # The first of the tables, and not yet the last.
        while not any(part.stat().st_size for part in tmp_path.glob(".mlflow-part-*[0-9a-f]")):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        driver.kill()
    assert not (tmp_path / "mlflow.db").exists()
    assert not old.exists()
    tracker = MlflowTracker(uri, "x")
    run_id = tracker.open_run(run_named("a"))
    tracker.log_metrics(run_id, curve(10))
    assert steps(MlflowClient(uri, uri), run_id) == [10]


@pytest.mark.parametrize("has_links", [True, False])
def test_several_drivers_create_one_database(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError("no links here")))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with subprocess.Popen([sys.executable, "-c", OPEN_RUN, uri, "other"]) as other:
        run_id = MlflowTracker(uri, "x").open_run(run_named("a"))
    assert other.returncode == 0
    client = MlflowClient(uri, uri)
    (experiment,) = client.search_experiments(filter_string="name = 'x'")
    assert experiment.artifact_location == f"file://{tmp_path}/mlflow-artifacts"
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags[KEY_TAG] for run in runs} == {"key-a", "other"}
    assert run_id in {run.info.run_id for run in runs}
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_fresh_database_keeps_the_terminal_clean(tmp_path: Path) -> None:
    program = (
        "from orchestrator.tracking.mlflow_tracker import MlflowTracker; from orchestrator.tracking.tracker import *;"
        f"t = MlflowTracker('sqlite:///{tmp_path}/a/mlflow.db', 'x');"
        "i = t.open_run(TrackedRun('k', 'n')); t.close_run(i, 'FINISHED')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    environment["PYTHONPATH"] = os.getcwd()
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout + answer.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
