"""Before a machine goes: cluster/kubernetes/drivers.py on a head, cluster/aws/spot.py on a spot machine."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.aws import spot
from cluster.kubernetes import drivers
from tests.support.launched import ROOT, until

NOTICE = {"action": "terminate", "time": "2026-11-27T08:22:00Z"}


# ------------------------------------------------------------------ drivers
# As root it would see the drivers of all users of this machine: the test gives it a pid namespace of its own.
@pytest.mark.process
def test_drivers_are_asked_to_save_and_waited_for(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], check=False).returncode:
        pytest.skip("this machine permits no pid namespaces")
    (tmp_path / "jobs").mkdir()
    job, ready, saved = tmp_path / "jobs/train_it.py", tmp_path / "ready", tmp_path / "saved"
    job.write_text(
        "import signal, sys, time\n"
        f"def end(*_): time.sleep(1); open({str(saved)!r}, 'w').close(); sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, end)\nopen({str(ready)!r}, 'w').close()\ntime.sleep(60)\n"
    )
    other = tmp_path / "other.py"
    other.write_text("import time\ntime.sleep(60)\n")
    script = (
        f"{sys.executable} {job} & driver=$!; {sys.executable} {other} & other=$!\n"
        f"while [ ! -e {ready} ]; do sleep 0.1; done\n"
        f"{sys.executable} {drivers.__file__} --seconds 20; echo status $?\n"
        "kill -0 $other && echo other lives; wait $driver; echo driver $?\n"
    )
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines == [f"drivers.py: asked {job} to save and end", "status 0", "other lives", "driver 143"], done
    assert saved.exists()


@pytest.mark.parametrize(
    ("words", "drives"),
    [
        (["/opt/venv/bin/python", "/opt/orchestrator/jobs/train_ensemble.py", "googlenet-digits", ""], True),
        (["python3.11", "jobs/tune.py", ""], True),
        (["/opt/venv/bin/python", "/opt/venv/bin/orchestrator", "train", ""], True),
        (["python", "/opt/orchestrator/cluster/kubernetes/drivers.py", ""], False),
        (["/bin/sh", "-c", "python jobs/train.py", ""], False),
        (["ray::IDLE", ""], False),
        ([""], False),
    ],
)
def test_a_driver_is_known_by_its_script(words: list[str], drives: bool) -> None:
    assert drivers.drives(words) is drives


# ------------------------------------------------------------------ spot
@contextmanager
def metadata(notice_after: int) -> Iterator[tuple[str, list[str]]]:
    """Serve EC2's metadata (IMDSv2) with a notice after this many requests; yield the address and requested paths."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer(200 if self.path == "/latest/api/token" else 404, b"a-session")

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") != "a-session":
                self._answer(401, b"")
                return
            asked.append(self.path)
            has_notice = len(asked) > notice_after and self.path == "/latest/meta-data/spot/instance-action"
            self._answer(200 if has_notice else 404, json.dumps(NOTICE).encode() if has_notice else b"")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.process
def test_the_command_runs_when_the_notice_comes(tmp_path: Path) -> None:
    with metadata(notice_after=2) as (address, asked):
        done = subprocess.run(
            [
                sys.executable,
                spot.__file__,
                "--metadata",
                address,
                "--poll-seconds",
                "0.01",
                "sh",
                str(tmp_path / "stop"),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert len(asked) == 3
    assert '"terminate"' in done.stdout and done.returncode not in (0, 1)  # sh says that there is no such file


@pytest.mark.process
def test_nothing_runs_before_the_notice(tmp_path: Path) -> None:
    with metadata(notice_after=1_000_000) as (address, asked):
        command = [
            sys.executable,
            spot.__file__,
            "--metadata",
            address,
            "--poll-seconds",
            "0.01",
            "touch",
            str(tmp_path / "x"),
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                until(lambda: len(asked) > 20, 20)
                assert process.poll() is None and not (tmp_path / "x").exists()
            finally:
                process.kill()


def test_a_server_that_does_not_answer_is_no_notice() -> None:
    with metadata(notice_after=0) as (address, _):
        assert json.loads(spot.notice(address) or "") == NOTICE
    began = time.monotonic()
    assert spot.notice(address) is None
    assert time.monotonic() - began < 5


def test_the_pods_find_the_script() -> None:
    named = "/opt/orchestrator/cluster/kubernetes/drivers.py"
    assert named in (ROOT / "cluster/kubernetes/base/raycluster.yaml").read_text()
    assert Path(drivers.__file__).relative_to(ROOT).as_posix() == named.removeprefix("/opt/orchestrator/")
