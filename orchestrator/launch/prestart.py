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

KEEP_SECONDS = 60  # an idle process that no run takes ends then
MOST_AHEAD = 64  # processes for trials
ASK_SECONDS = 5.0
# What each worker's process calls before it takes work, for the sake of the imports: Ray Train and torch. It must be
# there on every node, or no worker starts; the job's own code is not, at that moment.
HOOK = "ray.train.torch.TorchConfig"
# What Ray Train hands on from the driver's environment. Its own list is in a package that the main thread imports at
# that moment: asking it from another thread is a deadlock. A test compares the two.
PROPAGATED = (
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
# which it would hand on as well, are taken from its list (tuning/study.py): others can read what an actor is given.
TUNE_PROPAGATED = (
    "TRAIN_COPY_DIRECTORY_CHECKPOINTS_INSTEAD_OF_MOVING",
    "RAY_CHDIR_TO_TRIAL_DIR",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS",
)
TUNE_ADDS = {"PL_DISABLE_FORK": "1"}
TUNE_HOOK = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: HOOK}  # what we have it add

# Names of what protobuf's compiler made are there at run time only.
_common: Any = import_module("ray.core.generated.common_pb2")
_messages: Any = import_module("ray.core.generated.node_manager_pb2")
_environments: Any = import_module("ray.core.generated.runtime_environment_pb2")
_ahead = 0  # processes that were asked for and that no run has been launched for
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def runtime_env() -> dict[str, dict[str, str]]:
    """What Ray Train is to give each worker's process."""
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: HOOK}}


def ask(count: int) -> None:
    """Have the cluster's node start processes for `count` workers, if it is the only one; nothing is waited for.

    On several nodes nobody knows yet where Ray will place the workers. Nothing depends on it: what is not there when it
    is needed is started then, as always. So whatever goes wrong is only noted.
    """
    global _ahead  # noqa: PLW0603  of this process's job
    if _asked(count):
        with _lock:
            _ahead += count


def use(count: int) -> None:
    """Say that `count` workers are about to be started: for those that have no process ahead one is asked for."""
    global _ahead  # noqa: PLW0603
    with _lock:
        lacking = max(0, count - _ahead)
        _ahead = max(0, _ahead - count)
    _asked(lacking)


def ask_for_trials(cpus_each: int) -> None:
    """Have the cluster's node start processes for as many trials of Ray Tune as it holds, if it is the only one."""
    try:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        count = min(int(free.get("CPU", 0)) // cpus_each, MOST_AHEAD)
        _asked(count, expected_environment(tune_variables()))
    except Exception:
        _log.debug("no process was started ahead", exc_info=True)


def tune_variables() -> dict[str, str]:
    """The variables that Ray Tune gives its actors, once TUNE_HOOK is among those that it adds (tuning/study.py)."""
    handed_on = {name: os.environ[name] for name in (*TUNE_PROPAGATED, *PROPAGATED) if name in os.environ}
    return {**TUNE_ADDS, **TUNE_HOOK, **handed_on}


def _asked(count: int, environment: str | None = None) -> bool:
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]] if count > 0 else []  # type: ignore[no-untyped-call]
        if len(nodes) != 1:
            return False
        address = f"{nodes[0]['NodeManagerAddress']}:{nodes[0]['NodeManagerPort']}"
        _ask(address, count, environment or expected_environment(worker_variables()))
    except Exception:
        _log.debug("no process was started ahead", exc_info=True)
        return False
    return True


def _ask(address: str, count: int, expected: str) -> None:
    environment = _environments.RuntimeEnvInfo(serialized_runtime_env=expected)
    environment.runtime_env_config.setup_timeout_seconds = KEEP_SECONDS
    request = _messages.PrestartWorkersRequest(
        language=_common.Language.PYTHON,
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        runtime_env_info=environment,
        keep_alive_duration_secs=KEEP_SECONDS,
        num_workers=count,
    )
    with init_grpc_channel(address) as channel:
        raylet = node_manager_pb2_grpc.NodeManagerServiceStub(channel)  # type: ignore[no-untyped-call]
        raylet.PrestartWorkers(request, timeout=ASK_SECONDS)


def worker_variables() -> dict[str, str]:
    """The variables that Ray Train gives a run's workers."""
    ours = {name: os.environ[name] for name in PROPAGATED if name in os.environ}
    return {**ours, **runtime_env()["env_vars"]}


def expected_environment(variables: Mapping[str, str]) -> str:
    """The runtime environment of a process with these variables beside this one's, as Ray writes it.

    It is by this text that Ray tells environments apart. It writes one that it puts together of two in another manner
    than one that is given to a process without any.
    """
    ours: dict[str, Any] = dict(ray.get_runtime_context().runtime_env)
    merged = {**ours, "env_vars": {**ours.get("env_vars", {}), **variables}}
    if not ours:
        return json.dumps(merged, sort_keys=True)
    return json.dumps(merged, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
