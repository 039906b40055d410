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

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config.redaction import redact
from orchestrator.ray_backend import preemption_notice
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.run_dir import get_attempts_dir, get_checkpoints_dir

RECORD_TIMEOUT_SECONDS = 5.0  # for the record of a failure; the restart does not wait longer for storage
WORKER_QUERY_SECONDS = 2.0  # for Ray to find out which workers are dead when a living one was the first to complain
ELASTIC_WORKER_QUERY_SECONDS = 15.0  # the same when the answer decides how many workers are started
NODE_REFRESH_SECONDS = 5.0  # between counts of the nodes; Ray's own come every 20 s
NODE_REFRESH_TIMEOUT_SECONDS = 5.0
SCALING_CACHE_SECONDS = 1.1  # Ray's scaling policy goes by its last count for a second
RESIZE_CHECKPOINT_SECONDS = 30.0  # for the checkpoint before a change of the number of workers
CHECKPOINT_POLL_SECONDS = 0.2

_EXIT_DETAIL = re.compile(r"Worker exit detail: (.+)")
_log = logging.getLogger(__name__)


class FailureRecorderCallback(ControllerCallback, WorkerGroupCallback):
    """Called by Ray Train in its controller's thread. Nothing here raises: what a callback raises ends the run."""

    def __init__(self, folder: str, elastic: bool) -> None:
        """folder: URL of the run's folder. elastic: whether the number of workers may change."""
        self._folder, self._elastic = folder, elastic
        self._requester = ""
        self._group: Any = None
        self._last_refresh = 0.0

    def after_controller_start(self, train_run_context: Any) -> None:
        """Note the name under which Ray reserves resources for this run."""
        self._requester = f"train-{train_run_context.run_id}"

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Note the workers."""
        self._group = worker_group

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Have the nodes counted now and then, so that a node that joins is used soon."""
        if self._elastic and time.monotonic() - self._last_refresh > NODE_REFRESH_SECONDS:
            self._refresh_node_count(wait=False)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Record a failure, or let the run save before its workers are replaced; then count the nodes."""
        try:
            self._handle_state(current_state)
        except Exception:
            _log.exception("what the controller went through could not be recorded")
        if self._elastic and isinstance(current_state, RestartingState | ReschedulingState):
            self._refresh_node_count(wait=True)
            time.sleep(SCALING_CACHE_SECONDS)

    def _handle_state(self, state: Any) -> None:
        if isinstance(state, RestartingState):
            self._record_failure(state.training_failed_error)
        elif isinstance(state, ShuttingDownState) and isinstance(state.next_state, ErroredState):
            self._record_failure(state.next_state.training_failed_error)
        elif isinstance(state, ResizingState):
            self._checkpoint_before_resize(state.scaling_decision.num_workers)  # type: ignore[attr-defined]

    def _record_failure(self, error: Exception) -> None:
        noticed = time.time()
        causes = find_failure_causes(error)
        try:
            if isinstance(error, WorkerGroupError):
                causes |= self._query_silent_workers(set(error.worker_failures))
        finally:
            self._write_record(noticed, causes)

    def _query_silent_workers(self, known: set[int]) -> dict[str, str]:
        """What became of the workers that have not complained: the cause is often theirs."""
        asked = {one.execute_async(_answer_ping): rank for rank, one in enumerate(self._group.get_workers())}
        asked = {reference: rank for reference, rank in asked.items() if rank not in known}
        if not asked:
            return {}
        seconds = ELASTIC_WORKER_QUERY_SECONDS if self._elastic else WORKER_QUERY_SECONDS
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        found = {str(asked[reference]): f"did not answer for {seconds:g} s" for reference in silent}
        for reference in answered:
            try:
                ray.get(reference, timeout=RECORD_TIMEOUT_SECONDS)
            except Exception as error:
                found[str(asked[reference])] = describe_cause(error)
        return found

    def _write_record(self, moment: float, causes: dict[str, str]) -> None:
        """Write what was seen, in a thread: storage that hangs must not hold up the restart."""
        url = file_io.join(get_attempts_dir(self._folder), f"failed-{round(1000 * moment)}.json")
        shown = {who: redact(cause) for who, cause in causes.items()}
        arguments = (self._folder, url, {"time": moment, "causes": shown})
        writer = threading.Thread(target=_write_failure_file, args=arguments, name="failure-record", daemon=True)
        writer.start()
        writer.join(RECORD_TIMEOUT_SECONDS)

    def _checkpoint_before_resize(self, workers: int) -> None:
        """Ask rank 0 for a checkpoint and wait for it, so that a change of the number of workers costs no work."""
        before = _find_newest_checkpoint(self._folder)
        ray.get(
            self._group.execute_single_async(0, preemption_notice.announce_replacement),
            timeout=NODE_REFRESH_TIMEOUT_SECONDS,
        )
        deadline = time.monotonic() + RESIZE_CHECKPOINT_SECONDS
        while _find_newest_checkpoint(self._folder) == before and time.monotonic() < deadline:
            time.sleep(CHECKPOINT_POLL_SECONDS)
        self._write_record(
            time.time(), {"workers": f"from {len(self._group)} to {workers} workers: nodes came or went"}
        )

    def _refresh_node_count(self, wait: bool) -> None:
        """Have Ray's coordinator count the nodes now."""
        self._last_refresh = time.monotonic()
        try:
            coordinator = get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
            counted = coordinator.get_reserved_resources.remote(self._requester, recompute=True)
            if wait:
                ray.get(counted, timeout=NODE_REFRESH_TIMEOUT_SECONDS)
        except Exception as error:  # on the user's screen: in a line
            _log.warning("the nodes could not be counted: %s", error)


