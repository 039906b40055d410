"""Ranged reads from local files and fsspec's filesystems (S3 has its own tests)."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from orchestrator.storage import file_io, ranged_reads, s3
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader, ReadRetryPolicy

QUICK = ReadRetryPolicy(tries=4, first_wait_seconds=0.001, longest_wait_seconds=0.002)
DATA = bytes(range(256)) * 40


@pytest.fixture
def ranges() -> RangeReader:
    return RangeReader(streams=2, retry_policy=QUICK)


def test_ranges_are_exact(place: str, ranges: RangeReader) -> None:
    url = file_io.join(place, "object")
    file_io.write_bytes(url, DATA)
    for start, length in ((0, len(DATA)), (0, 1), (17, 300), (len(DATA) - 1, 1), (5, 0)):
        assert ranges.read(url, start, length) == DATA[start : start + length]
    ranges.advise(url, 0, len(DATA))
    assert ranges.transfer.bytes == len(DATA) + 1 + 300 + 1
    assert ranges.transfer.retries == 0
    ranges.close()


def test_a_view_in_the_middle_of_a_buffer_is_filled_and_no_more(place: str, ranges: RangeReader) -> None:
    url = file_io.join(place, "object")
    file_io.write_bytes(url, DATA)
    buffer = bytearray(b"-" * 100)
    ranges.read_into(url, 256, memoryview(buffer)[10:20])
    assert buffer == b"-" * 10 + DATA[256:266] + b"-" * 80


@pytest.mark.parametrize(("start", "length"), [(8, 3), (10, 1), (0, 11), (50, 2)])
def test_truncation_names_object_and_bytes(place: str, ranges: RangeReader, start: int, length: int) -> None:
    url = file_io.join(place, "object")
    file_io.write_bytes(url, b"0123456789")
    with pytest.raises(StorageError, match="truncated") as caught:
        ranges.read(url, start, length)
    assert url in str(caught.value)
    assert ranges.transfer.retries == 0, "trying again is of no use"


def test_missing_objects_are_file_not_found(place: str, ranges: RangeReader) -> None:
    url = file_io.join(place, "object")
    with pytest.raises(FileNotFoundError, match="object"):
        ranges.read(url, 0, 1)
    assert ranges.transfer.retries == 0


def test_a_negative_start_is_a_value_error(tmp_path: Path, ranges: RangeReader) -> None:
    with pytest.raises(ValueError, match="got -1"):
        ranges.read(str(tmp_path / "x"), -1, 1)


def test_a_closed_reader_raises(tmp_path: Path, ranges: RangeReader) -> None:
    ranges.close()
    with pytest.raises(StorageError, match="closed"):
        ranges.read(str(tmp_path / "x"), 0, 1)


# ------------------------------------------------------------------ local
def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_few_files_stay_open_and_none_after_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_reads, "MAX_OPEN_FILES", 4)
    ranges = RangeReader()
    paths = [str(tmp_path / str(number)) for number in range(20)]
    for path in paths:
        file_io.write_bytes(path, path.encode())
    before = num_open_files()
    for _ in range(2):
        for path in paths:
            assert ranges.read(path, 0, len(path)) == path.encode()
            assert num_open_files() <= before + 4
    ranges.close()
    assert num_open_files() == before


def test_no_file_is_closed_under_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranged_reads, "MAX_OPEN_FILES", 2)
    ranges = RangeReader()
    paths = [str(tmp_path / str(number)) for number in range(8)]
    for number, path in enumerate(paths):
        file_io.write_bytes(path, bytes([number]) * 5000)

    def read(turn: int) -> bool:
        number = turn % len(paths)
        return ranges.read(paths[number], 0, 5000) == bytes([number]) * 5000

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(2000)))


def test_reads_that_come_in_pieces_are_put_together(
    tmp_path: Path, ranges: RangeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, preadv = str(tmp_path / "object"), os.preadv
    file_io.write_bytes(path, DATA)
    monkeypatch.setattr(os, "preadv", lambda file, views, start: preadv(file, [views[0][:777]], start))
    assert ranges.read(path, 3, 5000) == DATA[3:5003]


def test_a_pipe_in_the_place_of_a_file_is_an_error_immediately(tmp_path: Path, ranges: RangeReader) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="pipe at byte 0"):
        ranges.read(str(tmp_path / "pipe"), 0, 1)


def test_a_failed_read_names_file_and_byte_and_the_next_opens_anew(
    tmp_path: Path, ranges: RangeReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "object")
    file_io.write_bytes(path, DATA)
    ranges.read(path, 0, 1)
    file_io.write_bytes(path, b"replaced!")

    def stale(*_: Any) -> int:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", stale)
        with pytest.raises(StorageError, match=r"object at byte 7.*Stale"):
            ranges.read(path, 7, 1)
    assert ranges.read(path, 0, 9) == b"replaced!"


@pytest.mark.process
def test_a_forked_child_reads_even_if_a_lock_was_held(tmp_path: Path, ranges: RangeReader) -> None:
    path = str(tmp_path / "object")
    file_io.write_bytes(path, DATA)
    ranges.read(path, 0, 1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ranges._lock:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    try:
        child = os.fork()
        if child == 0:
            os._exit(0 if ranges.read(path, 5, 100) == DATA[5:105] else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        holder.join()


# ------------------------------------------------------------------ any filesystem of fsspec
class Flaky:
    """Stands in for a filesystem's cat_file: fails by a script, then does what it should."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: list[Callable[[bytes], bytes]]) -> None:
        # Of the class: each thread has an instance of its own.
        memory = fsspec.get_filesystem_class("memory")
        whole, self.calls = memory.cat_file, list[tuple[int, int]]()

        def cat_file(filesystem: Any, path: str, start: int, end: int) -> bytes:
            self.calls.append((start, end))
            data = bytes(whole(filesystem, path, start=start, end=end))
            return script.pop(0)(data) if script else data

        monkeypatch.setattr(memory, "cat_file", cat_file)


