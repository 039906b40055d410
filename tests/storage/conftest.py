"""A place of each kind: a local folder and one of fsspec's filesystems; and a real S3 server behind a faulty proxy."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.faulty import Fault, Proxy, Request, proxied
from tests.support.s3 import S3Server, forget_clients, lead, served


@pytest.fixture(params=["local", "file", "memory", pytest.param("s3", marks=pytest.mark.process)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a folder that is not there yet."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/place"
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/place"
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/place"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for all tests; each has its own bucket."""
    with served(tmp_path_factory.mktemp("s3"), etags=True) as server:
        yield server


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy between the test's clients and the server; faultless until the test gives it a plan."""

    def conditions(request: Request) -> Fault | None:
        # As S3 does, and rclone does not: it would create an object over another.
        key = unquote(request.path.partition("?")[0]).strip("/")
        taken = "if-none-match" in request.headers and (s3_server.folder / key).is_file()
        return Fault(412, "PreconditionFailed") if taken else None

    with proxied(s3_server.endpoint, conditions) as proxy:
        lead(monkeypatch, proxy.endpoint)
        yield proxy
    forget_clients()


@pytest.fixture
def bucket(s3_server: S3Server, proxy: Proxy) -> str:
    """URL of an empty bucket, to be reached through the proxy."""
    return s3_server.bucket(f"b-{uuid.uuid4().hex}")
