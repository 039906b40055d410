"""Shards in threads of this process: what launch.pool does with tasks."""

import threading
from typing import Any

import pytest

from orchestrator.launch import packing


def never() -> bool:
    return False


def test_each_result_comes_with_its_number() -> None:
    found = list(packing.in_threads(lambda x: x * x, [(n,) for n in range(20)], 3, never))
    assert sorted(found) == [(n, n * n) for n in range(20)]


def test_no_more_than_asked_for_are_under_way() -> None:
    lock, running, most = threading.Lock(), 0, 0
    gate = threading.Barrier(3)

    def work(_number: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(10)  # three are needed to go on
        with lock:
            running -= 1

    assert len(list(packing.in_threads(work, [(n,) for n in range(9)], 3, never))) == 9
    assert most == 3


def test_a_failure_is_raised_and_nothing_more_begun() -> None:
    began: list[int] = []

    def work(number: int) -> int:
        began.append(number)
        if number == 2:
            raise ValueError("shard 2")
        return number

    with pytest.raises(ValueError, match="shard 2"):
        list(packing.in_threads(work, [(n,) for n in range(50)], 1, never))
    assert began == [0, 1, 2]


def test_a_stop_lets_what_runs_end_and_begins_nothing() -> None:
    stopped = threading.Event()
    ended: list[Any] = []

    def work(number: int) -> int:
        if number == 1:
            stopped.set()
        ended.append(number)
        return number

    found = list(packing.in_threads(work, [(n,) for n in range(50)], 1, stopped.is_set))
    assert [number for number, _ in found] == ended == [0, 1]
