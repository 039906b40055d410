import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import ControllerError, PreemptionError, PreemptionInfo, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    FinishedState,
    ResizingState,
    RestartingState,
    RunningState,
    ShuttingDownState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from orchestrator.checkpoint import checkpoint as checkpoints
from orchestrator.checkpoint import checkpoint_dir
from orchestrator.ray_backend import failure_callback, fast_start
from orchestrator.ray_backend.failure_callback import (
    FailureRecorder,
    describe_cause,
    find_failure_causes,
)
from orchestrator.ray_backend.fast_start import ControllerEventCallback
from orchestrator.storage import file_io
from orchestrator.training.run_dir import get_checkpoints_dir

RAYS_WORDS = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 7\nThe actor is "
    "dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly "
    "exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed by the "
    "OOM killer due to high memory usage, (2) ray stop --force was called."
)
RUNNING = RunningState()  # type: ignore[no-untyped-call]


def dead(text: str, preempted: bool = False) -> WorkerHealthCheckFailedError:
    """The error in which Ray Train wraps the death of a worker's actor."""
    return WorkerHealthCheckFailedError("health check failed", RayActorError(error_msg=text, preempted=preempted))


class Group:
    """A group of workers that all answer; notes the announcement to rank 0 that it will be replaced."""

    def __init__(self) -> None:
        self.announced = threading.Event()

    def __len__(self) -> int:
        return 2

    def get_workers(self) -> list[Any]:
        return []

    def execute_single_async(self, rank: int, function: Any) -> None:
        assert (rank, function) == (0, fast_start.announce_replacement)
        self.announced.set()


def watching(folder: Path, group: Group | None = None) -> ControllerEventCallback:
    callback = ControllerEventCallback(FailureRecorder(str(folder)))
    callback.after_worker_group_start(group or Group())
    return callback


