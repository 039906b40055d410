"""Whether this worker's group is about to be replaced. Imported in workers and in the driver: no torch here."""

from __future__ import annotations

import threading

from ray.train.v2._internal.execution.context import get_train_context

_replacement_announced = threading.Event()


def announce_replacement() -> None:
    """Note that the group of workers is about to be replaced. Called in rank 0's process, by the driver."""
    _replacement_announced.set()


def is_shutdown_imminent() -> bool:
    """Whether the workers are about to be taken down: a node of theirs drains, or their number is to change.

    As this rank knows; it costs nothing and waits for nobody. (Ray's public question is a barrier of all ranks.)
    """
    return _replacement_announced.is_set() or get_drain_deadline() is not None


def get_drain_deadline() -> float | None:
    """When a draining node of the run goes away, in unix seconds (0: unknown); None when none drains.

    Ray's watcher tells every rank; a Ray that does not know of it never does.
    """
    notice = getattr(get_train_context(), "preemption_context", None)
    info = getattr(notice, "preemption_info", None)
    return None if info is None else (info.deadline_ms or 0) / 1000
