"""Ray and MLflow on this machine: `local.py up`, `local.py down`, `local.py ui`.

Everything serves this user only: the dashboard and MLflow on 127.0.0.1, Ray behind a token and MLflow behind a password
that are made on first use, Ray's files in a folder that is closed to others. What was started is stopped by its
session, never by name: other clusters of the machine are left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from orchestrator.config.errors import ConfigError
from orchestrator.launch.environment import check_interpreter
from orchestrator.launch.temp_dir import make_temp_dir
from orchestrator.tracking import login

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_SECONDS = 90.0
STOP_SECONDS = 20.0
LIVE = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class Local:
    """Start (up), stop (down) or show (ui: MLflow in the foreground) the local services."""

    command: tyro.conf.Positional[str]
    """up | down | ui"""
    runs: Path = Path(os.environ.get("ORCHESTRATOR_RUNS") or ROOT / "runs")
    """folder of runs, databases and logs"""
    dashboard_port: int = 8265
    """of Ray's job server and dashboard"""
    mlflow_port: int = 5000
    """of the MLflow server"""

    @property
    def state(self) -> Path:
        """Where pids and logs of the services are kept."""
        return self.runs.resolve() / ".local"

    @property
    def database(self) -> str:
        """The tracking database that jobs write by default."""
        path = str(self.runs.resolve() / "mlflow.db")
        encoded = path.replace("%", "%25").replace("?", "%3F")  # as tracking/default_store.py has it
        return ("sqlite:///" if encoded == path else "sqlite+pysqlite:///") + encoded


def main() -> int:
    """The exit status."""
    local = tyro.cli(Local, description=__doc__)
    commands: dict[str, Callable[[Local], int]] = {"up": up, "down": down, "ui": ui}
    if (command := commands.get(local.command)) is None:
        return fail(f"command: {local.command!r} is refused: must be one of {', '.join(commands)}")
    for flag, port in (("--dashboard-port", local.dashboard_port), ("--mlflow-port", local.mlflow_port)):
        if not 1 <= port <= 65535:
            return fail(f"{flag} must be between 1 and 65535, got {port}")
    try:
        local.state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return fail(
            f"{local.state} cannot be made: {error.strerror}; set --runs or ORCHESTRATOR_RUNS to another folder"
        )
    try:
        return command(local)
    except ConfigError as error:
        return fail(str(error))


def up(local: Local) -> int:
    """Start what is not running and wait until it answers. Raises ConfigError for surroundings that cannot work."""
    check_interpreter()
    make_token()
    if not token():
        return fail(f"{token_path()} is empty; remove it, and a token is made")
    password = login.load_password()
    local = as_running(local)
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "ORCHESTRATOR_RUNS": str(local.runs.resolve()),
        # Submitted jobs inherit the head's environment: `python` must be this one.
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    environment.pop("RAY_ADDRESS", None)
    ray = [
        str(BIN / "ray"), "start", "--head", "--block", "--port=0", "--disable-usage-stats",
        f"--temp-dir={make_temp_dir()}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={local.dashboard_port}",
        # By default each Ray of the machine wants 52365: without its agent the second one takes no jobs.
        f"--dashboard-agent-listen-port={unused_port()}",
    ]  # fmt: skip
    services = (
        ("ray", ray, "dashboard_port", local.dashboard_port, "api/version"),
        ("mlflow", mlflow_command(local), "mlflow_port", local.mlflow_port, "health"),
    )
    missing = [service for service in services if running(local, service[0]) is None]
    for name, _, flag, port, _ in missing:
        if listening(port):  # else that program's answer would be taken for the service's
            return fail(
                f"{name}: port {port} is in use by another program; choose another one, such as: "
                f"{command_with(local, 'up', flag, free_port(port))}"
            )
    for name, command, *_ in services:
        if running(local, name) is None:
            port = local.dashboard_port if name == "ray" else local.mlflow_port
            start(local, name, command, environment, port)
        else:
            print(f"{name} is running already")
    login_headers = {"ray": f"Bearer {token()}", "mlflow": f"Bearer {password}"}
    for name, _, _, port, path in services:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{path}", headers={"Authorization": login_headers[name]}
        )
        if (problem := wait_until_up(local, name, request)) is not None:
            for started, *_ in missing:
                stop(local, started)
            return fail(problem)
    print(f"Ray:    http://127.0.0.1:{local.dashboard_port}  (jobs and dashboard)")
    show_page(local)
    # Without an address Ray takes that of a file in /tmp, or of some process, either of which may be another user's.
    address = f"http://127.0.0.1:{local.dashboard_port}"
    print(f"submit: source .venv/bin/activate && export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS={address}")
    print("        ray job submit --working-dir . -- python jobs/train_ensemble.py")
    return 0


def show_page(local: Local) -> None:
    """Say where MLflow's page is and how to log in; not the password, which a log would keep."""
    print(f"MLflow: http://127.0.0.1:{local.mlflow_port}  ({local.database})")
    print(f"        user {login.USER}, password in {login.password_path()}", flush=True)


def command_with(local: Local, word: str, flag: str, port: int) -> str:
    """Return a command line that does the same with another port."""
    ports = {"dashboard_port": local.dashboard_port, "mlflow_port": local.mlflow_port, flag: port}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in ports.items() if value != getattr(Local, name)]
    words += [] if local.runs == Local.runs else ["--runs", shlex.quote(str(local.runs.resolve()))]
    where = "" if Path.cwd() == ROOT else f"-C {ROOT} "
    return f"make {where}{word} UP_ARGS={shlex.quote(' '.join(words).replace('$', '$$'))}"