def kept(folder: Path) -> list[dict[str, Any]]:
    """The records of failures, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((folder / "attempts").glob("failed-*.json"))]


# ------------------------------------------------------------------ causes
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("no good\nat all"), "ValueError: no good"),
        (ValueError(""), "ValueError: no message"),
        (dead(RAYS_WORDS), "worker died: Worker unexpectedly exits with a connection error code 2. End of file."),
        (dead("The actor died because its node has died. Node Id: 1"), "its node died"),
        (dead("killed", preempted=True), "its node was preempted"),
        (dead("Task was killed due to the node running low on memory."), "worker killed: its node ran out of memory"),
        (ActorDiedError(), "worker died: The actor died unexpectedly before finishing this task."),
        (
            WorkerHealthCheckTimeoutError("hangs for 60 s"),  # type: ignore[no-untyped-call]
            "worker did not answer: hangs for 60 s",
        ),
    ],
)
def test_a_cause_is_one_line_without_suppositions(error: Exception, cause: str) -> None:
    assert describe_cause(error) == cause


@pytest.mark.parametrize(
    ("error", "causes"),
    [
        (WorkerGroupError("text", {1: ValueError("b"), 0: OSError("a")}), {"0": "OSError: a", "1": "ValueError: b"}),
        (PreemptionError(PreemptionInfo(None, {"n": [2]})), {"2": "its node was preempted"}),
        (ControllerError(KeyError("x")), {"controller": "KeyError: 'x'"}),
        (TrainingFailedError("?"), {"controller": "TrainingFailedError: ?"}),
    ],
)
def test_a_failure_names_its_ranks_or_the_controller(error: Exception, causes: dict[str, str]) -> None:
    assert find_failure_causes(error) == causes


# ------------------------------------------------------------------ records
@pytest.mark.parametrize("last", [False, True])
def test_a_failure_is_kept_with_its_time_whether_it_is_retried_or_not(tmp_path: Path, last: bool) -> None:
    error, before = WorkerGroupError("text", {0: ValueError("bad")}), time.time()
    state = ShuttingDownState(ErroredState(error)) if last else RestartingState(error)
    watching(tmp_path).after_controller_state_update(RUNNING, state)
    [found] = kept(tmp_path)
    assert found["causes"] == {"0": "ValueError: bad"}
    assert before <= found["time"] <= time.time()
    assert (tmp_path / "attempts" / f"failed-{round(1000 * found['time'])}.json").exists()


def test_a_successful_run_leaves_no_record(tmp_path: Path) -> None:
    finished = FinishedState()  # type: ignore[no-untyped-call]
    for state in (RUNNING, ShuttingDownState(finished), finished):
        watching(tmp_path).after_controller_state_update(RUNNING, state)
    assert kept(tmp_path) == []


def test_storage_that_fails_or_hangs_does_not_hold_up_the_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_callback, "RECORD_TIMEOUT_SECONDS", 0.05)
    state, released = RestartingState(WorkerGroupError("text", {0: ValueError("bad")})), threading.Event()

    def failing(*_: object) -> None:
        raise OSError("full")

    for write in (failing, lambda *_: released.wait(30)):
        monkeypatch.setattr(file_io, "write_bytes", write)
        began = time.monotonic()
        watching(tmp_path).after_controller_state_update(RUNNING, state)
        assert time.monotonic() - began < 10
    released.set()


def test_errors_of_the_watch_are_not_raised_and_the_failure_is_still_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[str] = []

    def failing() -> None:
        counts.append("counted")
        raise RuntimeError("Ray does not answer")

    monkeypatch.setattr(fast_start, "get_or_create_autoscaling_coordinator", failing)
    monkeypatch.setattr(fast_start, "SCALING_CACHE_SECONDS", 0.0)
    made = ControllerEventCallback(FailureRecorder(str(tmp_path), elastic=True))  # it knows no workers
    made.after_controller_state_update(RUNNING, RestartingState(WorkerGroupError("text", {0: ValueError("bad")})))
    assert [found["causes"] for found in kept(tmp_path)] == [{"0": "ValueError: bad"}]
    monkeypatch.setattr(fast_start, "NODE_REFRESH_SECONDS", 0.0)
    made.after_worker_group_poll_status(SimpleNamespace())
    assert len(counts) == 2


def test_the_public_callback_records_what_workers_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = FailureRecorder(str(tmp_path))
    callback.after_exception(None, {1: dead("killed", preempted=True), 0: ValueError("bad")})
    monkeypatch.setattr(failure_callback, "describe_cause", lambda _: 1 / 0)
    callback.after_exception(None, {0: ValueError("worse")})  # what it raised would end the run
    assert [record["causes"] for record in kept(tmp_path)] == [{"0": "ValueError: bad", "1": "its node was preempted"}]


# ------------------------------------------------------------------ a change of the number of workers
def test_workers_are_replaced_only_after_a_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda *_, **__: None)
    monkeypatch.setattr(failure_callback, "CHECKPOINT_POLL_SECONDS", 0.01)
    folder, group = get_checkpoints_dir(str(tmp_path)), Group()
    checkpoints.save(folder, {}, 10, 1)

    def saving() -> None:
        assert group.announced.wait(10)
        checkpoints.save(folder, {}, 20, 1)

    saver = threading.Thread(target=saving)
    saver.start()
    watching(tmp_path, group).after_controller_state_update(RUNNING, ResizingState(ResizeDecision(3, {"CPU": 1})))
    saver.join()
    assert [place.samples for place in checkpoint_dir.list_checkpoints(folder)] == [20, 10]
    assert [found["causes"] for found in kept(tmp_path)] == [{"workers": "from 2 to 3 workers: nodes came or went"}]


def test_a_checkpoint_that_does_not_come_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "get", lambda *_, **__: None)
    monkeypatch.setattr(failure_callback, "RESIZE_CHECKPOINT_SECONDS", 0.05)
    monkeypatch.setattr(failure_callback, "CHECKPOINT_POLL_SECONDS", 0.01)
    watching(tmp_path).after_controller_state_update(RUNNING, ResizingState(ResizeDecision(1, {"CPU": 1})))
    assert len(kept(tmp_path)) == 1
