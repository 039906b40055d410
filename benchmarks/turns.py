"""Two sets of processes that have the machine in turns, so that its slow spells meet both alike.

A virtual machine's speed changes by tens of percent from one minute to the next with what its neighbours do, and says
nothing of it: stolen time stays 0 and CPU seconds grow with the others. What takes minutes cannot be held against what
took minutes before or after it; against what had its turn some seconds ago it can.

The side whose turn it is not is stopped (SIGSTOP) with all its descendants, and its clock with it.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.support.launched import process_tree

MOST_LOOKS = 20  # at a tree whose processes keep starting others while they are stopped one by one


class Stopwatch:
    """Seconds that somebody had, of unix times at which they ran or were stopped."""

    def __init__(self) -> None:
        self._edges: list[float] = []  # stopped, continued, stopped, ...; rising

    def stopped(self) -> None:
        """Note that they are stopped from now on; no more than that where they already are."""
        if len(self._edges) % 2 == 0:
            self._edges.append(time.time())

    def continued(self) -> None:
        """Note that they run from now on."""
        if len(self._edges) % 2:
            self._edges.append(time.time())

    def until(self, moment: float) -> float:
        """Seconds that they ran until a moment, from an arbitrary one on: differences count."""
        passed = bisect.bisect_right(self._edges, moment)
        edges = self._edges[:passed] + ([moment] if passed % 2 else [])
        return moment - sum(end - start for start, end in zip(edges[::2], edges[1::2], strict=True))

    def between(self, start: float, end: float) -> float:
        """Seconds that they ran between two moments."""
        return self.until(end) - self.until(start)


class Side:
    """One of the two: its processes and its clock."""

    def __init__(self, roots: Callable[[], Sequence[int]]) -> None:
        """roots: gives those of the processes from which all others descend that have not ended."""
        self._roots = roots
        self._stopped: list[int] = []
        self.watch = Stopwatch()

    def stop(self) -> None:
        """Stop all its processes; its clock stops when those are that were there.

        Raises RuntimeError when there is no end of new ones.
        """
        for _ in range(MOST_LOOKS):
            # Parents come first in a tree, so that none that was seen starts another.
            fresh = [pid for root in self._roots() for pid in process_tree(root) if pid not in self._stopped]
            if not fresh:
                return
            _send(fresh, signal.SIGSTOP)
            self.watch.stopped()
            self._stopped.extend(fresh)
        raise RuntimeError(f"processes {list(self._roots())} start others faster than they can be stopped")

    def alive(self) -> bool:
        """Return whether it has a process left."""
        return bool(self._roots())

    def go_on(self) -> None:
        """Let all its processes run."""
        self.watch.continued()
        _send(self._stopped, signal.SIGCONT)
        self._stopped = []


@contextmanager
def taken(one: Side, seconds: float, other: Side, other_seconds: float) -> Iterator[None]:
    """Give the machine to `one` for some seconds, then to the other for some, and so on; to both at the end.

    At the start `one` is running and the other stopped, and the other's turn begins immediately. There are no turns
    after the other has ended. Raises at the end what disturbed them: then both had the machine at the same time, and
    their clocks mean nothing.
    """
    over = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="turns") as pool:
        turns = pool.submit(_take, one, seconds, other, other_seconds, over)
        try:
            yield
        finally:
            over.set()
        turns.result()


def _take(one: Side, seconds: float, other: Side, other_seconds: float, over: threading.Event) -> None:
    try:
        while not over.is_set() and other.alive():
            one.stop()
            other.go_on()
            over.wait(other_seconds)
            other.stop()
            one.go_on()
            over.wait(seconds)
    finally:
        for side in (one, other):
            side.go_on()


def _send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
