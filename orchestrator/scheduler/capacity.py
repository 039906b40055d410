"""The number of workers that fit on the cluster, and a monitor that follows it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from orchestrator.ray_backend.cluster import ClusterCapacity
from orchestrator.ray_backend.run_spec import Placement

POLL_SECONDS = 5.0
JOIN_TIMEOUT_SECONDS = 1.0

_log = logging.getLogger(__name__)


class CapacityMonitor:
    """A thread that polls the capacity while its `with` block runs, so that a query that hangs delays nothing.

    A query that fails leaves the last number.
    """

    def __init__(
        self,
        slots: int,
        query_slots: Callable[[], int] | None = None,
        on_change: Callable[[int, int], None] = lambda before, now: None,
    ) -> None:
        """slots: the known number. on_change: called in the thread with the numbers before and now."""
        self._slots, self._query_slots, self._on_change = slots, query_slots, on_change
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capacity", daemon=True)

    @property
    def slots(self) -> int:
        """Workers that fit on the cluster at the same time."""
        return self._slots

    def __enter__(self) -> Self:
        if self._query_slots is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(JOIN_TIMEOUT_SECONDS)

    def _run(self) -> None:
        assert self._query_slots is not None
        while not self._ended.wait(POLL_SECONDS):
            try:
                now = self._query_slots()
                if now != self._slots and not self._ended.is_set():
                    before, self._slots = self._slots, now
                    self._on_change(before, now)
            except Exception as error:  # whatever it is, no run depends on it
                _log.warning("scheduler: cannot query the cluster's capacity: %s", error)


def count_slots(capacity: ClusterCapacity, placement: Placement, gpus: float) -> int:
    """Count the workers that fit on the cluster, nodes that its autoscaler can add included.

    gpus: of each worker. A node without room for a whole worker counts nothing.
    """
    live = capacity.count_bundles(placement.cpus_per_worker, gpus)
    if capacity.max_cpus is None or capacity.max_gpus is None:
        return live
    # The autoscaler adds nodes when runs ask for them, so runs have to start before the nodes are there.
    most = capacity.max_cpus // placement.cpus_per_worker
    return max(live, int(most if gpus <= 0 else min(most, capacity.max_gpus // gpus)))
