"""Around every job that uses a cluster: errors as one line each and an exit status."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.launch import screen
from orchestrator.launch.cluster import ClusterError
from orchestrator.launch.pool import TaskError
from orchestrator.launch.preflight import PreflightError
from orchestrator.launch.screen import FAILED, INTERRUPTED, REFUSED, console

__all__ = ["FAILED", "INTERRUPTED", "REFUSED", "console", "guarded"]


def guarded(prog: str, main: Callable[[], int]) -> int:
    """The exit status of a job: 0 done, 1 failed, 2 refused, 128 + n stopped by signal n."""
    return screen.guarded(prog, lambda: _on_cluster(prog, main))


def _on_cluster(prog: str, main: Callable[[], int]) -> int:
    try:
        return main()
    except PreflightError as error:
        return screen.tell(prog, list(error.problems), FAILED)
    except (ClusterError, TaskError) as error:
        return screen.tell(prog, [str(error)], FAILED)
