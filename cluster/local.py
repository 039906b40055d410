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
from orchestrator.ray_backend.ray_env import check_interpreter_path, make_temp_dir
from orchestrator.tracking import login

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
START_SECONDS = 90.0
STOP_SECONDS = 20.0
LIVE_JOB_STATUSES = ("PENDING", "RUNNING")


@dataclass(frozen=True)
class LocalServices:
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
    def state_folder(self) -> Path:
        """Folder of the services' pids and logs."""
        return self.runs.resolve() / ".local"

    @property
    def tracking_uri(self) -> str:
        """The tracking database that jobs write by default."""
        path = str(self.runs.resolve() / "mlflow.db")
        encoded = path.replace("%", "%25").replace("?", "%3F")  # as tracking/tracking_uri.py has it
        return ("sqlite:///" if encoded == path else "sqlite+pysqlite:///") + encoded


def main() -> int:
    """The exit status."""
    local = tyro.cli(LocalServices, description=__doc__)
    commands: dict[str, Callable[[LocalServices], int]] = {
        "up": start_services,
        "down": stop_services,
        "ui": serve_mlflow,
    }
    if (command := commands.get(local.command)) is None:
        return print_error(f"command must be one of {', '.join(commands)}, got {local.command!r}")
    for flag, port in (("--dashboard-port", local.dashboard_port), ("--mlflow-port", local.mlflow_port)):
        if not 1 <= port <= 65535:
            return print_error(f"{flag} must be between 1 and 65535, got {port}")
    try:
        local.state_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return print_error(
            f"{local.state_folder} cannot be made: {error.strerror}; set --runs or ORCHESTRATOR_RUNS to another folder"
        )
    try:
        return command(local)
    except ConfigError as error:
        return print_error(str(error))


def start_services(local: LocalServices) -> int:
    """Start what is not running and wait until it answers. Raises ConfigError for surroundings that cannot work."""
    check_interpreter_path()
    make_token()
    if not read_token():
        return print_error(f"{get_token_path()} is empty; remove it, and a token is made")
    password = login.load_password()
    local = use_running_ports(local)
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
        f"--dashboard-agent-listen-port={find_unused_port()}",
    ]  # fmt: skip
    services = (
        ("ray", ray, "dashboard_port", local.dashboard_port, "api/version"),
        ("mlflow", build_mlflow_command(local), "mlflow_port", local.mlflow_port, "health"),
    )
    missing = [service for service in services if find_session(local, service[0]) is None]
    for name, _, flag, port, _ in missing:
        if is_port_in_use(port):  # else that program's answer would be taken for the service's
            return print_error(
                f"{name}: port {port} is in use by another program; choose another one, such as: "
                f"{format_make_command(local, 'up', flag, find_next_free_port(port))}"
            )
    for name, command, *_ in services:
        if find_session(local, name) is None:
            port = local.dashboard_port if name == "ray" else local.mlflow_port
            start_service(local, name, command, environment, port)
        else:
            print(f"{name} is running already")
    login_headers = {"ray": f"Bearer {read_token()}", "mlflow": f"Bearer {password}"}
    for name, _, _, port, path in services:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{path}", headers={"Authorization": login_headers[name]}
        )
        if (problem := wait_until_up(local, name, request)) is not None:
            for started, *_ in missing:
                stop_service(local, started)
            return print_error(problem)
    print(f"Ray:    http://127.0.0.1:{local.dashboard_port}  (jobs and dashboard)")
    print_mlflow_login(local)
    # Without an address Ray takes that of a file in /tmp, or of some process, either of which may be another user's.
    address = f"http://127.0.0.1:{local.dashboard_port}"
    print(f"submit: source .venv/bin/activate && export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS={address}")
    print("        ray job submit --working-dir . -- python jobs/train_ensemble.py")
    return 0


def print_mlflow_login(local: LocalServices) -> None:
    """Say where MLflow's page is and how to log in; not the password, which a log would keep."""
    print(f"MLflow: http://127.0.0.1:{local.mlflow_port}  ({local.tracking_uri})")
    print(f"        user {login.USER_NAME}, password in {login.get_password_path()}", flush=True)


def format_make_command(local: LocalServices, word: str, flag: str, port: int) -> str:
    """Return a command line that does the same with another port."""
    ports = {"dashboard_port": local.dashboard_port, "mlflow_port": local.mlflow_port, flag: port}
    words = [
        f"--{name.replace('_', '-')} {value}" for name, value in ports.items() if value != getattr(LocalServices, name)
    ]
    words += [] if local.runs == LocalServices.runs else ["--runs", shlex.quote(str(local.runs.resolve()))]
    where = "" if Path.cwd() == ROOT else f"-C {ROOT} "
    return f"make {where}{word} UP_ARGS={shlex.quote(' '.join(words).replace('$', '$$'))}"


def find_next_free_port(after: int) -> int:
    """Return the next port on which nothing listens."""
    return next(port for port in range(after + 1, 65536) if not is_port_in_use(port))


def stop_services(local: LocalServices) -> int:
    """Stop what `up` started, jobs that run there first; nothing else."""
    local = use_running_ports(local)
    if find_session(local, "ray"):
        stop_jobs(local)
    for name in ("ray", "mlflow"):
        stop_service(local, name)
    return 0


def stop_service(local: LocalServices, name: str) -> None:
    """Stop a service if it runs."""
    if (session := find_session(local, name)) is not None:
        stop_session(session)
        print(f"{name} stopped")
    get_pid_file(local, name).unlink(missing_ok=True)


