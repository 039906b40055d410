"""How many workers the cluster holds, now."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.run_spec import Placement
from orchestrator.scheduler import run_plan

POLL_SECONDS = 5.0
JOIN_TIMEOUT_SECONDS = 1.0

_log = logging.getLogger(__name__)


class CapacityMonitor:
    """Looks at the capacity while its `with` block runs, in a thread of its own: a query that hangs holds nobody up.

    What cannot be seen has not changed: a query that fails leaves the last number.
    """

    def __init__(
        self,
        slots: int,
        look: Callable[[], int] | None = None,
        on_change: Callable[[int, int], None] = lambda before, now: None,
    ) -> None:
        """slots: what is known. on_change: called in the thread with the numbers before and now."""
        self._slots, self._look, self._on_change = slots, look, on_change
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capacity", daemon=True)

    @property
    def slots(self) -> int:
        """Workers that the cluster holds at once."""
        return self._slots

    def __enter__(self) -> Self:
        if self._look is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_TIMEOUT_SECONDS)

    def _run(self) -> None:
        assert self._look is not None
        while not self._ended.wait(POLL_SECONDS):
            try:
                now = self._look()
                if now != self._slots and not self._ended.is_set():
                    before, self._slots = self._slots, now
                    self._on_change(before, now)
            except Exception as error:  # whatever it is, no run depends on it
                _log.warning("fleet: the cluster's capacity could not be looked at: %s", error)


def make_slot_counter(capacity: Callable[[], ClusterCapacity], placement: Placement, gpus: float) -> Callable[[], int]:
    """A look at how many workers of this placement the cluster holds."""
    return lambda: run_plan.count_slots(capacity(), placement, gpus)
