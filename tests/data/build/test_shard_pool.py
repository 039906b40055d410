"""Work on many shards: every result is handed over, and an end is an end for all."""

import io
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from orchestrator.data.build import shard_pool

Tick = Callable[[int], None]


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("terminal", [False, True])
def test_every_result_is_received_in_the_calling_thread(threads: int, terminal: bool) -> None:
    got: dict[int, int] = {}

    def receive(number: int, result: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        got[number] = result

    def work(item: int, tick: Tick) -> int:
        tick(1)
        return item * item

    shard_pool.run_on_shards(range(20), work, receive, threads, console(terminal), "work", 20)
    assert got == {n: n * n for n in range(20)}


@pytest.mark.parametrize("guilty", ["work", "receive"])
def test_one_failure_ends_the_work_of_all(guilty: str) -> None:
    """The other thread reads a tar that has no end: only `tick` can stop it."""
    reading = threading.Event()

    def work(item: int, tick: Tick) -> int:
        if item == 0:
            assert reading.wait(30)
            if guilty == "work":
                raise ValueError("item 0")
            return item
        while item == 1:
            tick(1)
            reading.set()
        raise AssertionError("items that wait are not begun")

    def receive(number: int, result: int) -> None:
        raise ValueError(f"item {number}")

    with pytest.raises(ValueError, match="item 0"):
        shard_pool.run_on_shards(range(50), work, receive, 2, console(), "work", 50)


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pool, "LOG_SECONDS", 0.0)
    screen = console()
    shard_pool.run_on_shards(range(3), lambda item, tick: item, lambda number, result: None, 1, screen, "indexing", 0)
    assert isinstance(screen.file, io.StringIO)
    assert "indexing: 3 of 3 shards\n" in screen.file.getvalue()


def test_nothing_to_do() -> None:
    shard_pool.run_on_shards([], lambda item, tick: item, lambda number, result: None, 4, console(), "work", 0)
