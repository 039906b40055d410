"""The bounded queue between a training loop and the journal's uploads."""

from __future__ import annotations

import heapq
from collections import Counter, deque

# Kinds whose loss costs a point of a curve; anything else (incidents, epochs, outcomes) is kept longer.
_EXPENDABLE = "metrics"


class Spool:
    """Numbered lines waiting for upload; when full, the oldest metrics go first, then the oldest of the rest.

    Not thread-safe: the journal holds its lock around every call.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: lines held at most. Raises ValueError when it is below 1."""
        if capacity < 1:
            raise ValueError(f"capacity: {capacity} lines; give at least 1")
        self._capacity = capacity
        self._metrics: deque[tuple[int, str]] = deque()
        self._others: deque[tuple[int, str]] = deque()
        self._next = 0
        self._dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._metrics) + len(self._others)

    @property
    def next_number(self) -> int:
        """The number that the next line will get."""
        return self._next

    @property
    def oldest(self) -> int:
        """The number of the oldest waiting line, or next_number when none waits."""
        return min((queue[0][0] for queue in (self._metrics, self._others) if queue), default=self._next)

    def put(self, kind: str, line: str) -> None:
        """Add a line, making room for it where there is none."""
        (self._metrics if kind == _EXPENDABLE else self._others).append((self._next, line))
        self._next += 1
        if len(self) > self._capacity:
            queue, name = (self._metrics, "metrics") if self._metrics else (self._others, "others")
            queue.popleft()
            self._dropped[name] += 1

    def take(self) -> tuple[list[str], dict[str, int]]:
        """All waiting lines in order of arrival, and how many were dropped since the last call, by class."""
        lines = [line for _, line in heapq.merge(self._metrics, self._others)]
        dropped = dict(self._dropped)
        self._metrics.clear()
        self._others.clear()
        self._dropped.clear()
        return lines, dropped
