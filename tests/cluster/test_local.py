"""cluster/local.py: its parts on small processes of their own, and the whole once."""

import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import tyro

from cluster import local as script
from cluster.local import LocalServices
from tests.support.launched import ROOT, process_tree, title, until
from tests.support.others import run_as_nobody

BIN = Path(sys.executable).parent


@pytest.fixture
def local(tmp_path: Path) -> LocalServices:
    made = LocalServices("up", runs=tmp_path / "runs")
    made.state_folder.mkdir(parents=True)
    return made


@contextmanager
def running(code: str) -> Iterator["subprocess.Popen[str]"]:
    """Yield a process in a session of its own that has printed a line; kill it at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = process_tree(process.pid)
        try:
            yield process
        finally:
            for pid in tree:
                if title(pid).startswith(sys.executable):
                    os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ------------------------------------------------------------------ token
def test_a_token_is_made_once_and_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    script.make_token()
    path = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_text()
    assert len(bytes.fromhex(first)) == 32
    script.make_token()
    assert path.read_text() == first == script.read_token()
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1
    assert first not in printed


def test_a_given_token_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    script.make_token()
    assert script.read_token() == "given"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    script.make_token()
    assert script.read_token() == (tmp_path / "elsewhere").read_text()
    assert not (tmp_path / ".ray").exists()


def test_a_token_that_others_could_read_is_closed_to_them_and_an_empty_one_starts_nothing(
    tmp_path: Path, local: LocalServices, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    path = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    path.write_text("made by Ray")
    path.chmod(0o644)
    script.make_token()
    assert (script.read_token(), stat.S_IMODE(path.stat().st_mode)) == ("made by Ray", 0o600)
    path.write_text("\n")
    assert script.start_services(local) == 1
    assert f"{path} is empty" in capsys.readouterr().err


# ------------------------------------------------------------------ services
def test_a_service_runs_until_its_process_ends(local: LocalServices) -> None:
    assert script.find_session(local, "x") is None
    script.start_service(local, "x", [sys.executable, "-c", "import time; time.sleep(60)"], os.environ, 4711)
    pid = script.find_session(local, "x")
    assert pid is not None
    assert os.getsid(pid) == pid
    script.stop_service(local, "x")
    assert script.find_session(local, "x") is None
    assert not script.get_pid_file(local, "x").exists()
    os.waitpid(pid, 0)


def test_a_pid_that_another_process_has_by_now_does_not_count(local: LocalServices) -> None:
    began = (Path("/proc") / str(os.getpid()) / "stat").read_text().rsplit(")", 1)[1].split()[19]
    file = script.get_pid_file(local, "x")
    file.write_text(json.dumps({"pid": os.getpid(), "began": began}))
    assert script.find_session(local, "x") == os.getpid()
    file.write_text(json.dumps({"pid": os.getpid(), "began": str(int(began) - 1)}))
    assert script.find_session(local, "x") is None


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "7", '{"pid": 99999999, "began": "1"}'])
def test_a_broken_pid_file_means_not_running(local: LocalServices, text: str) -> None:
    script.get_pid_file(local, "x").write_text(text)
    assert script.find_session(local, "x") is None


STUBBORN = """
import signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
stubborn = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
stubborn.stdout.readline()
polite = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.process
def test_a_session_is_ended_whole_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "STOP_SECONDS", 1.0)
    with running(STUBBORN) as ours, running("import time; print(1, flush=True); time.sleep(60)") as other:
        tree = process_tree(ours.pid)
        assert len(tree) == 3
        assert sorted(script.list_session_pids(ours.pid)) == sorted(tree)
        script.stop_session(ours.pid)
        assert script.list_session_pids(ours.pid) == []
        assert ours.wait(5) == -signal.SIGTERM
        assert other.poll() is None
        assert script.list_session_pids(other.pid) == [other.pid]


# ------------------------------------------------------------------ the command line
def call(*arguments: str, folder: Path, seconds: float = 120) -> "subprocess.CompletedProcess[str]":
    """Run local.py with a home and runs of its own, and without the tests' token."""
    environment = {**os.environ, "HOME": str(folder / "home")}
    del environment["RAY_AUTH_TOKEN"]
    return subprocess.run(
        [sys.executable, str(ROOT / "cluster" / "local.py"), *arguments, "--runs", str(folder / "runs")],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment,
        check=False,
    )


