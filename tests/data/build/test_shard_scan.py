"""Work on many shards: every result or tolerated error is returned, and an end is an end for all."""

import io
import threading

import pytest
from rich.console import Console

from orchestrator.data.build import shard_scan
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("terminal", [False, True])
def test_every_result_or_tolerated_error_is_returned_in_order(threads: int, terminal: bool) -> None:
    def work(item: int, _ranges: RangeReader) -> int:
        if item == 7:
            raise DataError("item 7")
        return item * item

    screen = console(terminal)
    found = shard_scan.run_on_shards(range(20), work, DataError, 2, threads, screen, "work")
    assert list(map(str, found)) == [str(n * n) if n != 7 else "item 7" for n in range(20)]
    assert isinstance(screen.file, io.StringIO)
    assert "error: item 7" in screen.file.getvalue()


@pytest.mark.parametrize("failure", [ValueError, DataError])
def test_one_failure_too_many_ends_the_work_of_all(failure: type[ValueError]) -> None:
    """The other thread reads a tar that has no end: only its reader can stop it."""
    reading = threading.Event()
    file_io.write_bytes("memory://endless/x.tar", b"x")
    ended: list[str] = []

    def work(item: int, ranges: RangeReader) -> int:
        if item == 0:
            assert reading.wait(30)
            raise failure("item 0")
        try:
            while True:
                ranges.read("memory://endless/x.tar", 0, 1)
                reading.set()
        except StorageError as error:
            ended.append(str(error))
            raise

    with pytest.raises(failure, match="item 0"):
        shard_scan.run_on_shards(range(50), work, DataError, 1, 2, console(), "work")
    assert 1 <= len(ended) <= 2
    assert "the reader is closed" in ended[0]


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_scan, "LOG_SECONDS", 0.0)
    screen = console()
    shard_scan.run_on_shards(range(3), lambda item, ranges: item, DataError, 1, 1, screen, "indexing")
    assert isinstance(screen.file, io.StringIO)
    assert "indexing: 3 of 3 shards\n" in screen.file.getvalue()


def test_nothing_to_do() -> None:
    assert shard_scan.run_on_shards([], lambda item, ranges: 0, DataError, 1, 4, console(), "x") == []
