"""Ray Train's trainer without the processes and imports that our runs have no use for."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from importlib import import_module
from typing import Any

import ray
from ray import PlacementGroupID
from ray.experimental import internal_kv
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.result import Result
from ray.util.placement_group import PlacementGroup, remove_placement_group

from orchestrator.launch import barrier, cluster, trainlog

_log = logging.getLogger(__name__)


class LeanTrainer(DataParallelTrainer):
    """Each process costs a start two to four seconds of a core, and a hundredth of one as long as it is there.

    Left out: the controller's own process, since the driver may as well drive its runs itself, each in the thread that
    launches it; the manager of Ray Data's datasets, of which we have none; the cleaner of what a lost controller leaves
    reserved, which whoever launches gives back; the barrier for reports, of which we make none; and where nothing
    scales, the coordinator of requests to the autoscaler, for which the controller would wait before it asks for
    workers.
    """

    def __init__(self, *given: Any, folder: str, **named: Any) -> None:
        """folder: URL of the run's folder, which names what its workers reserve."""
        self._reservation = Reservation(folder)
        super().__init__(*given, **named)

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        kept = [one for one in super()._create_default_callbacks() if not isinstance(one, without)]
        return [*kept, self._reservation]

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        # An elastic run's policy learns from the coordinator how many nodes there are.
        if type(given["scaling_policy"]) is FixedScalingPolicy and not cluster.grows():
            given["scaling_policy"] = SettledPolicy(given["scaling_policy"].scaling_config)
        # Whoever called this before, for the same run, may have died: a trial's actor of Ray Tune.
        give_back(self._reservation.key)
        barrier.install()
        try:
            with trainlog.of(self.run_config.name or ""):
                return drive(Controller(**given))
        finally:
            give_back(self._reservation.key)


class Reservation(WorkerGroupCallback):
    """Notes in Ray's key-value store which placement group the workers have, for others to give back.

    Ray itself removes a placement group only when the job has ended of which it is. A trial's actor may die before.
    """

    def __init__(self, folder: str) -> None:
        """folder: URL of the run's folder."""
        self.key = key_of(folder)

    def note(self, reserved: PlacementGroup) -> None:
        """Note what was reserved, and of which job, before any worker is there."""
        internal_kv._internal_kv_put(self.key, f"{_job()} {reserved.id.hex()}")


class Group(WorkerGroup):
    """Ray Train's group of workers, of a controller that is no actor."""

    def _create_placement_group(self, *given: Any) -> Any:
        handle = super()._create_placement_group(*given)
        try:
            for one in self._callbacks:
                if isinstance(one, Reservation):
                    one.note(handle.placement_group)
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


class Controller(TrainController):
    """Ray Train's controller, in the process of whoever launches the run."""

    worker_group_cls = Group


def drive(controller: TrainController) -> Result:
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


def key_of(folder: str) -> str:
    """Under which key it is noted what the workers of the run in the folder of that URL have reserved."""
    return f"orchestrator-reserved-{hashlib.sha256(folder.encode()).hexdigest()[:32]}"


def give_back(key: str) -> None:
    """Give back what is noted under that key, if this job has reserved it: its controller has ended, however it did.

    What is another job's is left: Ray gives it back when that job has ended; and if its driver was only suspended, the
    workers see that they have a successor, and end by themselves.
    """
    if not ray.is_initialized():  # the cluster is gone, or its job has ended, and all with it
        return
    try:
        found = internal_kv._internal_kv_get(key)
        job, _, reserved = (found or b"").decode().partition(" ")
        if job == _job():
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(reserved)))
            internal_kv._internal_kv_del(key)
    except Exception:  # it must hide neither a result nor the failure that ended the run
        _log.warning("what the run's workers had reserved could not be given back", exc_info=True)


def _job() -> str:
    return str(ray.get_runtime_context().get_job_id())


class SettledPolicy(FixedScalingPolicy):
    """A fixed number of workers on a cluster that does not scale: there is nobody to ask for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing: the placement group that Ray makes next reserves what the workers need."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing."""


def train(payload: dict[str, Any]) -> Any:
    """What Ray Train runs in each worker; only there is torch imported, which takes two seconds."""
    return import_module("orchestrator.launch.worker").train(payload)
