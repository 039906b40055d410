"""Ray Train's trainer without the processes and imports that our runs have no use for."""

from __future__ import annotations

import hashlib
import logging
from importlib import import_module
from typing import Any, cast

import ray
from ray import PlacementGroupID
from ray.experimental import internal_kv
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.result import Result
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from orchestrator.launch import barrier, cluster

_GROUPS = "ray.train.v2._internal.execution.worker_group.worker_group"
_log = logging.getLogger(__name__)


class LeanTrainer(DataParallelTrainer):
    """Each process costs a start two to four seconds of a core.

    Left out: the manager of Ray Data's datasets, of which we have none; the cleaner of what a lost controller leaves
    reserved, which the driver gives back itself; the barrier for reports, of which we make none; and where nothing
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
        return [*kept, self._reservation, WithoutBarrier()]

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        # An elastic run's policy learns from the coordinator how many nodes there are.
        if type(given["scaling_policy"]) is FixedScalingPolicy and not cluster.grows():
            given["scaling_policy"] = SettledPolicy(given["scaling_policy"].scaling_config)
        # Whoever called this before, for the same run, may have died with its controller: a trial's actor of Ray Tune.
        give_back(self._reservation.key)
        try:
            # V2's trainer gives V2's result, whatever its annotation says.
            return cast(Result, super()._initialize_and_run_controller(**given))
        finally:
            give_back(self._reservation.key)


class Reservation(WorkerGroupCallback):
    """Notes in Ray's key-value store which placement group the workers have, for the driver to give back.

    Ray itself removes a controller's placement group only when its job has ended too; its own answer to a controller
    that dies is one more process for each run, for which workers wait. The driver knows as soon, and is there anyway.
    """

    def __init__(self, folder: str) -> None:
        """folder: URL of the run's folder."""
        self.key = key_of(folder)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Called in the controller: have it note what it reserves as soon as it does, before any worker is there."""
        groups: Any = import_module(_GROUPS)
        groups.placement_group = self._reserve

    def _reserve(self, **asked: Any) -> PlacementGroup:
        reserved: PlacementGroup = placement_group(**asked)
        try:
            internal_kv._internal_kv_put(self.key, reserved.id.hex())
        except BaseException:  # nobody would know of it
            remove_placement_group(reserved)
            raise
        return reserved


def key_of(folder: str) -> str:
    """Under which key it is noted what the workers of the run in the folder of that URL have reserved."""
    return f"orchestrator-reserved-{hashlib.sha256(folder.encode()).hexdigest()[:32]}"


def give_back(key: str) -> None:
    """Give back what is noted under that key, if anything is: its controller has ended, however it did."""
    if not ray.is_initialized():  # the cluster is gone, or its job has ended, and all with it
        return
    try:
        found = internal_kv._internal_kv_get(key)
        if found is not None:
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(found.decode())))
            internal_kv._internal_kv_del(key)
    except Exception:  # it must hide neither a result nor the failure that ended the run
        _log.warning("what the run's workers had reserved could not be given back", exc_info=True)


class WithoutBarrier(ControllerCallback):
    """Has the controller start no barrier for reports."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Called in the controller, before it starts workers."""
        barrier.install()


class SettledPolicy(FixedScalingPolicy):
    """A fixed number of workers on a cluster that does not scale: there is nobody to ask for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing: the placement group that Ray makes next reserves what the workers need."""

    def _maybe_send_resource_request(self) -> None:
        """Nothing."""


def train(payload: dict[str, Any]) -> Any:
    """What Ray Train runs in each worker; only there is torch imported, which takes two seconds."""
    return import_module("orchestrator.launch.worker").train(payload)
