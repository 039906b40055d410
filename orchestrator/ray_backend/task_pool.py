"""A pool of tasks on the cluster, for packing and scoring, that yields results as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.config.output import prepare_output
from orchestrator.ray_backend.launch_errors import TaskError

# A task whose worker or node died runs again elsewhere this often; our own exceptions are not retried.
MAX_RETRIES = 3


def run_tasks(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], cpus: float, gpus: float, at_once: int,
    stop: Callable[[], bool],
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Yield (index of the arguments, result) of each call as it ends, with at most `at_once` calls running.

    Stops early, cancelling what runs, when `stop()` is true. Raises TaskError when a task failed.
    """
    options = {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_retries": MAX_RETRIES,
        "name": getattr(function, "__name__", "task"),
    }
    remote = ray.remote(_run_task).options(**options)
    waiting = list(enumerate(arguments))[::-1]
    running: dict[Any, int] = {}
    try:
        while (waiting or running) and not stop():
            while waiting and len(running) < at_once:
                number, argument = waiting.pop()
                running[remote.remote(function, *argument)] = number
            done, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
            for reference in done:
                yield running.pop(reference), _get_result(reference)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _run_task(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run one task, in the process of a worker."""
    prepare_output()
    return function(*arguments)


def _get_result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise TaskError(f"{type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise TaskError(f"a task's worker died {MAX_RETRIES + 1} times: {error}") from error
