"""Web servers as a source: what lacks, what is only busy, and what cannot be listed."""

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.data.build.indexing import match_shards
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io, ranged_reads, storage_errors
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader, ReadRetryPolicy

QUICK = ReadRetryPolicy(tries=4, first_wait_seconds=0.001, longest_wait_seconds=0.01)
LISTED = "a b#1.tar"


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges; `failures` are answered before that, `hidden` keeps its lists of files."""

    failures: list[int]
    hidden = False
    asked: list[str]


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def list_directory(self, path: str | os.PathLike[str]) -> io.BytesIO | None:
        if self.server.hidden:
            self.send_error(403)
            return None
        return super().list_directory(path)

    def do_HEAD(self) -> None:
        self.respond(super().do_HEAD)

    def do_GET(self) -> None:
        self.respond(super().do_GET)

    def respond(self, answer: Callable[[], None]) -> None:
        self.server.asked.append(self.command)
        path = Path(self.translate_path(self.path))
        if self.server.failures:
            self.send_error(self.server.failures.pop())
        elif self.command == "GET" and path.is_file() and (wanted := self.headers["Range"]):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            data = path.read_bytes()[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        else:
            answer()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.tar").write_bytes(b"0123456789")
    (tmp_path / "data" / LISTED).write_bytes(b"12")
    monkeypatch.setattr(
        file_io, "call_with_retries", partial(storage_errors.call_with_retries, first_wait_seconds=0.001)
    )
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as made:
        made.failures, made.asked = [], []
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def data(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/data"


def calls(url: str) -> list[Callable[[], object]]:
    """Each way of asking for the same object."""

    def ranged_size() -> int:
        with closing(RangeReader(retry_policy=QUICK)) as ranges:
            return ranges.size(url)

    def ranged_read() -> bytes:
        with closing(RangeReader(retry_policy=QUICK)) as ranges:
            return bytes(ranges.read(url, 2, 3))

    return [lambda: file_io.read_bytes(url), lambda: file_io.get_size(url), ranged_size, ranged_read]


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_failing_server_is_retried(server: Server, data: str, status: int) -> None:
    for call, expected in zip(calls(file_io.join(data, "x.tar")), (b"0123456789", 10, 10, b"234"), strict=True):
        server.failures = [status] * 3
        assert call() == expected
    server.failures = [status] * 2
    assert file_io.exists(file_io.join(data, "x.tar"))


def test_a_server_that_keeps_failing_is_no_missing_file(server: Server, data: str) -> None:
    url = file_io.join(data, "x.tar")
    asked = calls(url)
    asked.append(partial(file_io.exists, url))
    for call in asked:
        server.failures = [503] * 99
        with pytest.raises(StorageError, match=r"x\.tar.*503"):
            call()
    server.failures.clear()


@pytest.mark.parametrize("status", [404, 410])
def test_what_is_gone_is_a_missing_file_at_once(server: Server, data: str, status: int) -> None:
    for call in calls(file_io.join(data, "x.tar")):
        server.failures = [status] * 99
        server.asked.clear()
        with pytest.raises(FileNotFoundError, match=r"x\.tar"):
            call()
        assert len(server.asked) <= 2
    assert not file_io.exists(file_io.join(data, "x.tar"))
    server.failures.clear()


def test_a_refusal_says_nothing_of_aws(server: Server, data: str) -> None:
    server.failures = [403] * 2
    with pytest.raises(StorageError, match=r"x\.tar: permission denied \(403 Forbidden\)$"):
        file_io.read_bytes(file_io.join(data, "x.tar"))


def test_a_page_of_links_is_a_list(data: str) -> None:
    assert file_io.list_names(data) == [LISTED, "x.tar"]
    assert file_io.list_sizes(data) == {LISTED: 2, "x.tar": 10}
    assert file_io.read_bytes(file_io.join(data, LISTED)) == b"12"


def test_a_server_without_a_list_is_asked_by_name(server: Server, data: str) -> None:
    server.hidden = True
    assert file_io.list_sizes(data, ["x.tar", LISTED, "none.tar"]) == {LISTED: 2, "x.tar": 10}
    with pytest.raises(StorageError, match=r"cannot list .*data"):
        file_io.list_sizes(data)
    server.hidden = False
    with pytest.raises(StorageError, match=r"cannot list .*none: .*braces such as train-\{000"):
        file_io.list_names(data.replace("data", "none"))


def test_shards_of_a_server_without_a_list_are_found_by_their_braces(server: Server, data: str, tmp_path: Path) -> None:
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        (tmp_path / "data" / name).write_bytes(b"123")
    server.hidden = True
    assert match_shards(data, "x-{0..1}.tar", "train") == {"x-0.tar": 3, "x-1.tar": 3}
    assert match_shards(data, "y.tar", "validation") == {"y.tar": 3}
    with pytest.raises(DataError, match=r"x-2\.tar is missing \(1 of 3"):
        match_shards(data, "x-{0..2}.tar", "train")
    with pytest.raises(StorageError, match=r"cannot list .*braces"):
        match_shards(data, "x-*.tar", "train")


def test_closing_ends_a_read_that_waits(server: Server, data: str) -> None:
    asked = threading.Event()
    release = threading.Event()

    class Stalled(Handler):
        def respond(self, answer: Callable[[], None]) -> None:
            asked.set()
            release.wait(60)

    server.RequestHandlerClass = partial(Stalled, directory="/")
    ranges = RangeReader(retry_policy=QUICK)
    failed: list[BaseException] = []

    def read() -> None:
        try:
            ranges.read(file_io.join(data, "x.tar"), 0, 1)
        except StorageError as error:
            failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert asked.wait(30)
        ranged_reads.close_all_readers()
        reader.join(30)
        assert "closed" in str(failed[0])
    finally:
        release.set()
