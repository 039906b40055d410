"""Ray Train's trainer without the processes and imports that runs do not need. Imported through `ray_env` alone."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import state as states
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state as worker_group_state
from ray.train.v2._internal.execution.worker_group import worker_group as worker_group_module
from ray.train.v2._internal.logging.logging import LoggingManager
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from orchestrator.ray_backend import ray_internals
from orchestrator.ray_backend.failure_callback import FailureRecorder

STRUCTURED_LOGGING_VARIABLE = "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"  # switches Ray's own log set-up
NODE_REFRESH_SECONDS = 5.0  # between counts of the nodes for an elastic run; Ray's own come every 20 s
SCALING_CACHE_SECONDS = 1.1  # Ray's scaling policy uses its last count for a second

_log = logging.getLogger(__name__)


class FastStartTrainer(DataParallelTrainer):
    """A trainer whose controller is a thread of this process, with as few helper processes as possible.

    Each process costs a start two to four seconds of a core. Left out: the controller's own process; the manager of
    Ray Data's datasets, of which runs have none; the cleaner of reservations, which the driver releases itself; the
    barrier for reports, of which workers make none; and, without an autoscaler, the coordinator of requests to it.
    """

    def __init__(self, train_loop: Any, folder: str, **options: Any) -> None:
        """folder: URL of the run's folder, under which the reservation of its workers is recorded."""
        self._folder = folder
        super().__init__(train_loop, **options)

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        # An elastic run's policy learns from the coordinator how many nodes there are.
        if type(options["scaling_policy"]) is FixedScalingPolicy and ray_internals.read_autoscaler_limits() is None:
            options["scaling_policy"] = NonAutoscalingPolicy(options["scaling_policy"].scaling_config)
        # An earlier controller of the same run may have died with its process, such as a trial's actor of Ray Tune.
        ray_internals.release_placement_group(self._folder)
        thread = threading.current_thread()
        name, thread.name = thread.name, self.run_config.name or "run"  # stands in each line of the log
        try:
            with patch_ray_train():
                return run_controller(FastStartController(self._folder, **options))
        finally:
            thread.name = name
            ray_internals.release_placement_group(self._folder)


class FastStartWorkerGroup(worker_group_module.WorkerGroup):
    """Ray Train's group of workers, for a controller that is not an actor."""

    run_folder = ""  # URL, of a subclass

    def _create_placement_group(self, *arguments: Any) -> Any:
        handle = super()._create_placement_group(*arguments)
        try:
            ray_internals.record_placement_group(self.run_folder, handle.placement_group)
        except BaseException:  # without the record no other process could release it
            handle.shutdown()
            raise
        return handle

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        """Do what Ray's own method does, without the controller's handle, for which workers have no use."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[number] for name, values in train_context_args.items()},
                )
                for number, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class FastStartController(TrainController):
    """Ray Train's controller, for the process that launches the run."""

    def __init__(self, folder: str, **options: Any) -> None:
        """folder: URL of the run's folder."""
        super().__init__(**options)
        self.worker_group_cls = type("RunWorkerGroup", (FastStartWorkerGroup,), {"run_folder": folder})  # type: ignore[assignment]
        self._worker_group_callbacks_to_propagate = [
            ThreadPreemptionCallback() if isinstance(callback, PreemptionCallback) else callback
            for callback in self._worker_group_callbacks_to_propagate
        ]


def run_controller(controller: TrainController) -> Any:
    """Run a controller to its end, in this thread; abort its workers when it fails, since no process ends with it."""
    try:
        asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        return controller.get_result()
    except BaseException:
        try:
            group = controller.get_worker_group()
            if group is not None and group.has_started():
                group.abort()  # type: ignore[no-untyped-call]
        except Exception:  # it must not hide the failure that ended the run
            _log.warning("the workers of a failed controller could not be ended", exc_info=True)
        raise


class NonAutoscalingPolicy(FixedScalingPolicy):
    """A fixed number of workers on a cluster without an autoscaler, to which no request is sent."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Send no request: the placement group that Ray makes next reserves what the workers need."""

    def _maybe_send_resource_request(self) -> None:
        pass


class ThreadPreemptionCallback(PreemptionCallback):
    """Ray's watch over draining nodes as a thread of this process. Nothing here raises: that would end the run."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes of these workers in place of those of the group before."""
        self._stop_watcher()
        try:
            workers = {worker.distributed_context.world_rank: worker for worker in worker_group.get_workers()}
            ranks: dict[str, list[int]] = {}
            for rank, worker in workers.items():
                ranks.setdefault(worker.metadata.node_id, []).append(rank)
            actors = {rank: worker.actor for rank, worker in workers.items()}
            self._watcher: Any = PreemptionWatcher(ranks, self._poll_interval_s, actors)
        except Exception:
            _log.exception("the nodes of the workers are not watched: their preemption will come without notice")

    def _stop_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher._stop_event.set()


