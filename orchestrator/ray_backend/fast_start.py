"""Ray Train's trainer without the processes and imports that our runs have no use for."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import ray
from ray import PlacementGroupID
from ray.experimental import internal_kv
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.preemption import PreemptionWatcher
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2._internal.logging.logging import LoggingManager, SessionFileHandler
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.result import Result
from ray.util.placement_group import PlacementGroup, remove_placement_group

from orchestrator.ray_backend import cluster

_log = logging.getLogger(__name__)


class FastStartTrainer(DataParallelTrainer):
    """Each process costs a start two to four seconds of a core, and a hundredth of one as long as it is there.

    Left out: the controller's own process, since the driver may as well drive its runs itself, each in the thread that
    launches it; the manager of Ray Data's datasets, of which we have none; the cleaner of what a lost controller leaves
    reserved, which whoever launches gives back; the barrier for reports, of which we make none; and where nothing
    scales, the coordinator of requests to the autoscaler, for which the controller would wait before it asks for
    workers.
    """

    def __init__(self, *given: Any, folder: str, **named: Any) -> None:
        """folder: URL of the run's folder, which names what its workers reserve."""
        self._recorder = PlacementGroupRecorder(folder)
        super().__init__(*given, **named)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        kept = [one for one in super()._create_default_callbacks() if not isinstance(one, without)]
        return [*kept, self._recorder]

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        # An elastic run's policy learns from the coordinator how many nodes there are.
        if type(given["scaling_policy"]) is FixedScalingPolicy and not cluster.has_autoscaler():
            given["scaling_policy"] = NonAutoscalingPolicy(given["scaling_policy"].scaling_config)
        # Whoever called this before, for the same run, may have died: a trial's actor of Ray Tune.
        release_placement_group(self._recorder.key)
        disable_report_barrier()
        try:
            with capture_controller_logs(self.run_config.name or ""):
                return run_controller(FastStartController(**given))
        finally:
            release_placement_group(self._recorder.key)


class PlacementGroupRecorder(WorkerGroupCallback):
    """Notes in Ray's key-value store which placement group the workers have, for others to give back.

    Ray itself removes a placement group only when the job has ended of which it is. A trial's actor may die before.
    """

    def __init__(self, folder: str) -> None:
        """folder: URL of the run's folder."""
        self.key = make_reservation_key(folder)

    def record_placement_group(self, reserved: PlacementGroup) -> None:
        """Note what was reserved, and of which job, before any worker is there."""
        internal_kv._internal_kv_put(self.key, f"{_get_job_id()} {reserved.id.hex()}")


class FastStartWorkerGroup(WorkerGroup):
    """Ray Train's group of workers, of a controller that is no actor."""

    def _create_placement_group(self, *given: Any) -> Any:
        handle = super()._create_placement_group(*given)
        try:
            for one in self._callbacks:
                if isinstance(one, PlacementGroupRecorder):
                    one.record_placement_group(handle.placement_group)
        except BaseException:  # nobody would know of it
            handle.shutdown()
            raise
        return handle

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        """As Ray's own, which asks for the controller's handle: our workers have nothing to ask it."""
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
    """Ray Train's controller, in the process of whoever launches the run."""

    worker_group_cls = FastStartWorkerGroup


def run_controller(controller: TrainController) -> Result:
    """Have a controller train its run to the end, in this thread.

    Where the thread has no process of its own to end, nobody else ends the workers of a controller that fails.
    """
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


def make_reservation_key(folder: str) -> str:
    """Under which key it is noted what the workers of the run in the folder of that URL have reserved."""
    return f"orchestrator-reserved-{hashlib.sha256(folder.encode()).hexdigest()[:32]}"


def release_placement_group(key: str) -> None:
    """Give back what is noted under that key, if this job has reserved it: its controller has ended, however it did.

    What is another job's is left: Ray gives it back when that job has ended; and if its driver was only suspended, the
    workers see that they have a successor, and end by themselves.
    """
    if not ray.is_initialized():  # the cluster is gone, or its job has ended, and all with it
        return
    try:
        found = internal_kv._internal_kv_get(key)
        job, _, reserved = (found or b"").decode().partition(" ")
        if job == _get_job_id():
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(reserved)))
            internal_kv._internal_kv_del(key)
    except Exception:  # it must hide neither a result nor the failure that ended the run
        _log.warning("what the run's workers had reserved could not be given back", exc_info=True)


def _get_job_id() -> str:
    return str(ray.get_runtime_context().get_job_id())


class NonAutoscalingPolicy(FixedScalingPolicy):
    """A fixed number of workers on a cluster that does not scale: there is nobody to ask for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing: the placement group that Ray makes next reserves what the workers need."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing."""


