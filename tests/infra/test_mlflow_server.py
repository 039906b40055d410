"""infra/mlflow, for real: the server on PostgreSQL and S3 with a login, its preparation and its backups."""

import base64
import http.client
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.tracker import MetricPoint, TrackedRun, Tracker, TrackerUnreachableError, TrackingError
from tests.support.launched import process_tree
from tests.support.mlflow_server import BIN, SCRIPT, served
from tests.support.mlflow_stack import MLFLOW, NAME, Stack

pytestmark = pytest.mark.process
SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


def status(stack: Stack, path: str, user: str = "", password: str = "", host: str = "") -> int:
    """Return the status of a request, for a user and with a Host header of our choice."""
    headers = {"Host": host} if host else {}
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    with closing(http.client.HTTPConnection(stack.server.address, stack.server.port, timeout=30)) as connection:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


@contextmanager
def tracker(uri: str, user: str = "", password: str = "", experiment: str = "tests") -> Iterator[Tracker]:
    """Yield our own client, with a login in the environment or without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        if user:
            patch.setenv("MLFLOW_TRACKING_USERNAME", user)
            patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        yield MlflowTracker(uri, experiment)


# ------------------------------------------------------------------ access
def test_a_login_is_required(stack: Stack) -> None:
    assert status(stack, SEARCH) == 401
    assert status(stack, SEARCH, "admin", "wrong") == 401
    assert status(stack, SEARCH, "admin", stack.secret("admin_password")) == 200
    assert status(stack, "/health") == 200, "for probes"


def test_a_foreign_host_is_rejected(stack: Stack) -> None:
    password = stack.secret("admin_password")
    assert status(stack, SEARCH, "admin", password, host=NAME) == 200
    assert status(stack, SEARCH, "admin", password, host="evil.example") == 403
    assert status(stack, "/health", host="evil.example") == 200, "for probes"


def test_no_password_is_on_a_command_line_or_in_the_log(stack: Stack) -> None:
    lines = [
        (Path("/proc") / str(pid) / "cmdline").read_bytes().decode() for pid in process_tree(stack.server.process.pid)
    ]
    assert any("uvicorn" in line for line in lines)
    printed = "".join(lines) + stack.server.said()
    for name in ("admin_password", "database_password", "session_key"):
        assert stack.secret(name) not in printed, name


# ------------------------------------------------------------------ jobs
def test_preparing_twice_makes_only_missing_things(stack: Stack, prepared: "subprocess.CompletedProcess[str]") -> None:
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stdout.splitlines()[:3] == ["bucket runs: made", "bucket mlflow: there already", "user jobs: made"]
    again = stack.prepare("--buckets", "runs", "--user", "jobs", "--reader", "grafana")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[:2] == ["bucket runs: there already", "user jobs: there already"]


@pytest.mark.usefixtures("prepared")
def test_a_user_records_a_run_and_its_artifacts_go_to_the_store(stack: Stack) -> None:
    with tracker(stack.server.uri, "jobs", stack.secret("jobs_password")) as ours:
        ours.check()
        run_id = ours.open_run(TrackedRun("key", "a run", params={"width": "1"}))
        ours.log_metrics(run_id, [MetricPoint("train/loss", 0.5, 32, time.time())])
        ours.log_text(run_id, "notes.txt", "kept")
        ours.close_run(run_id, "FINISHED")
    (stored,) = (stack.store.folder / "mlflow").rglob("notes.txt")
    assert stored.read_text() == "kept"
    assert run_id in str(stored)
    path = f"/get-artifact?run_uuid={run_id}&path=notes.txt"
    assert status(stack, path) == 401
    assert status(stack, path, "jobs", stack.secret("jobs_password")) == 200


@pytest.mark.usefixtures("prepared")
def test_a_user_who_may_not_write_gets_an_error_before_a_start(stack: Stack) -> None:
    with tracker(stack.server.uri, "admin", stack.secret("admin_password"), "closed") as administrators:
        administrators.check()
    with tracker(stack.server.uri, "jobs", stack.secret("jobs_password"), "closed") as ours:
        ours.check_readable()
        with pytest.raises(TrackingError, match=r"refused to record runs.*permission EDIT") as raised:
            ours.check()
    assert not isinstance(raised.value, TrackerUnreachableError)
    wrong_login = pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD")
    with tracker(stack.server.uri, "jobs", "wrong", "closed") as ours, wrong_login:
        ours.check()


@pytest.mark.usefixtures("prepared")
def test_a_user_is_no_administrator(stack: Stack) -> None:
    password = stack.secret("jobs_password")
    assert status(stack, "/api/2.0/mlflow/users/get?username=jobs", "jobs", password) == 200
    assert status(stack, "/api/2.0/mlflow/users/get?username=admin", "jobs", password) == 403


@pytest.mark.usefixtures("prepared")
def test_the_dashboards_reader_reads_curves_and_nothing_else(stack: Stack) -> None:
    def reads(sql: str, database: str = "mlflow") -> str:
        login = {"PGUSER": "grafana", "PGPASSWORD": stack.secret("grafana_database_password")}
        return stack.database.psql("-d", database, sql=sql, environment=login)

    assert int(reads("SELECT count(*) FROM metrics")) >= 0
    for statement, why in (
        ("SELECT * FROM registered_models", "permission denied"),
        ("DELETE FROM metrics", "read-only transaction|permission denied"),
    ):
        with pytest.raises(AssertionError, match=why):
            reads(statement)
    with pytest.raises(AssertionError, match="permission denied for database"):
        reads("SELECT 1", "mlflow_auth")


# ------------------------------------------------------------------ errors of clients
def test_our_client_without_a_login_fails_immediately(stack: Stack) -> None:
    began = time.monotonic()
    with tracker(stack.server.uri) as ours, pytest.raises(TrackingError, match="401") as caught:
        ours.check()
    assert not isinstance(caught.value, TrackerUnreachableError), "a retry would not help"
    assert stack.server.uri in str(caught.value)
    assert time.monotonic() - began < 10


def test_our_client_with_a_host_name_that_is_not_allowed_fails_immediately(stack: Stack) -> None:
    began = time.monotonic()
    uri = f"http://localhost:{stack.server.port}"
    with (
        tracker(uri, "admin", stack.secret("admin_password")) as ours,
        pytest.raises(TrackingError, match=r"403.*Host header") as caught,
    ):
        ours.check()
    assert not isinstance(caught.value, TrackerUnreachableError)
    assert time.monotonic() - began < 10


# ------------------------------------------------------------------ a start that cannot succeed
def started(tmp_path: Path, **environment: str) -> tuple[int, str, float]:
    """Run the script by itself; return its exit status, output and seconds."""
    began = time.monotonic()
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MLFLOW_", "AWS_"))}
    done = subprocess.run(
        [str(SCRIPT)],
        capture_output=True, text=True, timeout=60, check=False,
        env={
            **outer, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "SECRETS_DIRECTORY": str(tmp_path),
            "MLFLOW_ARTIFACTS_DESTINATION": "s3://nowhere/x", "MLFLOW_SERVER_ALLOWED_HOSTS": "x:5000",
            "MLFLOW_LOGIN": "none", "PGUSER": "mlflow", **environment,
        },
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_a_missing_database_is_waited_for_until_a_deadline(tmp_path: Path) -> None:
    (tmp_path / "database_password").write_text("not-to-be-shown")
    code, output, seconds = started(tmp_path, PGHOST="127.0.0.1", PGPORT="9", DATABASE_WAIT_SECONDS="2")
    assert code == 1
    first, *_, last = output.splitlines()
    assert first.startswith("database.py: waiting for postgresql+psycopg2:///mlflow: ")
    assert "Connection refused" in first
    assert last.startswith("database.py: error: postgresql+psycopg2:///mlflow: no answer in 2 s: ")
    assert "not-to-be-shown" not in output
    assert seconds < 15


@pytest.mark.usefixtures("stack")
def test_a_wrong_password_fails_without_waiting(tmp_path: Path, stack: Stack) -> None:
    (tmp_path / "database_password").write_text("not-the-password")
    where = {name: value for name, value in stack.database.environment.items() if name != "PGUSER"}
    code, output, seconds = started(tmp_path, **where, DATABASE_WAIT_SECONDS="50")
    assert code == 1
    assert "password authentication failed" in output
    assert "not-the-password" not in output
    assert seconds < 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MLFLOW_ARTIFACTS_DESTINATION": ""}, "set MLFLOW_ARTIFACTS_DESTINATION"),
        ({"MLFLOW_SERVER_ALLOWED_HOSTS": ""}, "set MLFLOW_SERVER_ALLOWED_HOSTS"),
        ({"MLFLOW_LOGIN": "basic-auth"}, "admin_password is missing or not readable"),
        ({"MLFLOW_LOGIN": "bacis-auth"}, "must be basic-auth or none"),
    ],
)
def test_a_missing_setting_is_one_line(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    code, output, _ = started(tmp_path, **changes)
    assert code == 2
    (line,) = output.splitlines()
    assert line.startswith("serve.sh: error: ")
    assert words in line


def test_without_a_login_where_something_before_it_asks_for_one(tmp_path: Path, stack: Stack) -> None:
    database = stack.database.uri("mlflow", "mlflow", stack.secret("database_password"))
    with served(tmp_path, database, str(tmp_path / "artifacts")) as server, tracker(server.uri) as ours:
        ours.check()
        assert stack.secret("database_password") not in server.said()
    assert server.process.returncode is not None


# ------------------------------------------------------------------ backups
@pytest.mark.usefixtures("prepared")
def test_backups_are_complete_and_the_oldest_are_removed(tmp_path: Path, stack: Stack) -> None:
    old = [tmp_path / f"mlflow-2026010{day}T030000Z.dump" for day in range(1, 4)]
    for path in (*old, tmp_path / "mlflow-by-hand.dump"):
        path.write_bytes(b"old")
    environment = {**os.environ, **stack.environment, "BACKUPS": str(tmp_path), "BACKUPS_KEPT": "2"}
    environment["PATH"] += f"{os.pathsep}{postgres_programs()}"
    done = subprocess.run(
        [str(MLFLOW / "backup.sh")], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["mlflow"] * 3 + ["mlflow_auth"]
    assert [path.exists() for path in old] == [False, False, True]
    assert (tmp_path / "mlflow-by-hand.dump").exists(), "files that it did not make stay"
    dump = max(tmp_path.glob("mlflow-2*.dump"))
    assert dump.stat().st_mode & 0o777 == 0o600
    stack.database.psql(sql="CREATE DATABASE restored OWNER mlflow")
    subprocess.run(
        ["pg_restore", "--no-owner", "--exit-on-error", "--dbname=restored", str(dump)],
        check=True, timeout=60, env={**environment, "PGPASSWORD": stack.secret("database_password")},
    )  # fmt: skip
    count = "SELECT count(*), max(version_num) FROM experiments, alembic_version"
    assert stack.database.psql("-d", "restored", sql=count) == stack.database.psql("-d", "mlflow", sql=count)


def postgres_programs() -> Path:
    """Return the folder of pg_dump."""
    from tests.support.postgres import programs

    folder = programs()
    assert folder is not None
    return folder


def test_a_database_that_cannot_be_dumped_costs_no_backup(tmp_path: Path, stack: Stack) -> None:
    kept = tmp_path / "nowhere-20260101T030000Z.dump"
    kept.write_bytes(b"old")
    environment = {
        **os.environ, **stack.environment, "BACKUPS": str(tmp_path), "BACKUPS_KEPT": "1", "BACKUP_DATABASES": "nowhere",
    }  # fmt: skip
    environment["PATH"] += f"{os.pathsep}{postgres_programs()}"
    done = subprocess.run(
        [str(MLFLOW / "backup.sh")], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode != 0
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == json.dumps([kept.name])