class ControllerEventCallback(ControllerCallback, WorkerGroupCallback):
    """Passes the states of Ray Train's controller on to a FailureRecorder. Nothing here raises: that ends the run."""

    def __init__(self, recorder: FailureRecorder) -> None:
        self._recorder, self._elastic = recorder, recorder.is_elastic
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
        """Have the nodes counted from time to time, so that a node that joins is used soon."""
        if self._elastic and time.monotonic() - self._last_refresh > NODE_REFRESH_SECONDS:
            self._refresh_node_count(wait=False)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Record a failure, or let the run save before its workers are replaced; then count the nodes."""
        try:
            failed = current_state.next_state if isinstance(current_state, states.ShuttingDownState) else current_state
            if isinstance(failed, states.RestartingState) or (
                failed is not current_state and isinstance(failed, states.ErroredState)
            ):
                self._recorder.record_failure(failed.training_failed_error, self._group)
            elif isinstance(current_state, states.ResizingState):
                workers = current_state.scaling_decision.num_workers  # type: ignore[attr-defined]
                self._recorder.checkpoint_before_resize(self._group, workers, announce_replacement)
        except Exception:
            _log.exception("the state of Ray Train's controller could not be recorded")
        if self._elastic and isinstance(current_state, states.RestartingState | states.ReschedulingState):
            self._refresh_node_count(wait=True)
            time.sleep(SCALING_CACHE_SECONDS)

    def _refresh_node_count(self, wait: bool) -> None:
        """Have Ray's autoscaling coordinator count the nodes now."""
        self._last_refresh = time.monotonic()
        try:
            coordinator = get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
            count = coordinator.get_reserved_resources.remote(self._requester, recompute=True)
            if wait:
                ray.get(count, timeout=NODE_REFRESH_SECONDS)
        except Exception as error:  # on the user's screen: in a line
            _log.warning("the nodes could not be counted: %s", error)


_replacement_announced = threading.Event()


def announce_replacement() -> None:
    """Announce in rank 0's process that the group of workers is about to be replaced."""
    _replacement_announced.set()


def is_shutdown_imminent() -> bool:
    """Return whether this rank knows of a draining node or a change of workers; it waits for no other rank."""
    return _replacement_announced.is_set() or get_train_context().preemption_context.preemption_info is not None


_patch_lock = threading.Lock()
_patch_users = 0
_patches = ExitStack()


@contextmanager
def patch_ray_train() -> Iterator[None]:
    """Patch Ray Train's modules while at least one trainer of this process fits."""
    global _patch_users  # noqa: PLW0603  Ray's modules are global, too
    with _patch_lock:
        if _patch_users == 0:
            _apply_patches(_patches)
        _patch_users += 1
    try:
        yield
    finally:
        with _patch_lock:
            _patch_users -= 1
            if _patch_users == 0:
                _patches.close()


def _apply_patches(stack: ExitStack) -> None:
    """Replace the barrier for reports, which would be a process; log to a file instead of the driver's screen."""
    _replace(stack, worker_group_module, "SynchronizationActor", NoOpSynchronizationActor)
    _replace(stack, worker_group_state, "_shutdown_sync_actor", lambda sync_actor: None)
    if os.environ.get(STRUCTURED_LOGGING_VARIABLE) != "0":  # the user wants Ray's own set-up
        return
    folder = LoggingManager.get_log_directory() or os.curdir
    os.makedirs(folder, exist_ok=True)
    file = f"ray-train-app-controller-{ray.get_runtime_context().get_worker_id()}.log"  # as Ray names a controller's
    handler = logging.FileHandler(os.path.join(folder, file), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(threadName)s: %(message)s"))
    stack.callback(handler.close)
    logger = logging.getLogger("ray.train")
    logger.addHandler(handler)
    stack.callback(logger.removeHandler, handler)
    stack.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.INFO)
    _replace(stack, logger, "propagate", False)


def _replace(stack: ExitStack, owner: object, name: str, value: object) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


class NoOpSynchronizationActor:
    """A stand-in for the class of Ray Train's barrier, and for its actor, that is no process."""

    # What Ray Train's controller calls when a node drains, and when it replaces some of the workers.
    set_required_ranks = SimpleNamespace(remote=lambda *_: ray.put(True))
    reset = SimpleNamespace(remote=lambda *_: ray.put(None))

    @classmethod
    def options(cls, **_: object) -> type[NoOpSynchronizationActor]:
        """Return the class, whatever the options."""
        return cls

    remote = options
