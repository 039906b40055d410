"""Ray Train's trainer without the processes and imports that our runs have no use for."""

from __future__ import annotations

import logging
import secrets
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

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        without = (DatasetsCallback, PlacementGroupCleanerCallback)
        self._reservation = Reservation()
        kept = [one for one in super()._create_default_callbacks() if not isinstance(one, without)]
        return [*kept, self._reservation, WithoutBarrier()]

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        # An elastic run's policy learns from the coordinator how many nodes there are.
        if type(given["scaling_policy"]) is FixedScalingPolicy and not cluster.grows():
            given["scaling_policy"] = SettledPolicy(given["scaling_policy"].scaling_config)
        try:
            # V2's trainer gives V2's result, whatever its annotation says.
            return cast(Result, super()._initialize_and_run_controller(**given))
        finally:
            if ray.is_initialized():  # else the cluster is gone, or its job has ended, and all with it
                self._reservation.give_back()


class Reservation(WorkerGroupCallback):
    """Notes in Ray's key-value store which placement group the workers have, for the driver to give back.

    Ray itself removes a controller's placement group only when its job has ended too; its own answer to a controller
    that dies is one more process for each run, for which workers wait. The driver knows as soon, and is there anyway.
    """

    def __init__(self) -> None:
        self.key = f"orchestrator-reserved-{secrets.token_hex(8)}"

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Called in the controller: have it note what it reserves as soon as it does, before any worker is there."""
        groups: Any = import_module(_GROUPS)
        groups.placement_group = self._reserve

    def _reserve(self, **asked: Any) -> PlacementGroup:
        reserved: PlacementGroup = placement_group(**asked)
        internal_kv._internal_kv_put(self.key, reserved.id.hex())
        return reserved

    def give_back(self) -> None:
        """Called in the driver when the controller has ended, however it did."""
        try:
            found = internal_kv._internal_kv_get(self.key)
            if found is not None:
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(found.decode())))
                internal_kv._internal_kv_del(self.key)
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
