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
from typing import Any

import ray

from orchestrator.ray_backend import ray_compat

KEEP_ALIVE_SECONDS = 60  # an idle process that no run takes ends then
MAX_PRESTARTED_TRIALS = 64
REQUEST_TIMEOUT_SECONDS = 5.0
# What each worker's process calls before it takes work, for the sake of the imports: Ray Train and torch. It must be
# there on every node, or no worker starts; the job's own code is not, at that moment.
SETUP_HOOK = "ray.train.torch.TorchConfig"
# What Ray Train hands on from the driver's environment. Its own list is in a package that the main thread imports at
# that moment, which would be a deadlock of imports. A test compares the two.
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
# which it would hand on as well, are taken from its list (tuning/ray_tune.py), and the switch of the fast start added.
TUNE_PROPAGATED_VARIABLES = (
    "TRAIN_COPY_DIRECTORY_CHECKPOINTS_INSTEAD_OF_MOVING",
    "RAY_CHDIR_TO_TRIAL_DIR",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS",
    ray_compat.FAST_START_VARIABLE,
)
TUNE_ADDED_VARIABLES = {"PL_DISABLE_FORK": "1"}

_prestarted_count = 0  # processes that were requested and that no run has claimed
_lock = threading.Lock()
_log = logging.getLogger(__name__)


def get_hook_variables() -> dict[str, str]:
    """Return the variables that have each worker's process call SETUP_HOOK; none without the fast start."""
    internals = ray_compat.load_ray_internals()
    return {} if internals is None else {internals.SETUP_HOOK_VARIABLE: SETUP_HOOK}


def prestart_workers(count: int) -> None:
    """Request processes for `count` workers on the cluster's node, if it has only one; nothing is waited for.

    On several nodes it is not known yet where Ray will place the workers. Nothing depends on these processes: Ray
    starts what is missing when it is needed, as always. So errors are only logged.
    """
    global _prestarted_count  # noqa: PLW0603  of this process's job
    if _request_processes(count, get_worker_variables):
        with _lock:
            _prestarted_count += count


def claim_workers(count: int) -> None:
    """Claim processes for `count` workers that are about to start; request those that were not requested yet."""
    global _prestarted_count  # noqa: PLW0603  of this process's job
    with _lock:
        missing = max(0, count - _prestarted_count)
        _prestarted_count = max(0, _prestarted_count - count)
    _request_processes(missing, get_worker_variables)


def prestart_trial_workers(cpus_each: int) -> None:
    """Request processes for as many trials of Ray Tune as the cluster's node holds, if it has only one."""
    try:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    except Exception:
        _log.debug("no process was started ahead", exc_info=True)
        return
    count = min(int(free.get("CPU", 0)) // cpus_each, MAX_PRESTARTED_TRIALS)
    _request_processes(count, get_tune_variables)


def get_worker_variables() -> dict[str, str]:
    """Return the variables that Ray Train gives a run's workers."""
    return _select_variables(TRAIN_PROPAGATED_VARIABLES) | get_hook_variables()


def get_tune_variables() -> dict[str, str]:
    """Return the variables that Ray Tune gives its actors, with those that tuning/ray_tune.py has it add."""
    propagated = _select_variables((*TUNE_PROPAGATED_VARIABLES, *TRAIN_PROPAGATED_VARIABLES))
    return TUNE_ADDED_VARIABLES | get_hook_variables() | propagated


def _select_variables(names: tuple[str, ...]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


def _request_processes(count: int, get_variables: Any) -> bool:
    """Request idle processes with these variables; return whether they were requested."""
    internals = ray_compat.load_ray_internals()
    if count <= 0 or internals is None:
        return False
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        if len(nodes) != 1:
            return False
        address = f"{nodes[0]['NodeManagerAddress']}:{nodes[0]['NodeManagerPort']}"
        runtime_env = serialize_runtime_env(get_variables())
        internals.request_workers(address, count, runtime_env, KEEP_ALIVE_SECONDS, REQUEST_TIMEOUT_SECONDS)
    except Exception:
        _log.debug("no process was started ahead", exc_info=True)
        return False
    return True


def serialize_runtime_env(variables: Mapping[str, str]) -> str:
    """Return the runtime environment of a process with these variables beside this one's, as Ray writes it.

    Ray compares environments by this text. It writes one that it merges from two in another manner than one that is
    given to a process without any.
    """
    own: dict[str, Any] = dict(ray.get_runtime_context().runtime_env)
    merged = {**own, "env_vars": {**own.get("env_vars", {}), **variables}}
    if not own:
        return json.dumps(merged, sort_keys=True)
    return json.dumps(merged, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