def find_failure_causes(error: Exception) -> dict[str, str]:
    """The causes that a failure names, by rank, or under another word when no worker is to blame."""
    if isinstance(error, WorkerGroupError):
        return {str(rank): describe_cause(one) for rank, one in sorted(error.worker_failures.items())}
    if isinstance(error, PreemptionError):
        return {str(rank): "its node was preempted" for rank in error.preemption_info.preempted_ranks}
    if isinstance(error, ControllerError):
        return {"controller": describe_cause(error.controller_failure)}
    return {"controller": describe_cause(error)}


def describe_cause(error: Exception) -> str:
    """Why a worker ended, in a line."""
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    text = str(error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"worker did not answer: {_get_first_line(text)}"
    if not isinstance(error, RayActorError):
        return f"{type(error).__name__}: {_get_first_line(text)}"
    if error.preempted:
        return "its node was preempted"
    if "node has died" in text or "node was terminated" in text:
        return "its node died"
    if "low on memory" in text:
        return "worker killed: its node ran out of memory"
    detail = _EXIT_DETAIL.search(text)
    return f"worker died: {_strip_suppositions(detail[1]) if detail else _get_first_line(text)}"


def _get_first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")


def _strip_suppositions(text: str) -> str:
    """What Ray knows, without the list of what it supposes."""
    return text.partition(" Some common causes")[0].strip()


def _answer_ping() -> bool:
    return True


def _find_newest_checkpoint(folder: str) -> str | None:
    """The newest checkpoint of a run that counts."""
    void = attempts.load_stale_checkpoint_check(folder)
    return next(
        (
            place.url
            for place in checkpoint_dir.iter_committed_checkpoints(get_checkpoints_dir(folder))
            if void(place) is None
        ),
        None,
    )


def _write_failure_file(folder: str, url: str, record: dict[str, object]) -> None:
    try:
        about = record | {"attempt": attempts.find_latest_number(folder)}
        file_io.write_bytes(url, json.dumps(about).encode())
    except OSError as error:
        _log.warning("a failure could not be recorded: %s", error)