def serve_mlflow(local: LocalServices) -> int:
    """Serve the MLflow page until Ctrl-C, or say where it is served already."""
    local = use_running_ports(local)
    login.load_password()
    print_mlflow_login(local)
    if find_session(local, "mlflow") is not None:
        return 0
    if is_port_in_use(local.mlflow_port):
        return print_error(
            f"mlflow: port {local.mlflow_port} is in use by another program; choose another one, such as: "
            f"{format_make_command(local, 'ui', 'mlflow_port', find_next_free_port(local.mlflow_port))}"
        )
    with contextlib.suppress(KeyboardInterrupt):
        return subprocess.run(
            build_mlflow_command(local), env=build_mlflow_environment(os.environ), check=False
        ).returncode
    return 0


def build_mlflow_command(local: LocalServices) -> list[str]:
    """The MLflow server over the jobs' default database, on loopback."""
    return [
        str(BIN / "mlflow"), "server", "--app-name", login.APP_NAME, "--backend-store-uri", local.tracking_uri,
        "--host", "127.0.0.1", "--port", str(local.mlflow_port), "--workers", "1",
        # Experiments made by jobs name their own artifact folder; this is for those made in the page.
        "--default-artifact-root", (local.runs.resolve() / "mlflow-artifacts").as_uri(),
    ]  # fmt: skip


def build_mlflow_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Without MLflow's job runners: eight processes that nothing here uses."""
    return {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **base}


def make_token() -> None:
    """Make the token that closes Ray to others, readable by its owner alone; one that is there is kept."""
    path = get_token_path()
    if os.environ.get("RAY_AUTH_TOKEN") or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(os.urandom(32).hex())
    print(f"made {path}: Ray's token for this user")


def get_token_path() -> Path:
    """Return the path of the token's file, when no variable holds the token; others lose the permission to read it."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.exists() and path.stat().st_uid == os.getuid():
        path.chmod(0o600)
    return path


def read_token() -> str:
    """The token that `up` starts Ray with."""
    return os.environ.get("RAY_AUTH_TOKEN") or get_token_path().read_text().strip()


def stop_jobs(local: LocalServices) -> None:
    """Ask jobs to save and end, and wait for them; their drivers are in sessions of their own."""
    asked = False
    deadline = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(OSError, ValueError):
        while (
            ids := [
                job["submission_id"]
                for job in query_job_server(local, "api/jobs/")
                if job["status"] in LIVE_JOB_STATUSES
            ]
        ) and (time.monotonic() < deadline):
            for identity in ids if not asked else []:
                print(f"stopping job {identity}", flush=True)
                query_job_server(local, f"api/jobs/{identity}/stop", "POST")
            asked = True
            time.sleep(0.5)


def query_job_server(local: LocalServices, path: str, method: str = "GET") -> Any:
    """The answer of Ray's job server, from JSON."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{local.dashboard_port}/{path}",
        method=method,
        headers={"Authorization": f"Bearer {read_token()}"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def use_running_ports(local: LocalServices) -> LocalServices:
    """With the ports of the services that run, whatever the flags say now."""
    return replace(
        local,
        dashboard_port=find_service_port(local, "ray") or local.dashboard_port,
        mlflow_port=find_service_port(local, "mlflow") or local.mlflow_port,
    )


def find_service_port(local: LocalServices, name: str) -> int | None:
    """The port of a service that runs, None when it does not."""
    if find_session(local, name) is None:
        return None
    return int(json.loads(get_pid_file(local, name).read_text())["port"])


def start_service(
    local: LocalServices, name: str, command: list[str], environment: Mapping[str, str], port: int
) -> None:
    """Start a service in a session of its own, its output in a log, its pid in a file."""
    print(f"starting {name}, log {local.state_folder / name}.log", flush=True)
    with open(local.state_folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=build_mlflow_environment(environment),
        )  # fmt: skip
    began = (Path("/proc") / str(process.pid) / "stat").read_text().rsplit(")", 1)[1].split()[19]
    get_pid_file(local, name).write_text(json.dumps({"pid": process.pid, "began": began, "port": port}))


def get_pid_file(local: LocalServices, name: str) -> Path:
    """Return the path of the file with a service's pid."""
    return local.state_folder / f"{name}.pid"


def find_session(local: LocalServices, name: str) -> int | None:
    """The session of a service that runs; a pid that another process has by now does not count."""
    try:
        kept = json.loads(get_pid_file(local, name).read_text())
        stat = (Path("/proc") / str(kept["pid"]) / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return int(kept["pid"]) if stat[19] == kept["began"] and stat[0] != "Z" else None


def find_unused_port() -> int:
    """Return a port that is free at every address of this machine."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_port_in_use(port: int) -> bool:
    """Return whether a program of this machine answers at a port."""
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until_up(local: LocalServices, name: str, request: urllib.request.Request) -> str | None:
    """None when the service answers; else what went wrong."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if find_session(local, name) is None:
            break
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return None
        except OSError:
            time.sleep(0.5)
    tail = (local.state_folder / f"{name}.log").read_text(errors="replace").strip().splitlines()[-3:]
    return f"{name} did not start: {' | '.join(tail)} (whole log: {local.state_folder / name}.log)"


def stop_session(session: int) -> None:
    """End all processes of a session: asked first, then made to."""
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        for pid in list_session_pids(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while list_session_pids(session) and time.monotonic() < deadline:
            time.sleep(0.2)


def list_session_pids(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(stat[3]) == session and stat[0] != "Z":
                    found.append(int(entry.name))
    return found


def print_error(text: str) -> int:
    """Say what is wrong; the exit status."""
    print(f"local.py: error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