def free_port(after: int) -> int:
    """Return the next port on which nothing listens."""
    return next(port for port in range(after + 1, 65536) if not listening(port))


def down(local: Local) -> int:
    """Stop what `up` started, jobs that run there first; nothing else."""
    local = as_running(local)
    if running(local, "ray"):
        stop_jobs(local)
    for name in ("ray", "mlflow"):
        stop(local, name)
    return 0


def stop(local: Local, name: str) -> None:
    """Stop a service if it runs."""
    if (session := running(local, name)) is not None:
        stop_session(session)
        print(f"{name} stopped")
    pid_file(local, name).unlink(missing_ok=True)


def ui(local: Local) -> int:
    """Serve the MLflow page until Ctrl-C, or say where it is served already."""
    local = as_running(local)
    login.load_password()
    show_page(local)
    if running(local, "mlflow") is not None:
        return 0
    if listening(local.mlflow_port):
        return fail(
            f"mlflow: port {local.mlflow_port} is in use by another program; choose another one, such as: "
            f"{command_with(local, 'ui', 'mlflow_port', free_port(local.mlflow_port))}"
        )
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.run(mlflow_command(local), env=mlflow_environment(os.environ), check=False).returncode
    return 0


def mlflow_command(local: Local) -> list[str]:
    """The MLflow server over the jobs' default database, on loopback."""
    return [
        str(BIN / "mlflow"), "server", "--app-name", login.APP, "--backend-store-uri", local.database,
        "--host", "127.0.0.1", "--port", str(local.mlflow_port), "--workers", "1",
        # Experiments made by jobs name their own artifact folder; this is for those made in the page.
        "--default-artifact-root", (local.runs.resolve() / "mlflow-artifacts").as_uri(),
    ]  # fmt: skip


def mlflow_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Without MLflow's job runners: eight processes that nothing here uses."""
    return {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **base}


def make_token() -> None:
    """Make the token that closes Ray to others, readable by its owner alone; one that is there is kept."""
    path = token_path()
    if os.environ.get("RAY_AUTH_TOKEN") or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(os.urandom(32).hex())
    print(f"made {path}: Ray's token for this user")


def token_path() -> Path:
    """Where it is, where no variable holds it. One that Ray made is readable by every user of the machine: no more."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.exists() and path.stat().st_uid == os.getuid():
        path.chmod(0o600)
    return path


def token() -> str:
    """The token that `up` starts Ray with."""
    return os.environ.get("RAY_AUTH_TOKEN") or token_path().read_text().strip()


def stop_jobs(local: Local) -> None:
    """Ask jobs to save and end, and wait for them; their drivers are in sessions of their own."""
    asked = False
    deadline = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(OSError, ValueError):
        while (ids := [job["submission_id"] for job in ask(local, "api/jobs/") if job["status"] in LIVE]) and (
            time.monotonic() < deadline
        ):
            for identity in ids if not asked else []:
                print(f"stopping job {identity}", flush=True)
                ask(local, f"api/jobs/{identity}/stop", "POST")
            asked = True
            time.sleep(0.5)


def ask(local: Local, path: str, method: str = "GET") -> Any:
    """The answer of Ray's job server, from JSON."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{local.dashboard_port}/{path}", method=method, headers={"Authorization": f"Bearer {token()}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def as_running(local: Local) -> Local:
    """With the ports of the services that run, whatever the flags say now."""
    return replace(
        local,
        dashboard_port=port_of(local, "ray") or local.dashboard_port,
        mlflow_port=port_of(local, "mlflow") or local.mlflow_port,
    )


def port_of(local: Local, name: str) -> int | None:
    """The port of a service that runs, None when it does not."""
    if running(local, name) is None:
        return None
    return int(json.loads(pid_file(local, name).read_text())["port"])


def start(local: Local, name: str, command: list[str], environment: Mapping[str, str], port: int) -> None:
    """Start a service in a session of its own, its output in a log, its pid in a file."""
    print(f"starting {name}, log {local.state / name}.log", flush=True)
    with open(local.state / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=mlflow_environment(environment),
        )  # fmt: skip
    began = (Path("/proc") / str(process.pid) / "stat").read_text().rsplit(")", 1)[1].split()[19]
    pid_file(local, name).write_text(json.dumps({"pid": process.pid, "began": began, "port": port}))


def pid_file(local: Local, name: str) -> Path:
    """Where a service's pid is kept."""
    return local.state / f"{name}.pid"


def running(local: Local, name: str) -> int | None:
    """The session of a service that runs; a pid that another process has by now does not count."""
    try:
        kept = json.loads(pid_file(local, name).read_text())
        stat = (Path("/proc") / str(kept["pid"]) / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return int(kept["pid"]) if stat[19] == kept["began"] and stat[0] != "Z" else None


def unused_port() -> int:
    """Return a port that is free at every address of this machine."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    """Whether a program of this machine answers at a port."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_up(local: Local, name: str, request: urllib.request.Request) -> str | None:
    """None when the service answers; else what went wrong."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if running(local, name) is None:
            break
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return None
        except OSError:
            time.sleep(0.5)
    tail = (local.state / f"{name}.log").read_text(errors="replace").strip().splitlines()[-3:]
    return f"{name} did not start: {' | '.join(tail)} (whole log: {local.state / name}.log)"


def stop_session(session: int) -> None:
    """End all processes of a session: asked first, then made to."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        for pid in members(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while members(session) and time.monotonic() < deadline:
            time.sleep(0.2)


def members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(stat[3]) == session and stat[0] != "Z":
                    found.append(int(entry.name))
    return found


def fail(text: str) -> int:
    """Say what is wrong; the exit status."""
    print(f"local.py: error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