def failing(data: bytes) -> bytes:
    raise OSError("reset by a test")


@pytest.fixture
def remote() -> str:
    url = "memory://ranged/object"
    file_io.write_bytes(url, DATA)
    return url


def test_short_answers_are_continued(ranges: RangeReader, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(monkeypatch, [lambda data: data[:10], failing, lambda data: data[:1]])
    assert ranges.read(remote, 100, 50) == DATA[100:150]
    assert flaky.calls == [(100, 150), (110, 150), (110, 150), (111, 150)]
    assert (ranges.transfer.bytes, ranges.transfer.requests, ranges.transfer.retries) == (50, 4, 3)


def test_tries_without_progress_are_bounded(ranges: RangeReader, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(monkeypatch, [lambda data: data[:10], *[failing] * 50])
    with pytest.raises(StorageError, match=r"object at byte 110: OSError: reset by a test.*gave up after 5 requests"):
        ranges.read(remote, 100, 50)
    assert len(flaky.calls) == 1 + QUICK.tries


def test_requests_of_a_read_are_bounded_even_with_progress(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(monkeypatch, [lambda data: data[:1]] * 500)
    with pytest.raises(StorageError, match="gave up after 9 requests"):
        RangeReader(retry_policy=ReadRetryPolicy(requests=9, first_wait_seconds=0.0)).read(remote, 0, 50)
    assert len(flaky.calls) == 9


def test_the_time_of_a_read_is_bounded(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky(monkeypatch, [failing] * 500)
    patience = ReadRetryPolicy(total_seconds=0.0, slowest_bytes_per_second=1e9)
    with pytest.raises(StorageError, match="reset by a test"):
        RangeReader(retry_policy=patience).read(remote, 0, 50)
    assert len(flaky.calls) == 1


def test_closing_ends_a_wait_for_another_try(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(data: bytes) -> bytes:
        failed.set()
        raise OSError("reset by a test")

    Flaky(monkeypatch, [fail] * 50)
    ranges = RangeReader(retry_policy=ReadRetryPolicy(first_wait_seconds=600.0, longest_wait_seconds=600.0))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(ranges.read, remote, 0, 50)
        assert failed.wait(10)
        ranges.close()
        with pytest.raises(StorageError, match="closed"):
            reading.result(10)


def test_a_store_without_ranges_is_an_error(ranges: RangeReader, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Flaky(monkeypatch, [lambda data: DATA])
    with pytest.raises(StorageError, match="has no ranges"):
        ranges.read(remote, 100, 50)


def test_unknown_schemes_are_errors_without_secrets(ranges: RangeReader) -> None:
    with pytest.raises(StorageError, match="nonsense://host/x") as caught:
        ranges.read("nonsense://user:secret@host/x?key=secret", 0, 1)
    assert "secret" not in str(caught.value)


def test_streams_are_bounded(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    both = threading.Event()

    def slow(data: bytes) -> bytes:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 2:
                both.set()
        both.wait(10)
        with lock:
            now[0] -= 1
        return data

    Flaky(monkeypatch, [slow] * 40)
    ranges = RangeReader(streams=2, retry_policy=QUICK)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda start: ranges.read(remote, start, 9) == DATA[start : start + 9], range(40)))
    assert most == [2]


def test_an_answer_in_chunks_has_no_length_but_its_range() -> None:
    progress = s3.ReadProgress()
    s3._check_response_range({"ContentRange": "bytes 4-7/20", "ETag": "a"}, 4, 4, progress)
    assert progress.identity == ("a", None, 20)
