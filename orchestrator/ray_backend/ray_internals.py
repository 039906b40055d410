"""Ray's private parts outside Ray Train: services of its head and nodes, autoscaler limits, key-value store.

Imported through `ray_env` alone.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import ray
from ray import PlacementGroupID
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.state import state as ray_state
from ray.core.generated import (
    common_pb2,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    node_manager_pb2,
    node_manager_pb2_grpc,
    runtime_environment_pb2,
)
from ray.experimental import internal_kv
from ray.util.placement_group import PlacementGroup, remove_placement_group

SETUP_HOOK_VARIABLE: str = WORKER_PROCESS_SETUP_HOOK_ENV_VAR  # names a function that each worker process calls first
_log = logging.getLogger(__name__)


def build_init_options(temp_dir: str) -> dict[str, Any]:
    """Return options of ray.init for a private cluster whose idle processes are those of `request_workers` alone.

    Ray's own idle processes have another runtime environment than the workers, and would never be used.
    """
    config = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}
    return {"_temp_dir": temp_dir, "_system_config": config}


def read_head_version(address: str, timeout: float) -> str:
    """Return the version of Ray that the head at HOST:PORT runs.

    Raises grpc.RpcError, and ray.exceptions.AuthenticationError when this process has no token.
    """
    with init_grpc_channel(address) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
        request = gcs_service_pb2.CheckAliveRequest()  # type: ignore[attr-defined]
        return str(head.CheckAlive(request, timeout=timeout).ray_version)


def request_workers(address: str, count: int, runtime_env: str, keep_alive_seconds: int, timeout: float) -> None:
    """Ask the node at HOST:PORT to start idle worker processes for this job.

    runtime_env: as JSON, exactly as Ray will write it for the workers; another text is another environment.
    """
    env_info = runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=runtime_env)  # type: ignore[attr-defined]
    env_info.runtime_env_config.setup_timeout_seconds = keep_alive_seconds
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=common_pb2.Language.PYTHON,  # type: ignore[attr-defined]
        job_id=bytes.fromhex(get_job_id()),
        runtime_env_info=env_info,
        keep_alive_duration_secs=keep_alive_seconds,
        num_workers=count,
    )
    with init_grpc_channel(address) as channel:
        raylet = node_manager_pb2_grpc.NodeManagerServiceStub(channel)  # type: ignore[no-untyped-call]
        raylet.PrestartWorkers(request, timeout=timeout)


def read_autoscaler_limits() -> dict[str, int] | None:
    """Return the most of each resource that the autoscaler may bring; None without an autoscaler."""
    return ray_state.get_max_resources_from_cluster_config()


def record_placement_group(folder: str, group: PlacementGroup) -> None:
    """Record what the workers of the run in `folder` have reserved, and for which job."""
    internal_kv._internal_kv_put(_make_key(folder), f"{get_job_id()} {group.id.hex()}")


def release_placement_group(folder: str) -> None:
    """Release what is recorded for the run in `folder`, if this job reserved it. Nothing is raised.

    Ray itself removes a placement group only when its job has ended, and a trial's actor may die before. Another
    job's is left: Ray releases it when that job ends, and if its driver was only suspended, the workers see that they
    have a successor, and end by themselves.
    """
    if not ray.is_initialized():  # the cluster is gone, or its job has ended, and all reservations with it
        return
    key = _make_key(folder)
    try:
        job, _, group_id = (internal_kv._internal_kv_get(key) or b"").decode().partition(" ")
        if job == get_job_id():
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group_id)))
            internal_kv._internal_kv_del(key)
    except Exception:  # it must hide neither a result nor the failure that ended the run
        _log.warning("the placement group of %s could not be released", folder, exc_info=True)


def get_job_id() -> str:
    """Return the id of this process's job, in hexadecimal."""
    return str(ray.get_runtime_context().get_job_id())


def _make_key(folder: str) -> str:
    return f"orchestrator-reserved-{hashlib.sha256(folder.encode()).hexdigest()[:32]}"
