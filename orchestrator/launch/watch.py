"""Our eye inside Ray Train's controller: it keeps why workers ended, and readies the run for another number of them."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    ShuttingDownState,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from orchestrator.checkpoint import places
from orchestrator.config.printable import redact
from orchestrator.launch import notice
from orchestrator.storage import files
from orchestrator.training import attempts
from orchestrator.training.job import attempts_of, checkpoints_of

WRITE_SECONDS = 5.0  # for the record of a failure; the restart does not wait longer for storage
VERDICT_SECONDS = 2.0  # for Ray to find out which workers are dead when a living one was the first to complain
ELASTIC_VERDICT_SECONDS = 15.0  # the same when the answer decides how many workers are started
RECOUNT_SECONDS = 5.0  # between counts of the nodes; Ray's own come every 20 s
RECOUNT_WAIT_SECONDS = 5.0
MEMORY_SECONDS = 1.1  # Ray's scaling policy goes by its last count for a second
SAVE_SECONDS = 30.0  # for the checkpoint before a change of the number of workers
LOOK_SECONDS = 0.2

_DETAIL = re.compile(r"Worker exit detail: (.+)")
_log = logging.getLogger(__name__)


class ControllerWatch(ControllerCallback, WorkerGroupCallback):
    """Called by Ray Train in its controller's thread. Nothing here raises: what a callback raises ends the run."""

    def __init__(self, folder: str, elastic: bool) -> None:
        """folder: URL of the run's folder. elastic: whether the number of workers may change."""
        self._folder, self._elastic = folder, elastic
        self._requester = ""
        self._group: Any = None
        self._recounted = 0.0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Note the name under which Ray reserves resources for this run."""
        self._requester = f"train-{train_run_context.run_id}"

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Note the workers."""
        self._group = worker_group

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Have the nodes counted now and then, so that a node that joins is used soon."""
        if self._elastic and time.monotonic() - self._recounted > RECOUNT_SECONDS:
            self._recount(wait=False)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Record a failure, or let the run save before its workers are replaced; then count the nodes."""
        try:
            self._entered(current_state)
        except Exception:
            _log.exception("what the controller went through could not be recorded")
        if self._elastic and isinstance(current_state, RestartingState | ReschedulingState):
            self._recount(wait=True)
            time.sleep(MEMORY_SECONDS)

    def _entered(self, state: Any) -> None:
        if isinstance(state, RestartingState):
            self._failed(state.training_failed_error)
        elif isinstance(state, ShuttingDownState) and isinstance(state.next_state, ErroredState):
            self._failed(state.next_state.training_failed_error)
        elif isinstance(state, ResizingState):
            self._save_first(state.scaling_decision.num_workers)  # type: ignore[attr-defined]

    def _failed(self, error: Exception) -> None:
        noticed = time.time()
        causes = told(error)
        try:
            if isinstance(error, WorkerGroupError):
                causes |= self._verdicts(set(error.worker_failures))
        finally:
            self._keep(noticed, causes)

    def _verdicts(self, known: set[int]) -> dict[str, str]:
        """What became of the workers that have not complained: the cause is often theirs."""
        asked = {one.execute_async(_here): rank for rank, one in enumerate(self._group.get_workers())}
        asked = {reference: rank for reference, rank in asked.items() if rank not in known}
        if not asked:
            return {}
        seconds = ELASTIC_VERDICT_SECONDS if self._elastic else VERDICT_SECONDS
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        found = {str(asked[reference]): f"did not answer for {seconds:g} s" for reference in silent}
        for reference in answered:
            try:
                ray.get(reference, timeout=WRITE_SECONDS)
            except Exception as error:
                found[str(asked[reference])] = cause_of(error)
        return found

    def _keep(self, moment: float, causes: dict[str, str]) -> None:
        """Write what was seen, in a thread: storage that hangs must not hold up the restart."""
        url = files.join(attempts_of(self._folder), f"failed-{round(1000 * moment)}.json")
        shown = {who: redact(cause) for who, cause in causes.items()}
        arguments = (self._folder, url, {"time": moment, "causes": shown})
        writer = threading.Thread(target=_write, args=arguments, name="failure-record", daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)

    def _save_first(self, workers: int) -> None:
        """Ask rank 0 for a checkpoint and wait for it, so that a change of the number of workers costs no work."""
        before = _committed(self._folder)
        ray.get(self._group.execute_single_async(0, notice.announce), timeout=RECOUNT_WAIT_SECONDS)
        deadline = time.monotonic() + SAVE_SECONDS
        while _committed(self._folder) == before and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        self._keep(time.time(), {"workers": f"from {len(self._group)} to {workers} workers: nodes came or went"})

    def _recount(self, wait: bool) -> None:
        """Have Ray's coordinator count the nodes now."""
        self._recounted = time.monotonic()
        try:
            coordinator = get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
            counted = coordinator.get_reserved_resources.remote(self._requester, recompute=True)
            if wait:
                ray.get(counted, timeout=RECOUNT_WAIT_SECONDS)
        except Exception as error:  # on the user's screen: in a line
            _log.warning("the nodes could not be counted: %s", error)


def told(error: Exception) -> dict[str, str]:
    """The causes that a failure names, by rank, or under another word when no worker is to blame."""
    if isinstance(error, WorkerGroupError):
        return {str(rank): cause_of(one) for rank, one in sorted(error.worker_failures.items())}
    if isinstance(error, PreemptionError):
        return {str(rank): "its node was preempted" for rank in error.preemption_info.preempted_ranks}
    if isinstance(error, ControllerError):
        return {"controller": cause_of(error.controller_failure)}
    return {"controller": cause_of(error)}


def cause_of(error: Exception) -> str:
    """Why a worker ended, in a line."""
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    text = str(error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"worker did not answer: {_first_line(text)}"
    if not isinstance(error, RayActorError):
        return f"{type(error).__name__}: {_first_line(text)}"
    if error.preempted:
        return "its node was preempted"
    if "node has died" in text or "node was terminated" in text:
        return "its node died"
    if "low on memory" in text:
        return "worker killed: its node ran out of memory"
    detail = _DETAIL.search(text)
    return f"worker died: {_sentence(detail[1]) if detail else _first_line(text)}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def _sentence(text: str) -> str:
    """What Ray knows, without the list of what it supposes."""
    return text.partition(" Some common causes")[0].strip()


def _here() -> bool:
    return True


def _committed(folder: str) -> str | None:
    """The newest checkpoint of a run that counts."""
    void = attempts.void(folder)
    return next((place.url for place in places.committed(checkpoints_of(folder)) if void(place) is None), None)


def _write(folder: str, url: str, record: dict[str, object]) -> None:
    try:
        about = record | {"attempt": attempts.latest(folder)}
        files.write_bytes(url, json.dumps(about).encode())
    except OSError as error:
        _log.warning("a failure could not be recorded: %s", error)
