"""The MLflow server as infra/mlflow/serve.sh starts it, for tests: with or without a login, anywhere a prefix leads."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.ending import end
from tests.support.launched import ROOT

SCRIPT = ROOT / "infra" / "mlflow" / "serve.sh"
BIN = Path(sys.executable).parent
START_SECONDS = 120.0
STOP_SECONDS = 15.0
ADMIN = "admin"
# Fetches an address from where a prefix leads.
_FETCH = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)"


@dataclass(frozen=True)
class Login:
    """A login, and the database that keeps its users."""

    database: str
    password: str = field(default="admin-password-of-a-test", repr=False)


@dataclass(frozen=True)
class MlflowServer:
    """A running server."""

    address: str
    port: int
    process: "subprocess.Popen[bytes]" = field(repr=False)
    log: Path

    @property
    def uri(self) -> str:
        """The tracking URI."""
        return f"http://{self.address}:{self.port}"

    def said(self) -> str:
        """Return its output so far."""
        return self.log.read_text(errors="replace")


def settings(
    folder: Path, backend: str, artifacts: str, address: str, port: int, hosts: Sequence[str], login: Login | None
) -> dict[str, str]:
    """The environment of the script; secrets and the login's settings become files in `folder`."""
    secrets = folder / "secrets"
    secrets.mkdir(parents=True, exist_ok=True, mode=0o700)
    variables = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "SECRETS_DIRECTORY": str(secrets),
        "MLFLOW_BACKEND_STORE_URI": backend,
        "MLFLOW_ARTIFACTS_DESTINATION": artifacts,
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join((*hosts, f"{address}:{port}")),
        "MLFLOW_HOST": address,
        "MLFLOW_PORT": str(port),
        "MLFLOW_WORKERS": "1",
        "MLFLOW_LOGIN": "none",
    }
    if login is not None:
        (secrets / "admin_password").write_text(login.password + "\n")
        (secrets / "session_key").write_text("session-key-of-a-test\n")
        config = folder / "basic_auth.ini"
        shipped = (SCRIPT.parent / "basic_auth.ini").read_text()
        config.write_text(shipped.replace("postgresql+psycopg2:///mlflow_auth", login.database))
        variables |= {"MLFLOW_LOGIN": "basic-auth", "MLFLOW_AUTH_CONFIG_PATH": str(config)}
    return variables


@contextmanager
def served(
    folder: Path,
    backend: str,
    artifacts: str,
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    hosts: Sequence[str] = (),
    login: Login | None = None,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[MlflowServer]:
    """A server while the block runs, on a free port by default; its output is in `folder`/mlflow.log.

    backend, artifacts: URIs of the database and of the store of artifacts. hosts: names that clients use
    besides the address. environment: more of it, such as an object store's keys; without it nothing of the caller's
    AWS_ and PG settings is passed on. prefix: words before the command, to run it elsewhere; then `port` is required.
    """
    assert port or not prefix, "a port that is free here may not be so there"
    port = port or _free_port(address)
    folder.mkdir(parents=True, exist_ok=True)
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PG", "MLFLOW_"))}
    log = folder / "mlflow.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*prefix, str(SCRIPT)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **outer,
                **settings(folder, backend, artifacts, address, port, hosts, login),
                "MLFLOW_DISABLE_TELEMETRY": "true",
                **(environment or {}),
            },
            cwd="/",
            start_new_session=True,
        )
    server = MlflowServer(address, port, process, log)
    try:
        _wait(server, prefix)
        yield server
    finally:
        end(process, signal.SIGTERM, STOP_SECONDS)


def _wait(server: MlflowServer, prefix: Sequence[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _answers(f"{server.uri}/health", prefix):
        assert server.process.poll() is None, f"serve.sh ended with {server.process.returncode}: {server.said()}"
        assert time.monotonic() < deadline, f"MLflow does not answer in {START_SECONDS:g} s: {server.said()}"
        time.sleep(0.3)


def _answers(url: str, prefix: Sequence[str]) -> bool:
    """Return whether the health page answers; it needs no login and no particular host."""
    if prefix:
        ask = [*prefix, sys.executable, "-c", _FETCH, url]
        return subprocess.run(ask, capture_output=True, check=False, timeout=30).returncode == 0
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port(address: str) -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
