"""The registered ensemble as people use it: MLflow's server, `mlflow models serve`, our two jobs, all of one mind."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ensemble import ensemble_registry
from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.tracker import TrackedRun
from tests.support import ensembles, tiny_shards
from tests.support.launched import ROOT, job

pytestmark = [pytest.mark.process, pytest.mark.leaks]  # MLflow keeps the threads with which it copies files

SECONDS = 150.0
IMAGE = tiny_shards.jpeg(1, 50, 31)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def ask(port: int, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def invoked(port: int, image: bytes) -> tuple[int, bytes]:
    asked = {"inputs": {"image": [base64.b64encode(image).decode()]}, "params": {"crops": 144}}
    return ask(port, "POST", "/invocations", json.dumps(asked).encode())


@contextmanager
def listening(command: Sequence[str], port: int, path: str, folder: Path, **changes: str) -> Iterator[None]:
    """A server under way, in a session of its own, all of which is gone afterwards."""
    folder.mkdir()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **changes},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + SECONDS
        while not _up(port, path):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            _killed(process.pid)


def _killed(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _up(port: int, path: str) -> bool:
    try:
        return ask(port, "GET", path)[0] == 200
    except (OSError, HTTPException):
        return False


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    ensembles.members(folder)
    ensembles.ensemble(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    path.write_bytes(IMAGE)
    return path


def same(one: Any, other: Any) -> None:
    """The same classes in the same order, and their probabilities to what two processes may differ by."""
    assert [(guess["label"], guess["class_name"]) for guess in one] == [
        (guess["label"], guess["class_name"]) for guess in other
    ]
    assert [guess["probability"] for guess in one] == pytest.approx([guess["probability"] for guess in other], abs=1e-6)


def test_mlflow_serves_what_predict_says(storage: Path, image: Path, tmp_path: Path) -> None:
    """Registered at a server that passes artifacts on; served from there; asked over HTTP."""
    port, serving = free_port(), free_port()
    server = f"http://127.0.0.1:{port}"
    mlflow = [sys.executable, "-m", "mlflow"]
    at = ["--host", "127.0.0.1", "--port"]
    command = [*mlflow, "server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination"]
    command += [str(tmp_path / "kept"), *at, str(port), "--workers", "1"]
    with listening(command, port, "/health", tmp_path / "server", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        run_id = MlflowTracker(server, "tests").open_run(TrackedRun("key", "tiny-x3"))
        runs = [str(storage / "models" / name) for name in ("m1", "m2", "m3")]
        made = ensemble_registry.register_ensemble(server, run_id, "tiny", "tiny-x3", runs, ())
        assert ensemble_registry.register_ensemble(server, run_id, "tiny", "tiny-x3", runs, ()).is_new is False
        command = [*mlflow, "models", "serve", "-m", made.uri, "--env-manager", "local", *at, str(serving)]
        with listening(command, serving, "/ping", tmp_path / "serving", MLFLOW_TRACKING_URI=server):
            status, body = invoked(serving, IMAGE)
            assert status == 200, body
            served = json.loads(body)["predictions"][0]["predictions"]
            assert invoked(serving, b"no image")[0] == 400
        for chosen in (("--model", "tiny-x3"), ("--model", "models:/tiny@champion", "--tracking", server)):
            done = job("predict.py", str(image), "--crops", "144", "--json", *chosen, runs=storage)
            assert done.status == 0, done.err
            same(served, json.loads(done.out)["predictions"])


def test_serve_answers_what_predict_says(storage: Path, image: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), "--port", str(port), "--storage", str(storage)]
    command += ["--model", "tiny-x3"]
    with listening(command, port, "/health", tmp_path / "serving"):
        status, body = ask(port, "POST", "/?crops=1&members=2", IMAGE, "image/jpeg")
        assert status == 200, body
    assert f"listening on http://127.0.0.1:{port}" in (tmp_path / "serving" / "log").read_text()
    assert "Traceback" not in (tmp_path / "serving" / "log").read_text()
    chosen = ("--model", "tiny-x3", "--members", "2")
    done = job("predict.py", str(image), "--crops", "1", *chosen, "--json", runs=storage)
    assert done.status == 0, done.err
    assert done.complaints == ["model: tiny-x3 (models 2 of 3)"]
    same(json.loads(body)["predictions"], json.loads(done.out)["predictions"])


def test_predict_says_what_is_wrong(storage: Path, image: Path) -> None:
    broken = image.with_name("broken.jpg")
    broken.write_bytes(b"no image")
    done = job("predict.py", str(image), str(broken), "--model", "tiny-x3", runs=storage)
    assert done.status == 1
    assert "ant" in done.out and "not read: no JPEG or PNG" in done.out
    assert done.complaints == ["model: tiny-x3 (3 models)", "1 of 2 images could not be read"]
    for arguments, body in (
        ((), "images: give at least one image"),
        ((str(image), "--crops", "7"), "crops: must be one of 1, 10, 144, got 7"),
        ((str(image),), "no champion is registered in sqlite:///"),
        ((str(image), "--model", "tiny-x3", "--members", "4"), "members: must be different numbers from 1 to 3, got 4"),
        ((str(image), "--model", "tinny-x3"), "did you mean tiny-x3"),
    ):
        refused = job("predict.py", *arguments, runs=storage)
        assert (refused.status, len(refused.complaints)) == (2, 1), refused.err
        assert body in refused.err
