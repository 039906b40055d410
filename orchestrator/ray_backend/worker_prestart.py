"""Processes for a run's workers that start, and import torch, while its driver still comes up.

Ray starts a worker's process only when its actor is to be made, one after the other with all that comes before. The
node's raylet can be asked to start it ahead; it is used when it has the very runtime environment of the actor.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated import node_manager_pb2_grpc

KEEP_ALIVE_SECONDS = 60  # an idle process that no run takes ends then
MAX_PRESTARTED_TRIALS = 64  # processes for trials
REQUEST_TIMEOUT_SECONDS = 5.0
# What each worker's process calls before it takes work, for the sake of the imports: Ray Train and torch. It must be
# there on every node, or no worker starts; the job's own code is not, at that moment.
SETUP_HOOK = "ray.train.torch.TorchConfig"
# What Ray Train hands on from the driver's environment. Its own list is in a package that the main thread imports at
# that moment: asking it from another thread is a deadlock. A test compares the two.
TRAIN_PROPAGATED_VARIABLES = (
    "NCCL_RAS_ADDR",
    "RAY_TRAIN_CHECKPOINT_UPLOAD_WARN_INTERVAL_S",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S",
    "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
    "RAY_TRAIN_ENABLE_PRINT_PATCH",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S",
    "RAY_TRAIN_STATE_ACTOR_RECONCILIATION_INTERVAL_S",
    "RAY_TRAIN_V2_ENABLED",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",
    "TORCHFT_LIGHTHOUSE",
)
# What Ray Tune gives its actors from the driver's environment, beside the above, and what it adds. The keys of AWS,
# which it would hand on as well, are taken from its list (tuning/ray_tune.py): others can read what an actor is given.
TUNE_PROPAGATED_VARIABLES = (
    "TRAIN_COPY_DIRECTORY_CHECKPOINTS_INSTEAD_OF_MOVING",
    "RAY_CHDIR_TO_TRIAL_DIR",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS",
)
TUNE_ADDED_VARIABLES = {"PL_DISABLE_FORK": "1"}
TUNE_SETUP_HOOK = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: SETUP_HOOK}  # what we have it add

# Names of what protobuf's compiler made are there at run time only.
_common_pb2: Any = import_module("ray.core.generated.common_pb2")
_node_manager_pb2: Any = import_module("ray.core.generated.node_manager_pb2")
_runtime_environment_pb2: Any = import_module("ray.core.generated.runtime_environment_pb2")
_prestarted_count = 0  # processes that were asked for and that no run has been launched for
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def build_runtime_env() -> dict[str, dict[str, str]]:
    """What Ray Train is to give each worker's process."""
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: SETUP_HOOK}}


def prestart_workers(count: int) -> None:
    """Have the cluster's node start processes for `count` workers, if it is the only one; nothing is waited for.

    On several nodes nobody knows yet where Ray will place the workers. Nothing depends on it: what is not there when it
    is needed is started then, as always. So whatever goes wrong is only noted.
    """
    global _prestarted_count  # noqa: PLW0603  of this process's job
    if _try_prestart(count):
        with _lock:
            _prestarted_count += count


def claim_workers(count: int) -> None:
    """Say that `count` workers are about to be started: for those that have no process ahead one is asked for."""
    global _prestarted_count  # noqa: PLW0603
    with _lock:
        lacking = max(0, count - _prestarted_count)
        _prestarted_count = max(0, _prestarted_count - count)
    _try_prestart(lacking)


def prestart_trial_workers(cpus_each: int) -> None:
    """Have the cluster's node start processes for as many trials of Ray Tune as it holds, if it is the only one."""
    try:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        count = min(int(free.get("CPU", 0)) // cpus_each, MAX_PRESTARTED_TRIALS)
        _try_prestart(count, serialize_runtime_env(get_tune_variables()))
    except Exception:
        _log.debug("no process was started ahead", exc_info=True)


def get_tune_variables() -> dict[str, str]:
    """The variables that Ray Tune gives its actors, once TUNE_HOOK is among those that it adds (tuning/ray_tune.py)."""
    handed_on = {
        name: os.environ[name]
        for name in (*TUNE_PROPAGATED_VARIABLES, *TRAIN_PROPAGATED_VARIABLES)
        if name in os.environ
    }
    return {**TUNE_ADDED_VARIABLES, **TUNE_SETUP_HOOK, **handed_on}


def _try_prestart(count: int, environment: str | None = None) -> bool:
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]] if count > 0 else []  # type: ignore[no-untyped-call]
        if len(nodes) != 1:
            return False
        address = f"{nodes[0]['NodeManagerAddress']}:{nodes[0]['NodeManagerPort']}"
        _send_prestart_request(address, count, environment or serialize_runtime_env(get_worker_variables()))
    except Exception:
        _log.debug("no process was started ahead", exc_info=True)
        return False
    return True


def _send_prestart_request(address: str, count: int, expected: str) -> None:
    environment = _runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=expected)
    environment.runtime_env_config.setup_timeout_seconds = KEEP_ALIVE_SECONDS
    request = _node_manager_pb2.PrestartWorkersRequest(
        language=_common_pb2.Language.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=environment,
        keep_alive_duration_secs=KEEP_ALIVE_SECONDS,
        num_workers=count,
    )
    with init_grpc_channel(address) as channel:
        raylet = node_manager_pb2_grpc.NodeManagerServiceStub(channel)  # type: ignore[no-untyped-call]
        raylet.PrestartWorkers(request, timeout=REQUEST_TIMEOUT_SECONDS)


def get_worker_variables() -> dict[str, str]:
    """The variables that Ray Train gives a run's workers."""
    ours = {name: os.environ[name] for name in TRAIN_PROPAGATED_VARIABLES if name in os.environ}
    return {**ours, **build_runtime_env()["env_vars"]}


def serialize_runtime_env(variables: Mapping[str, str]) -> str:
    """The runtime environment of a process with these variables beside this one's, as Ray writes it.

    It is by this text that Ray tells environments apart. It writes one that it puts together of two in another manner
    than one that is given to a process without any.
    """
    ours: dict[str, Any] = dict(ray.get_runtime_context().runtime_env)
    merged = {**ours, "env_vars": {**ours.get("env_vars", {}), **variables}}
    if not ours:
        return json.dumps(merged, sort_keys=True)
    return json.dumps(merged, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
