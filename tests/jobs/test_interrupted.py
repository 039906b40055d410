"""Ctrl-C while a store does not answer: the job ends immediately, whatever its threads wait for."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.data.build.tar_writer import write_dataset
from orchestrator.storage import file_io
from tests.support import tiny_shards
from tests.support.faulty import Fault, Proxy, Request, proxied
from tests.support.launched import ROOT, ended_with
from tests.support.s3 import environment, forget_clients, lead, served

pytestmark = pytest.mark.process

PATIENT_SECONDS = 60  # of a busy machine; a read without an answer is retried for four minutes


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Yield a proxy to an S3 server that holds a dataset."""
    (tmp_path / "s3").mkdir()
    with served(tmp_path / "s3") as server, proxied(server.endpoint) as proxy:
        lead(monkeypatch, server.endpoint)
        write_dataset(
            file_io.join(server.bucket("bucket"), "data"),
            "tiny",
            tiny_shards.CLASSES,
            {"train": tiny_shards.samples(8)},
            4,
        )
        forget_clients()
        yield proxy


@pytest.mark.parametrize(
    ("stalled", "arguments"),
    [(".tar", ("verify", "--url")), (".tar", ("index", "--train", "train/*.tar", "--to", "OUT", "--url")),
     (".index.json", ("verify", "--url"))],
)  # fmt: skip
def test_a_stalled_read_does_not_delay_ctrl_c(
    proxy: Proxy, tmp_path: Path, stalled: str, arguments: tuple[str, ...]
) -> None:
    waits = threading.Event()

    def plan(request: Request) -> Fault | None:
        if request.method != "GET" or not request.path.partition("?")[0].endswith(stalled):
            return None
        waits.set()
        return Fault(stall_after=0)

    proxy.plan = plan
    command = [word.replace("OUT", str(tmp_path / "out")) for word in arguments]
    with ended_with(
        subprocess.Popen(
            [sys.executable, "jobs/shards.py", *command, "s3://bucket/data"],
            cwd=ROOT,
            text=True,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment(proxy.endpoint)},
        )
    ) as process:
        assert waits.wait(PATIENT_SECONDS), "it never asked"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENT_SECONDS)
    assert process.returncode == 130, errors
    assert errors.endswith("error: interrupted\n")
