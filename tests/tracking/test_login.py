"""tracking/login.py: MLflow's server serves the user who started it, and no other user of the machine."""

import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.errors import ConfigError
from orchestrator.tracking import login
from tests.support.ending import end
from tests.support.launched import process_tree, title, until
from tests.support.others import NOBODY_ID, needs_root, run_as_nobody

PASSWORD = "a-password-of-a-test"


# ------------------------------------------------------------------ the password
@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_password_is_made_once_and_for_its_owner_alone(home: Path) -> None:
    before = os.umask(0)
    try:
        first = login.load_password()
    finally:
        os.umask(before)
    path = home / ".orchestrator" / "mlflow_password"
    assert login.get_password_path() == path
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    assert len(first) >= 32
    path.chmod(0o644)
    assert login.load_password() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_first_starts_at_the_same_time_agree(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, link = threading.Barrier(8), os.link

    def link_together(source: str, target: Path) -> None:
        ready.wait(10)
        link(source, target)

    monkeypatch.setattr(os, "link", link_together)
    with ThreadPoolExecutor(8) as pool:
        (password,) = set(pool.map(lambda _: login.load_password(), range(8)))
    assert len(password) >= 32
    assert os.listdir(home / ".orchestrator") == ["mlflow_password"]


def test_a_given_password_is_used_and_a_short_one_rejected(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_MLFLOW_PASSWORD_PATH", str(home / "mine"))
    (home / "mine").write_text(PASSWORD + "\n")
    assert login.load_password() == PASSWORD
    (home / "mine").write_text("short")
    with pytest.raises(ConfigError, match=r"mine must hold at least 12 characters, got 5"):
        login.load_password()
    monkeypatch.setenv("ORCHESTRATOR_MLFLOW_PASSWORD_PATH", str(home))
    with pytest.raises(ConfigError, match="set ORCHESTRATOR_MLFLOW_PASSWORD_PATH to another file"):
        login.load_password()


# ------------------------------------------------------------------ the middleware
def answer(headers: list[tuple[bytes, bytes]], kind: str = "http") -> list[MutableMapping[str, Any]]:
    """Return what the middleware sends; the app behind it sends PASSED."""
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "PASSED"})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {}

    scope = {"type": kind, "headers": headers, "path": "/health"}
    asyncio.run(login.RequireLogin(app, PASSWORD)(scope, receive, send))
    return sent


def basic(user: str, password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())


@pytest.mark.parametrize("given", [basic("orchestrator", PASSWORD), b"Bearer " + PASSWORD.encode()])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_login_passes(given: bytes, kind: str) -> None:
    assert answer([(b"host", b"x"), (b"authorization", given)], kind) == [{"type": "PASSED"}]


@pytest.mark.parametrize(
    "given",
    [
        None, b"", b"Basic", b"Bearer ", b"Basic !", basic("orchestrator", ""), basic("admin", PASSWORD),
        basic("orchestrator", PASSWORD + "x"), PASSWORD.encode(), b"Digest " + PASSWORD.encode(), b"Basic \xff\xfe",
    ],
)  # fmt: skip
def test_any_other_login_gets_401(given: bytes | None) -> None:
    headers = [] if given is None else [(b"authorization", given)]
    sent = answer(headers)
    assert sent[0]["status"] == 401
    assert dict(sent[0]["headers"])[b"www-authenticate"].startswith(b"Basic ")
    assert answer(headers, "websocket") == [{"type": "websocket.close", "code": 1008}]


def test_two_logins_are_none() -> None:
    assert answer([(b"authorization", basic("orchestrator", PASSWORD))] * 2)[0]["status"] == 401