@pytest.mark.process
def test_a_port_in_use_is_an_error_with_a_command_that_works(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = call("up", "--mlflow-port", str(port), "--dashboard-port", str(free_port()), folder=tmp_path)
        (line,) = done.stderr.splitlines()
        assert f"local.py: error: mlflow: port {port} is in use by another program" in line
        # The command as printed, which passes its words on through make.
        printed = line.partition("such as: ")[2]
        dry_run = subprocess.run(
            ["bash", "-c", f"{printed} --dry-run"], capture_output=True, text=True, check=True
        ).stdout
        words = shlex.split(next(row for row in dry_run.splitlines() if "cluster/local.py up" in row))
        chosen = tyro.cli(LocalServices, args=words[words.index("up") :])
        assert chosen.runs == tmp_path / "runs"
        assert chosen.mlflow_port > port
        assert not script.is_port_in_use(chosen.mlflow_port)
    assert done.returncode == 1
    assert sorted(path.suffix for path in (tmp_path / "runs" / ".local").iterdir()) == []


@pytest.mark.process
def test_an_unknown_command_is_an_error_and_nothing_to_stop_is_not(tmp_path: Path) -> None:
    done = call("upp", folder=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "'upp'" in done.stderr
    assert call("down", folder=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("words", "folder", "message"),
    [
        (["up", "--mlflow-port", "0"], "runs", "--mlflow-port must be between 1 and 65535, got 0"),
        (["ui", "--mlflow-port", "-1"], "runs", "--mlflow-port must be between 1 and 65535, got -1"),
        (["up", "--dashboard-port", "99999"], "runs", "--dashboard-port must be between 1 and 65535, got 99999"),
        (["up"], "file/runs", "file/runs/.local cannot be made: Not a directory; set --runs"),
    ],
)
def test_an_impossible_port_or_folder_is_one_line(
    words: list[str],
    folder: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["local.py", *words, "--runs", str(tmp_path / folder)])
    monkeypatch.setattr(script, "start_services", lambda local: pytest.fail("started"))
    monkeypatch.setattr(script, "serve_mlflow", lambda local: pytest.fail("started"))
    assert script.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# As another user: list a session's folder, read a log, replace the code of a job, connect to a socket.
REACH = """
session = pathlib.Path(sys.argv[1])
def replace():
    (session / "runtime_resources/working_dir_files/planted.py").write_text("planted")
def connect():
    socket.socket(socket.AF_UNIX).connect(str(session / "sockets/raylet"))
for attempt in (lambda: list(session.iterdir()), (session / "logs/gcs_server.out").read_text, replace, connect):
    try:
        attempt(); print("done")
    except PermissionError:
        print("denied")
"""


def session_folder(ray: int) -> Path:
    """Return the session folder of the Ray that runs in a session of processes."""
    for pid in script.list_session_pids(ray):
        for word in (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0"):
            if word.startswith("--session-dir="):
                return Path(word.partition("=")[2])
    raise AssertionError("no process of Ray names its session's folder")


def check_closed(session: Path) -> None:
    """Fail when another user can reach a session's files, among them the code of a submitted job."""
    assert stat.S_IMODE(session.parent.parent.stat().st_mode) == 0o700
    assert list(session.glob("runtime_resources/working_dir_files/_ray_pkg_*/job.py"))
    if os.geteuid() == 0:  # only root can act as another user
        assert run_as_nobody(REACH, str(session)).split() == ["denied"] * 4


@pytest.mark.cluster
def test_up_takes_a_job_and_down_leaves_nothing(tmp_path: Path) -> None:
    home, runs = tmp_path / "home", tmp_path / "runs"
    home.mkdir()
    dashboard, mlflow = free_port(), free_port()
    ports = ("--dashboard-port", str(dashboard), "--mlflow-port", str(mlflow))
    sessions: list[int] = []
    try:
        done = call("up", *ports, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        for name in ("ray", "mlflow"):
            sessions.append(json.loads((runs / ".local" / f"{name}.pid").read_text())["pid"])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{mlflow}/health", timeout=5)
        password = (home / ".orchestrator" / "mlflow_password").read_text()
        page = urllib.request.Request(
            f"http://127.0.0.1:{mlflow}/health", headers={"Authorization": f"Bearer {password}"}
        )
        with urllib.request.urlopen(page, timeout=5) as answer:
            assert answer.status == 200
        assert f"RAY_API_SERVER_ADDRESS=http://127.0.0.1:{dashboard}" in done.stdout
        assert password not in done.stdout
        with pytest.raises(urllib.error.HTTPError, match="401"):  # closed to clients without a token
            urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/jobs/", timeout=5)
        again = call("up", *ports, folder=tmp_path)
        assert again.returncode == 0
        assert "ray is running already" in again.stdout

        work = tmp_path / "work"
        work.mkdir()
        (work / "job.py").write_text("import os; print(6 * 7, os.environ['ORCHESTRATOR_RUNS'])")
        submitting = {
            **os.environ, "HOME": str(home), "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }  # fmt: skip
        del submitting["RAY_AUTH_TOKEN"]
        deadline = time.monotonic() + 90
        while True:
            job = subprocess.run(
                [str(BIN / "ray"), "job", "submit", "--working-dir", str(work), "--", "python", "job.py"],
                capture_output=True, text=True, timeout=90, env=submitting, cwd=tmp_path, check=False,
            )  # fmt: skip
            # Ray's own agent comes up a little after its job server, on a busy machine a little more.
            if "No available agent" not in job.stderr or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert job.returncode == 0, job.stdout + job.stderr
        assert f"42 {runs}" in job.stdout
        check_closed(session_folder(sessions[0]))
        tree = [pid for session in sessions for pid in process_tree(session)]
        assert len(tree) > 4
    finally:
        ended = call("down", folder=tmp_path)
    assert ended.returncode == 0
    assert "ray stopped" in ended.stdout
    assert "mlflow stopped" in ended.stdout
    assert [script.list_session_pids(session) for session in sessions] == [[], []]
    until(lambda: not [title(pid) for pid in tree if title(pid)], 15)
    time.sleep(0.1)
    assert not list((runs / ".local").glob("*.pid"))
