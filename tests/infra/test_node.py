"""cluster/ssh/node.sh and down.py: Ray behind a token in a session of its own; nothing else is ever stopped."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.ssh import down as script
from cluster.ssh.down import Down
from tests.support.launched import ROOT, until

pytestmark = pytest.mark.process

UP = 'echo "Ray runtime started."; echo "mode $RAY_AUTH_MODE address ${RAY_ADDRESS:-none}"'


class Machine:
    """A home folder with a copy of the script, with shorter time limits."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.script = home / "clone/cluster/ssh/node.sh"
        self.script.parent.mkdir(parents=True)
        text = (ROOT / "cluster/ssh/node.sh").read_text()
        for name, seconds in (("START_SECONDS=120", 5), ("STOP_SECONDS=$((${drain%.*} + 30))", 2)):
            assert name in text
            text = text.replace(name, f"{name.partition('=')[0]}={seconds}")
        self.script.write_text(text)
        self.script.chmod(0o755)
        self.state = home / ".orchestrator-node"

    def run(self, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(
            [str(self.script), *words],
            env={**clean, "HOME": str(self.home), "RAY_ADDRESS": "elsewhere:6379", **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def give_token(self) -> Path:
        token = self.home / ".ray/auth_token"
        token.parent.mkdir()
        token.write_text("0123")
        token.chmod(0o644)
        return token

    @property
    def session(self) -> int:
        return int((self.state / "ray.pid").read_text().split()[0])


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for service in ("ray", "spot"):
        made.run("stop", ORCHESTRATOR_SERVICE=service)


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_starts_without_a_token(machine: Machine) -> None:
    done = machine.run("start", "sh", "-c", f"{UP}; exec sleep 100")
    assert done.returncode == 1
    assert "auth_token is missing or empty" in done.stderr
    assert not machine.state.exists()


def test_it_starts_behind_the_token_and_stops(machine: Machine) -> None:
    token = machine.give_token()
    done = machine.run("start", "sh", "-c", f"{UP}; sleep 100 & exec sleep 101")
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(machine.state.stat().st_mode) == 0o700
    until(lambda: "mode token address none" in (machine.state / "ray.log").read_text())
    session = machine.session
    assert os.getsid(session) == session
    assert machine.run("status").returncode == 0
    assert machine.run("stop").stdout == "ray stopped\n"
    until(lambda: not alive(session))
    assert machine.run("status").returncode == 1
    assert machine.run("stop").returncode == 0


def test_a_second_start_replaces_the_first_session(machine: Machine) -> None:
    machine.give_token()
    command = ("start", "sh", "-c", f"{UP}; exec sleep 100")
    assert machine.run(*command).returncode == 0
    first = machine.session
    done = machine.run(*command)
    assert done.returncode == 0 and "ray stopped" in done.stdout
    assert not alive(first) and alive(machine.session)


def test_a_session_that_ignores_sigterm_is_killed(machine: Machine) -> None:
    machine.give_token()
    assert machine.run("start", "sh", "-c", f"trap '' TERM; {UP}; while :; do sleep 0.2; done").returncode == 0
    session = machine.session
    assert machine.run("stop").returncode == 0
    assert not alive(session)


def test_no_other_process_is_stopped(machine: Machine) -> None:
    machine.give_token()
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as other:
        try:
            # Its pid may once have been ours: the time of its start shows that it is not.
            machine.state.mkdir(mode=0o700)
            (machine.state / "ray.pid").write_text(f"{other.pid} 1\n")
            assert machine.run("status").returncode == 1
            assert machine.run("stop").returncode == 0
            assert machine.run("start", "sh", "-c", f"{UP}; exec sleep 100").returncode == 0
            assert machine.run("stop").returncode == 0
            assert other.poll() is None
        finally:
            other.send_signal(signal.SIGKILL)


def test_a_service_that_ends_immediately_is_an_error_with_its_log(machine: Machine) -> None:
    machine.give_token()
    done = machine.run("start", "sh", "-c", "echo the port is taken; exit 3")
    assert done.returncode == 1
    assert "the port is taken" in done.stderr
    assert machine.run("status").returncode == 1


def test_a_second_service_has_a_session_of_its_own(machine: Machine) -> None:
    machine.give_token()
    assert machine.run("start", "sh", "-c", f"{UP}; exec sleep 100").returncode == 0
    # It need not print that it is up.
    assert machine.run("start", "sleep", "100", ORCHESTRATOR_SERVICE="spot").returncode == 0
    assert machine.run("stop", ORCHESTRATOR_SERVICE="spot").stdout == "spot stopped\n"
    assert machine.run("status").returncode == 0


def test_rays_files_lie_in_a_folder_that_is_closed_to_others(machine: Machine) -> None:
    machine.give_token()
    fake = machine.home / "ray"  # does to its temp dir what Ray does
    fake.write_text(
        f"#!/bin/sh\nfor word; do case $word in --temp-dir=*) place=${{word#*=}} ;; esac; done\n"
        f'mkdir -p "$place/session"; chmod 777 "$place" "$place/session"; {UP}; echo "$*"; exec sleep 100\n'
    )
    fake.chmod(0o755)
    venv = {"ORCHESTRATOR_VENV": sys.prefix}
    with tempfile.TemporaryDirectory(prefix="n-", dir="/tmp") as short:
        os.chmod(short, 0o1777)
        done = machine.run("start", str(fake), "start", "--head", "--block", RAY_TMPDIR=short, **venv)
        assert done.returncode == 0, done.stderr
        parent = Path(short) / f"orchestrator-{os.geteuid()}"
        until(lambda: f"start --temp-dir={parent}/ray --head --block" in (machine.state / "ray.log").read_text())
        assert stat.S_IMODE((parent / "ray").stat().st_mode) == 0o777
        assert stat.S_IMODE(parent.stat().st_mode) == 0o700
        assert machine.run("stop").returncode == 0
        os.chmod(short, 0o777)
        done = machine.run("start", str(fake), "start", "--head", RAY_TMPDIR=short, **venv)
        assert done.returncode == 1 and "must be closed to others" in done.stderr
    done = machine.run("start", str(fake), "start", "--temp-dir=/tmp/ray", **venv)
    assert done.returncode == 1 and "set RAY_TMPDIR" in done.stderr


@pytest.mark.parametrize("words", [(), ("restart",), ("start",)])
def test_a_mistyped_command_is_an_error(machine: Machine, words: tuple[str, ...]) -> None:
    done = machine.run(*words)
    assert done.returncode == 1 and "error" in done.stderr


# ------------------------------------------------------------------ slurm/node.sh
def test_rays_files_on_a_node_of_slurm_lie_in_a_folder_that_is_closed_to_others(tmp_path: Path) -> None:
    venv, port = tmp_path / "venv", free_ports(4)
    (venv / "bin").mkdir(parents=True)
    (venv / "lib/python3.11/site-packages/ray-1.dist-info").mkdir(parents=True)
    (venv / "bin/ray").write_text(
        "#!/bin/sh\nfor word; do case $word in --temp-dir=*) place=${word#*=} ;; esac; done\n"
        'mkdir -p "$place"; chmod 777 "$place"; touch "$place/up"; exec sleep 100\n'
    )
    (venv / "bin/ray").chmod(0o755)
    (tmp_path / "token").write_text("x")
    environment = {
        **os.environ, "TRAIN_VENV": str(venv), "TRAIN_SCRATCH": str(tmp_path), "TRAIN_STORE_MB": "100",
        "TRAIN_INTERFACE": "", "TRAIN_KEEP": "yes", "TRAIN_REQUEUES": "0", "TRAIN_KILL_WAIT": "30",
        "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "here", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
    }  # fmt: skip
    words = ["bash", str(ROOT / "cluster/slurm/node.sh"), "head", "127.0.0.1", str(port), "ray-1.dist-info"]
    scratch = tmp_path / f"ray-{os.getuid()}-7"
    with subprocess.Popen(words, env=environment, umask=0) as node:
        try:
            until((scratch / "ray/up").exists)
            assert stat.S_IMODE((scratch / "ray").stat().st_mode) == 0o777
            assert stat.S_IMODE(scratch.stat().st_mode) == stat.S_IMODE((scratch / "driver").stat().st_mode) == 0o700
        finally:
            node.send_signal(signal.SIGUSR2)
    assert node.returncode == 0


def free_ports(count: int) -> int:
    """Return the first of `count` ports in a row on which nothing listens."""
    for first in range(21000, 60000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


# ------------------------------------------------------------------ down.py
def test_the_head_is_stopped_first() -> None:
    config = {"provider": {"head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}}
    assert script.addresses(config) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


@pytest.mark.parametrize(
    ("last", "status"), [("exit 0", True), ("echo refused >&2; exit 255", False), ("sleep 100", False)]
)
def test_each_machine_is_asked_over_ssh(tmp_path: Path, last: str, status: bool) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\nexec 2>&1\n{last}\n')
    ssh.chmod(0o755)
    options = Down(ssh=str(ssh), seconds=1.0 if "sleep" in last else 20.0)
    assert script.stopped(options, {"ssh_user": "ubuntu", "ssh_private_key": "~/.ssh/k"}, "10.0.0.2") is status
    words = (tmp_path / "asked").read_text()
    assert f"-i {Path.home()}/.ssh/k ubuntu@10.0.0.2 ~/googlenet-orchestrator/cluster/ssh/node.sh stop" in words


def test_a_machine_that_does_not_stop_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cluster/ssh/down.py"), "--ssh", "false"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "not stopped: 10.0.0.1, 10.0.0.2, 10.0.0.3" in done.stderr
