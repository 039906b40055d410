"""Records of why a run's workers failed, written into the run's folder by Ray Train's controller."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, PreemptionError, UserCallback, WorkerGroupError

from orchestrator.config.redaction import redact
from orchestrator.ray_backend.launch_errors import strip_suppositions
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.run_dir import get_attempts_dir

RECORD_TIMEOUT_SECONDS = 5.0  # for the record of a failure; the restart does not wait longer for storage
WORKER_QUERY_SECONDS = 2.0  # for Ray to find out which workers are dead when a living one was the first to complain
ELASTIC_WORKER_QUERY_SECONDS = 15.0  # the same when the answer decides how many workers are started
ANNOUNCE_TIMEOUT_SECONDS = 5.0
RESIZE_CHECKPOINT_SECONDS = 30.0  # for the checkpoint before a change of the number of workers
CHECKPOINT_POLL_SECONDS = 0.2

_EXIT_DETAIL = re.compile(r"Worker exit detail: (.+)")
_log = logging.getLogger(__name__)


class FailureRecorder(UserCallback):
    """Recorder of one run's failures, in the process of Ray Train's controller.

    Where the fast start is off it is Ray Train's public callback, which is called for workers that raised or died only:
    nothing is known then of preemption and of the controller's failures.
    """

    def __init__(self, folder: str, elastic: bool = False) -> None:
        """folder: URL of the run's folder. elastic: whether the number of workers may change."""
        self._folder, self.is_elastic = folder, elastic

    def record_failure(self, error: Exception, group: Any) -> None:
        """Record why a group of workers failed; the workers that raised nothing are asked, too."""
        detected = time.time()
        causes = find_failure_causes(error)
        try:
            if isinstance(error, WorkerGroupError):
                causes |= self._query_silent_workers(group, set(error.worker_failures))
        finally:
            self.write_record(detected, causes)

    def checkpoint_before_resize(self, group: Any, workers: int, announce: Callable[[], None]) -> None:
        """Have `announce` tell rank 0, in its process, to save, and wait for that, so that a change costs no work."""
        before = attempts.list_valid_checkpoints(self._folder)[:1]
        ray.get(group.execute_single_async(0, announce), timeout=ANNOUNCE_TIMEOUT_SECONDS)
        deadline = time.monotonic() + RESIZE_CHECKPOINT_SECONDS
        while attempts.list_valid_checkpoints(self._folder)[:1] == before and time.monotonic() < deadline:
            time.sleep(CHECKPOINT_POLL_SECONDS)
        self.write_record(time.time(), {"workers": f"from {len(group)} to {workers} workers: nodes came or went"})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record the causes. Nothing is raised: that would end the run."""
        try:
            self.write_record(time.time(), _describe_causes(worker_exceptions))
        except Exception:
            _log.exception("the failure of workers could not be recorded")

    def write_record(self, detected: float, causes: dict[str, str]) -> None:
        """Write causes, by rank or origin, as of a unix time, in a thread: hanging storage must not delay a restart."""
        url = file_io.join(get_attempts_dir(self._folder), f"failed-{round(1000 * detected)}.json")
        record = {"time": detected, "causes": {origin: redact(cause) for origin, cause in causes.items()}}

        def write() -> None:
            try:
                numbered = record | {"attempt": attempts.find_latest_number(self._folder)}
                file_io.write_bytes(url, json.dumps(numbered).encode())
            except OSError as error:
                _log.warning("a failure could not be recorded: %s", error)

        writer = threading.Thread(target=write, name="failure-record", daemon=True)
        writer.start()
        writer.join(RECORD_TIMEOUT_SECONDS)

    def _query_silent_workers(self, group: Any, reported: set[int]) -> dict[str, str]:
        """Return the causes, by rank, of dead workers that raised nothing: what killed them often came first."""
        silent_workers = [each for each in enumerate(group.get_workers()) if each[0] not in reported]
        pings = {worker.execute_async(os.getpid): rank for rank, worker in silent_workers}
        if not pings:
            return {}
        seconds = ELASTIC_WORKER_QUERY_SECONDS if self.is_elastic else WORKER_QUERY_SECONDS
        answered, silent = ray.wait(list(pings), num_returns=len(pings), timeout=seconds)
        causes = {str(pings[ping]): f"did not answer for {seconds:g} s" for ping in silent}
        for ping in answered:
            try:
                ray.get(ping, timeout=RECORD_TIMEOUT_SECONDS)
            except Exception as error:
                causes[str(pings[ping])] = describe_cause(error)
        return causes


def find_failure_causes(error: Exception) -> dict[str, str]:
    """Return the causes that a failure names: by rank, or under "controller" when no worker is the cause."""
    if isinstance(error, WorkerGroupError):
        return _describe_causes(error.worker_failures)
    if isinstance(error, PreemptionError):
        return {str(rank): "its node was preempted" for rank in error.preemption_info.preempted_ranks}
    return {"controller": describe_cause(error.controller_failure if isinstance(error, ControllerError) else error)}


def _describe_causes(errors: Mapping[int, Exception]) -> dict[str, str]:
    return {str(rank): describe_cause(error) for rank, error in sorted(errors.items())}


def describe_cause(error: Exception) -> str:
    """Return why a worker failed, in a line."""
    error = getattr(error, "health_check_failure", error)  # of the error in which Ray Train wraps a worker's death
    text = str(error)
    first_line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":  # Ray does not export the class
        return f"worker did not answer: {first_line}"
    if not isinstance(error, RayActorError):
        return f"{type(error).__name__}: {first_line}"
    if error.preempted:
        return "its node was preempted"
    if "node has died" in text or "node was terminated" in text:
        return "its node died"
    if "low on memory" in text:
        return "worker killed: its node ran out of memory"
    detail = _EXIT_DETAIL.search(text)
    return f"worker died: {strip_suppositions(detail[1]) if detail else first_line}"
