"""Around every job that uses a cluster: errors as one line each and an exit status."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from orchestrator.launch import screen
from orchestrator.launch.cluster import ClusterError
from orchestrator.launch.config import JobConfig
from orchestrator.launch.pool import TaskError
from orchestrator.launch.preflight import PreflightError
from orchestrator.launch.screen import FAILED, INTERRUPTED, REFUSED, console
from orchestrator.launch.session import NotRecordedError
from orchestrator.recipe.config import Recipe

__all__ = ["FAILED", "INTERRUPTED", "REFUSED", "console", "guarded", "starting_recipe"]


def guarded(prog: str, main: Callable[[], int]) -> int:
    """The exit status of a job: 0 done, 1 failed, 2 refused, 128 + n stopped by signal n."""
    with screen.lasting_output():
        return screen.guarded(prog, lambda: _on_cluster(prog, main))


def starting_recipe(config: JobConfig) -> Recipe:
    """The recipe of a job, with the digest of the weights that it is to start from.

    Raises ConfigError for weights that cannot be used; StorageError.
    """
    if not config.weights and not config.recipe.initial_weights:
        return config.recipe
    # Imported for those who ask: it takes torch, and torch two seconds.
    found: Recipe = import_module("orchestrator.training.initial").given(config.recipe, config.weights)
    return found


def _on_cluster(prog: str, main: Callable[[], int]) -> int:
    try:
        return main()
    except PreflightError as error:
        return screen.tell(prog, list(error.problems), FAILED)
    except (ClusterError, TaskError, NotRecordedError) as error:
        return screen.tell(prog, [str(error)], FAILED)
