"""Work on many shards: every result is handed over, and an end is an end for all."""

import io
import threading

import pytest
from rich.console import Console

from orchestrator.data.build import shard_scan
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("terminal", [False, True])
def test_every_result_is_received_in_the_calling_thread(threads: int, terminal: bool) -> None:
    got: dict[int, int] = {}

    def receive(number: int, result: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        got[number] = result

    def work(item: int, _ranges: RangeReader) -> int:
        return item * item

    shard_scan.run_on_shards(range(20), work, receive, threads, console(terminal), "work")
    assert got == {n: n * n for n in range(20)}


@pytest.mark.parametrize("guilty", ["work", "receive"])
def test_one_failure_ends_the_work_of_all(guilty: str) -> None:
    """The other thread reads a tar that has no end: only its reader can stop it."""
    reading = threading.Event()
    file_io.write_bytes("memory://endless/x.tar", b"x")
    ended: list[str] = []

    def work(item: int, ranges: RangeReader) -> int:
        if item == 0:
            assert reading.wait(30)
            if guilty == "work":
                raise ValueError("item 0")
            return item
        try:
            while True:
                ranges.read("memory://endless/x.tar", 0, 1)
                reading.set()
        except StorageError as error:
            ended.append(str(error))
            raise

    def receive(number: int, result: int) -> None:
        raise ValueError(f"item {number}")

    with pytest.raises(ValueError, match="item 0"):
        shard_scan.run_on_shards(range(50), work, receive, 2, console(), "work")
    assert 1 <= len(ended) <= 2
    assert "the reader is closed" in ended[0]


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_scan, "LOG_SECONDS", 0.0)
    screen = console()
    shard_scan.run_on_shards(range(3), lambda item, ranges: item, lambda *_: None, 1, screen, "indexing")
    assert isinstance(screen.file, io.StringIO)
    assert "indexing: 3 of 3 shards\n" in screen.file.getvalue()


def test_nothing_to_do() -> None:
    received: list[int] = []
    shard_scan.run_on_shards([], lambda item, ranges: 0, lambda number, _: received.append(number), 4, console(), "x")
    assert received == []