# ------------------------------------------------------------------ the server
@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server as `make ui` and the line that jobs print start it."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "password").write_text(PASSWORD)
    port = _free_port()
    command = [
        str(Path(sys.executable).parent / "mlflow"), "server", "--app-name", login.APP_NAME, "--port", str(port),
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "ORCHESTRATOR_MLFLOW_PASSWORD_PATH": str(folder / "password"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: _status(f"http://127.0.0.1:{port}/health") == 401, 120, 0.2)
        assert PASSWORD not in "".join(title(pid) for pid in process_tree(process.pid))
        yield f"http://127.0.0.1:{port}"
        assert PASSWORD not in (folder / "log").read_text()
    finally:
        end(process, signal.SIGTERM, 15.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _status(url: str, password: str = "", method: str = "GET", body: object = None) -> int:
    request = urllib.request.Request(url, method=method, data=None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if password:
        request.add_header("Authorization", basic("orchestrator", password).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


ROUTES = (
    "/", "/health", "/version", "/static-files/index.html", "/favicon.ico", "/api/3.0/mlflow/server-info",
    "/api/2.0/mlflow/experiments/search?max_results=1", "/ajax-api/2.0/mlflow/experiments/search?max_results=1",
    "/get-artifact?run_id=x&path=y", "/model-versions/get-artifact?name=x&version=1&path=y", "/graphql", "/signup",
    "/api/2.0/mlflow-artifacts/artifacts/a", "/ajax-api/2.0/mlflow/upload-artifact", "/v1/traces",
    "/gateway/x/invocations", "//health", "/health/../get-artifact",
)  # fmt: skip


@pytest.mark.process
def test_no_route_answers_without_the_login(server: str) -> None:
    assert _status(server + "/", PASSWORD) == 200
    assert _status(server + ROUTES[6], PASSWORD) == 200
    assert _status(server + ROUTES[6], "wrong") == 401
    for route in ROUTES:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            assert _status(server + route, method=method) == 401, (method, route)


def test_a_newer_mlflow_without_the_app_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.server.fastapi_app", None)
    with pytest.raises(ConfigError, match=r"mlflow .* has no server that this login can protect.*basic-auth"):
        login.create_app()


# An attack that let any local user read files of the user who started the server: an experiment in a folder of theirs,
# in which `artifacts` of a run is a link; the password, where one is given, is put before each request.
ATTACK = """
address, folder, wanted, *login = sys.argv[1:]
def ask(path, body=None, method=None, data=None):
    data = data or (json.dumps(body).encode() if body else None)
    request = urllib.request.Request(address + path, data, method=method)
    request.add_header("Content-Type", "application/json")
    if login: request.add_header("Authorization", "Bearer " + login[0])
    try: return urllib.request.urlopen(request, timeout=30).read()
    except urllib.error.HTTPError as error: return str(error.code).encode()
answers = []
about = {"name": "x" + str(os.getpid()), "artifact_location": "file://" + folder}
made = ask("/api/2.0/mlflow/experiments/create", about)
answers.append(made.decode())
if made != b"401":
    experiment = json.loads(made)["experiment_id"]
    run = json.loads(ask("/api/2.0/mlflow/runs/create", {"experiment_id": experiment}))["run"]["info"]["run_id"]
    place = pathlib.Path(folder) / run
    place.mkdir(); (place / "artifacts").symlink_to(os.path.dirname(wanted))
    answers[0] = ask(f"/get-artifact?run_id={run}&path={os.path.basename(wanted)}").decode()
answers.append(ask("/get-artifact?run_id=x&path=y").decode())
answers.append(ask("/api/2.0/mlflow-artifacts/artifacts/planted", method="PUT", data=b"planted").decode())
print(json.dumps(answers))
"""


@pytest.mark.process
@needs_root
def test_another_user_neither_reads_files_nor_plants_artifacts(server: str, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("the owner's token")
    secret.chmod(0o600)
    theirs = tempfile.mkdtemp(prefix="others-", dir="/tmp")
    try:
        os.chown(theirs, NOBODY_ID, NOBODY_ID)
        assert json.loads(run_as_nobody(ATTACK, server, theirs, str(secret))) == ["401", "401", "401"]
        # With the password it works: the attack is a real one.
        assert json.loads(run_as_nobody(ATTACK, server, theirs, str(secret), PASSWORD))[0] == "the owner's token"
    finally:
        shutil.rmtree(theirs)
