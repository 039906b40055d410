"""Stands in for Ray Train's actor of barriers, which waits for all ranks at each report: our runs report nothing.

Ray starts one for each group of workers. This one's process imports a third of what Ray's does. No ray here: it is
imported in that process.
"""

from __future__ import annotations

from collections.abc import Collection


class NoBarrier:
    """Answers what Ray Train's controller asks of it; nobody waits at it."""

    def __init__(self, **_: object) -> None:
        """Ray's time limits are of no use."""

    def set_required_ranks(self, ranks: Collection[int] | None) -> bool:
        """Which ranks a barrier is to wait for when a node drains: done."""
        return True

    def reset(self) -> None:
        """Let go who waits: nobody does."""