def run_train_worker(payload: dict[str, Any]) -> Any:
    """What Ray Train runs in each worker; only there is torch imported, which takes two seconds."""
    from orchestrator.ray_backend import worker  # torch is imported in the workers alone

    return worker.run_training(payload)


_WORKER_GROUP_PACKAGE = "ray.train.v2._internal.execution.worker_group"


class ConstantReplyMethod:
    """What looks like the method of an actor, and gives the same answer to all."""

    def __init__(self, value: object) -> None:
        self._value = value

    def remote(self, *_: object, **__: object) -> Any:
        """The answer's reference."""
        return ray.put(self._value)


class NoOpSynchronizationActor:
    """What looks like that actor's class, and like the actor, and is no process; nobody waits at it."""

    def __init__(self) -> None:
        # What Ray Train's controller asks when a node drains, and when it replaces some of the workers.
        self.set_required_ranks, self.reset = ConstantReplyMethod(True), ConstantReplyMethod(None)

    @classmethod
    def options(cls, **_: object) -> type[NoOpSynchronizationActor]:
        """Wherever Ray Train would place it."""
        return cls

    @classmethod
    def remote(cls, **_: object) -> NoOpSynchronizationActor:
        """Whatever its time limits would be."""
        return cls()


def disable_report_barrier() -> None:
    """Have the groups of workers that this process starts do without the actor."""
    groups: Any = import_module(f"{_WORKER_GROUP_PACKAGE}.worker_group")
    states: Any = import_module(f"{_WORKER_GROUP_PACKAGE}.state")
    groups.SynchronizationActor = NoOpSynchronizationActor
    states._shutdown_sync_actor = _skip_actor_shutdown


def _skip_actor_shutdown(sync_actor: object) -> None:
    """There is no process to kill."""


# Two minutes' notice is the usual, half of one the least; of Ray's 5 s between looks a checkpoint makes better use.
DRAIN_POLL_SECONDS = 2.0


class PreemptionWatcherCallback(WorkerGroupCallback):
    """Called by Ray Train in its controller's thread, once for each group of workers. Nothing here raises."""

    def __init__(self) -> None:
        self._watcher: PreemptionWatcher | None = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Watch the nodes that these workers are on, and no longer those of a group before."""
        self._stop_watcher()
        try:
            workers = {one.distributed_context.world_rank: one for one in worker_group.get_workers()}
            ranks_of: dict[str, list[int]] = {}
            for rank, worker in workers.items():
                ranks_of.setdefault(worker.metadata.node_id, []).append(rank)
            actors = {rank: worker.actor for rank, worker in workers.items()}
            self._watcher = PreemptionWatcher(ranks_of, DRAIN_POLL_SECONDS, actors)
        except Exception:  # what a callback raises ends the run, which can do without a notice
            _log.exception("the nodes of the workers are not watched: they will go without a notice")

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Watch no more."""
        self._stop_watcher()

    def after_worker_group_abort(self, worker_group_context: Any) -> None:
        """Watch no more."""
        self._stop_watcher()

    def _stop_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher._stop_event.set()


STRUCTURED_LOGGING_VARIABLE = "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"  # of Ray's own set-up
RAY_TRAIN_LOGGER = "ray.train"

_logged_run: ContextVar[str] = ContextVar("run", default="-")
_log_handler_lock = threading.Lock()


@contextmanager
def capture_controller_logs(run: str) -> Iterator[None]:
    """Mark what Ray Train says in this thread as that run's."""
    if os.environ.get(STRUCTURED_LOGGING_VARIABLE) == "0":  # else the user wants Ray's
        _install_log_handler()
    token = _logged_run.set(run)
    try:
        yield
    finally:
        _logged_run.reset(token)


def _install_log_handler() -> None:
    """Once for each session of Ray's."""
    logger = logging.getLogger(RAY_TRAIN_LOGGER)
    with _log_handler_lock:
        for old in [one for one in logger.handlers if isinstance(one, _ControllerLogHandler)]:
            if old.folder == LoggingManager.get_log_directory():
                return
            logger.removeHandler(old)
        logger.addHandler(_ControllerLogHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _ControllerLogHandler(SessionFileHandler):
    """A file that is named as Ray names a controller's."""

    def __init__(self) -> None:
        self.folder = LoggingManager.get_log_directory()
        super().__init__(f"ray-train-app-controller-{ray.get_runtime_context().get_worker_id()}.log")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(run)s: %(message)s"))
        self.addFilter(_add_run_name)


def _add_run_name(record: logging.LogRecord) -> bool:
    record.run = _logged_run.get()
    return True
