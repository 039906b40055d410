"""A quick look whether a tracker is there, and opening it beside the work."""

import http.server
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.tracking import opening
from orchestrator.tracking.tracker import TrackingError


class _Server(http.server.BaseHTTPRequestHandler):
    """An MLflow server that wants a user named u with the password p/w."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["Authorization"] in ("Basic dTpwL3c=", "Bearer t")
        there = self.path == "/api/2.0/mlflow/experiments/search" and body == {"max_results": 1}
        self.send_response(200 if known and there else 401)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_is_seen_with_the_credentials_that_mlflow_would_use(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert opening.answers(f"http://u:p%2Fw@{address}")
    assert not opening.answers(f"http://u:wrong@{address}")
    assert not opening.answers(f"http://{address}")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    kept = tmp_path / ".mlflow" / "credentials"
    kept.write_text("[mlflow]\nmlflow_tracking_username = u\nmlflow_tracking_password = p/w\n")
    assert opening.answers(f"http://{address}")
    kept.write_text("no such form")
    assert not opening.answers(f"http://{address}")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    assert opening.answers(f"http://{address}")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert not opening.answers(f"http://{address}"), "how to ask is MLflow's to know"


def test_nobody_there_is_no_answer() -> None:
    assert not opening.answers("http://127.0.0.1:9")


def test_a_uri_that_is_refused() -> None:
    with pytest.raises(TrackingError, match="folder"):
        opening.answers("/tmp/mlruns")


def test_databases_in_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mlflow.db"
    uri = f"sqlite:///{path}"
    assert opening.answers(uri), "it will be made"
    (tmp_path / "new").write_bytes(b"a file where the folder should be")
    assert not opening.answers(uri)
    (tmp_path / "new").unlink()
    path.parent.mkdir()
    path.write_bytes(b"no database at all, but a text that is long enough to be read as one" * 10)
    assert not opening.answers(uri)
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("create table alembic_version (version_num text)")
    database.close()
    assert opening.answers(uri)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin exclusive")
    opening_seconds, opening.LOOK_SECONDS = opening.LOOK_SECONDS, 0.05
    try:
        assert not opening.answers(uri), "somebody holds it"
    finally:
        opening.LOOK_SECONDS = opening_seconds
        other.close()


def test_what_is_done_beside_comes_back_and_yields_to_other_work() -> None:
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    found = opening.beside(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert found == opening.NICE > mine
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    with pytest.raises(ValueError, match="why"):
        opening.beside(lambda: int("why"))
