"""Tells a run's workers that a node of theirs is about to go: Ray's watcher, as a thread of the driver.

Ray Train's own callback gives the watcher a process of its own, which costs each start two seconds of a core and goes
on waking up, for one small question to Ray's head every few seconds.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.preemption import PreemptionWatcher

# Two minutes' notice is the usual, half of one the least; of Ray's 5 s between looks a checkpoint makes better use.
LOOK_SECONDS = 2.0

_log = logging.getLogger(__name__)


class DrainWatch(WorkerGroupCallback):
    """Called by Ray Train in its controller's thread, once for each group of workers. Nothing here raises."""

    def __init__(self) -> None:
        self._watcher: PreemptionWatcher | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes that these workers are on, and no longer those of a group before."""
        self._stop()
        try:
            workers = {one.distributed_context.world_rank: one for one in worker_group.get_workers()}
            ranks_of: dict[str, list[int]] = {}
            for rank, worker in workers.items():
                ranks_of.setdefault(worker.metadata.node_id, []).append(rank)
            actors = {rank: worker.actor for rank, worker in workers.items()}
            self._watcher = PreemptionWatcher(ranks_of, LOOK_SECONDS, actors)
        except Exception:  # what a callback raises ends the run, which can do without a notice
            _log.exception("the nodes of the workers are not watched: they will go without a notice")

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Watch no more."""
        self._stop()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        """Watch no more."""
        self._stop()

    def _stop(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher._stop_event.set()
