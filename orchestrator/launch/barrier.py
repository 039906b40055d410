"""Stands in for Ray Train's actor of barriers, which waits for all ranks at each report: our runs report nothing.

Ray Train starts one for each group of workers, and a process that does nothing but exist costs a hundredth of a core:
Ray's workers look for signals a hundred times a second.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import ray

_INTERNAL = "ray.train.v2._internal.execution.worker_group"


class Answer:
    """What looks like the method of an actor, and gives the same answer to all."""

    def __init__(self, value: object) -> None:
        self._value = value

    def remote(self, *_: object, **__: object) -> Any:
        """The answer's reference."""
        return ray.put(self._value)


class NoBarrier:
    """What looks like that actor's class, and like the actor, and is no process; nobody waits at it."""

    def __init__(self) -> None:
        # What Ray Train's controller asks when a node drains, and when it replaces some of the workers.
        self.set_required_ranks, self.reset = Answer(True), Answer(None)

    @classmethod
    def options(cls, **_: object) -> type[NoBarrier]:
        """Wherever Ray Train would place it."""
        return cls

    @classmethod
    def remote(cls, **_: object) -> NoBarrier:
        """Whatever its time limits would be."""
        return cls()


def install() -> None:
    """Have the groups of workers that this process starts do without the actor."""
    groups: Any = import_module(f"{_INTERNAL}.worker_group")
    states: Any = import_module(f"{_INTERNAL}.state")
    groups.SynchronizationActor = NoBarrier
    states._shutdown_sync_actor = _shut_down


def _shut_down(sync_actor: object) -> None:
    """There is no process to kill."""
