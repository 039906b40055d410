"""The Ray cluster of this process: the connection to it, its capacity, workers started ahead, and a pool of tasks.

The cluster is a private local one, or the one that a job was submitted to. Ray starts a worker's process only when its
actor is to be made, one after the other with all that comes before. The node's raylet can be asked to start it, and to
import torch, while the driver still comes up; it is used when it has the very runtime environment of the actor.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from orchestrator.config.errors import ConfigError
from orchestrator.config.output import prepare_output
from orchestrator.ray_backend import ray_env, signals
from orchestrator.ray_backend.launch_errors import ClusterError, JobError
from orchestrator.ray_backend.run_spec import Placement

LOCAL_OBJECT_STORE_BYTES = 200_000_000
HEAD_TIMEOUT_SECONDS = 5.0
CAPACITY_POLL_SECONDS = 2.0
KEEP_ALIVE_SECONDS = 60  # an idle process that no run takes ends then
MAX_PRESTARTED_TRIALS = 64
REQUEST_TIMEOUT_SECONDS = 5.0
# A task whose worker or node died runs again elsewhere this often; our own exceptions are not retried.
MAX_TASK_RETRIES = 3
# What each worker's process calls before it takes work, for the sake of the imports: Ray Train and torch. It must be
# there on every node, or no worker starts; the job's own code is not, at that moment.
SETUP_HOOK = "ray.train.torch.TorchConfig"
# What Ray Train hands on from the driver's environment, of what is likely to be set. Its own list is in a package that
# the main thread imports at that moment, which would be a deadlock of imports.
_TRAIN_VARIABLES = re.compile(
    r"RAY_TRAIN_(?!METRICS_ENABLED$)|(NCCL_RAS_ADDR|TORCHFT_LIGHTHOUSE|RAY_WARN_BLOCKING_GET)"
)
# What Ray Tune gives its actors beside the above (tuning/ray_tune.py has it hand on the switch of the fast start).
_TUNE_VARIABLES = ("TRAIN_COPY_DIRECTORY_CHECKPOINTS_INSTEAD_OF_MOVING", "RAY_CHDIR_TO_TRIAL_DIR")
_TUNE_ADDED_VARIABLES = {"PL_DISABLE_FORK": "1"}
_NO_ENTRY = (
    "it needs a token, which this process lacks or has wrong: give that of the cluster in RAY_AUTH_TOKEN, else the "
    "file RAY_AUTH_TOKEN_PATH names, else ~/.ray/auth_token"
)
_NO_GRPC = (
    "something listens there that does not answer as Ray's head: is it that port (6379 by default), and do both sides "
    "use TLS (RAY_USE_TLS and the three RAY_TLS_ files) or neither?"
)

_log = logging.getLogger(__name__)
_pending_connection: Future[None] | None = None
_prestarted = threading.Semaphore(0)  # of processes that were requested and that no run has claimed


@dataclass(frozen=True)
class Node:
    """The resources of a live node."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class ClusterCapacity:
    """The live nodes, and the most that an autoscaler may bring (None: no autoscaler, or it is not known)."""

    nodes: tuple[Node, ...]
    max_cpus: float | None = None
    max_gpus: float | None = None

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def count_bundles(self, cpus: float, gpus: float) -> int:
        """Return how many workers with so many CPUs and GPUs each fit on the live nodes at the same time."""
        return sum(int(min(_count_fits(node.cpus, cpus), _count_fits(node.gpus, gpus))) for node in self.nodes)


def _count_fits(available: float, each: float) -> float:
    # Ray counts in ten thousandths; in floats 1 // 0.1 would be 9.
    return round(available * 10_000) // max(1, round(each * 10_000)) if each > 0 else math.inf


# ------------------------------------------------------------------ connection
def connect_in_background(workers: int = 0, trial_cpus: int = 0) -> None:
    """Start to connect in the background, since importing the rest of a job takes as long.

    workers: processes to start ahead for the workers of the first run. trial_cpus: CPUs of each trial of a sweep, for
    which processes are started ahead.
    """
    global _pending_connection  # noqa: PLW0603  there is one connection in a process
    future: Future[None] = Future()
    ray_env.load_ray_internals()  # in this thread: two threads that import from Ray can deadlock

    def run() -> None:
        try:
            _init_ray()
            prestart_workers(workers)
            if trial_cpus:
                free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
                trials = min(int(free.get("CPU", 0)) // trial_cpus, MAX_PRESTARTED_TRIALS)
                _request_processes(trials, get_tune_variables())
        except BaseException as error:
            future.set_exception(error)
            return
        future.set_result(None)
        # The kernel ends Ray's processes with the thread that started them (PR_SET_PDEATHSIG), not with its process.
        threading.Event().wait()

    _pending_connection = future
    threading.Thread(target=run, name="ray-connects", daemon=True).start()


@contextmanager
def connect_cluster() -> Iterator[ClusterCapacity]:
    """Connect to the given cluster, or start a private local one that ends with this process; yield its capacity.

    Raises ClusterError when the cluster does not answer, ConfigError for an environment that Ray cannot work in.
    """
    global _pending_connection
    pending, _pending_connection = _pending_connection, None
    try:
        if pending is None:
            _init_ray()
        else:
            pending.result()
    except Exception as error:
        if isinstance(error, ConfigError):
            raise
        hint = "" if isinstance(error, ClusterError) else "; is it up, and is its token at hand?"
        address = os.environ.get("RAY_ADDRESS", "a new local cluster")
        raise ClusterError(f"cannot use {address}: {error}{hint}") from error
    try:
        yield get_capacity()
    finally:
        ray.shutdown()


def _init_ray() -> None:
    ray_env.check_ray_environment()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray_env.has_existing_cluster():
        _check_head(os.environ["RAY_ADDRESS"])
        ray.init(**options)
        return
    temp_dir = ray_env.make_temp_dir()
    if (internals := ray_env.load_ray_internals()) is not None:
        options |= internals.build_init_options(temp_dir)
    else:
        os.environ["RAY_TMPDIR"] = str(Path(temp_dir).parent)  # Ray appends the last part of temp_dir
    # No dashboard: only this driver talks to the cluster.
    options |= {"address": "local", "include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    with signals.shield_children_from_hangup():
        ray.init(**options)


def _check_head(address: str) -> None:
    """Raise OSError or ClusterError for an address, a token or a version that Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()) or "/" in host:
        return
    socket.create_connection((host.strip("[]"), int(port)), HEAD_TIMEOUT_SECONDS).close()
    if (internals := ray_env.load_ray_internals()) is None:
        return
    try:
        head_version = internals.read_head_version(address, HEAD_TIMEOUT_SECONDS)
    except (AuthenticationError, grpc.RpcError) as error:
        status = grpc.StatusCode.UNAUTHENTICATED if isinstance(error, AuthenticationError) else error.code()
        if status in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ClusterError(_NO_ENTRY) from error
        if status == grpc.StatusCode.UNAVAILABLE:
            raise ClusterError(_NO_GRPC) from error
        # A head that is busy, for example: ray.init waits longer, and decides.
        _log.debug("the head did not answer", exc_info=True)
        return
    if head_version != ray.__version__:
        raise ClusterError(
            f"it runs Ray {head_version} and this environment has Ray {ray.__version__}: give all nodes, and what "
            "submits to them, the same version"
        )


# ------------------------------------------------------------------ capacity
def list_live_nodes() -> list[dict[str, Any]]:
    """Return Ray's records of the nodes that live."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def get_capacity() -> ClusterCapacity:
    """Return the capacity now."""
    resources = [node["Resources"] for node in list_live_nodes()]
    nodes = tuple(Node(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in resources)
    internals = ray_env.load_ray_internals()
    if internals is None or (limits := internals.read_autoscaler_limits()) is None:
        return ClusterCapacity(nodes)
    return ClusterCapacity(nodes, float(limits.get("CPU", 0)), float(limits.get("GPU", 0)))


def resolve_gpus_per_worker(placement: Placement, capacity: ClusterCapacity) -> float:
    """Return the GPUs of each worker: as placed, else one where the cluster has any."""
    if placement.gpus_per_worker is not None:
        return placement.gpus_per_worker
    return 1.0 if capacity.gpus > 0 else 0.0


def wait_for_capacity(placement: Placement, say: Callable[[str], None]) -> ClusterCapacity:
    """Return the capacity, once it holds one run of this placement.

    A cluster that may grow is waited for, which is reported once by `say`. Raises ClusterError immediately for one
    that can never hold the run, and at the placement's deadline.
    """
    start = time.monotonic()
    reported = False
    while True:
        now = get_capacity()
        gpus = resolve_gpus_per_worker(placement, now)
        if now.count_bundles(placement.cpus_per_worker, gpus) >= placement.fewest_workers:
            return now
        deadline, fewest = placement.wait_seconds, placement.fewest_workers
        if now.max_cpus is not None and now.max_gpus is not None:
            enough = now.max_cpus >= fewest * placement.cpus_per_worker and now.max_gpus >= fewest * gpus
            deadline = placement.autoscale_seconds if enough else 0.0  # 0: enough can never come
        least = f"{fewest} to " if placement.is_elastic else ""
        needed = f"{least}{placement.workers} workers of {placement.cpus_per_worker} CPU and {gpus:g} GPU"
        available = f"{len(now.nodes)} node(s) with {now.cpus:g} CPUs and {now.gpus:g} GPUs"
        if deadline == 0:
            raise ClusterError(
                f"placement.workers: {needed} do not fit the cluster, which has {available} and no way to grow: lower "
                "--placement.workers or --placement.cpus-per-worker, or let it wait for nodes to join with "
                "--placement.wait-seconds"
            )
        if time.monotonic() - start > deadline:
            raise ClusterError(f"placement.workers: waited {deadline:g} s for {needed}; the cluster has {available}")
        if not reported:
            say(f"WAITING for {needed}: the cluster has {available}; giving up after {deadline:g} s")
            reported = True
        time.sleep(CAPACITY_POLL_SECONDS)


# ------------------------------------------------------------------ workers started ahead
def prestart_workers(count: int) -> None:
    """Request processes for `count` workers on the cluster's node; Ray starts what is missing when it is needed."""
    if _request_processes(count, get_worker_variables()):
        _prestarted.release(count)


def claim_workers(count: int) -> None:
    """Claim processes for `count` workers that are about to start; request those that were not requested yet."""
    claimed = sum(_prestarted.acquire(blocking=False) for _ in range(count))
    _request_processes(count - claimed, get_worker_variables())


def get_hook_variables() -> dict[str, str]:
    """Return the variables that have each worker's process call SETUP_HOOK; none without the fast start."""
    internals = ray_env.load_ray_internals()
    return {} if internals is None else {internals.SETUP_HOOK_VARIABLE: SETUP_HOOK}


def get_worker_variables() -> dict[str, str]:
    """Return the variables that Ray Train gives a run's workers."""
    return {name: value for name, value in os.environ.items() if _TRAIN_VARIABLES.match(name)} | get_hook_variables()


def get_tune_variables() -> dict[str, str]:
    """Return the variables that Ray Tune gives its actors, with those that tuning/ray_tune.py has it add."""
    names = (*_TUNE_VARIABLES, ray_env.FAST_START_VARIABLE)
    own = {name: os.environ[name] for name in names if name in os.environ}
    return _TUNE_ADDED_VARIABLES | get_worker_variables() | own


def _request_processes(count: int, variables: Mapping[str, str]) -> bool:
    """Request idle processes with these variables; return whether they were requested."""
    internals = ray_env.load_ray_internals()
    if count <= 0 or internals is None:
        return False
    try:
        nodes = list_live_nodes()
        if len(nodes) != 1:  # it is not known yet where Ray will place the workers
            return False
        address = f"{nodes[0]['NodeManagerAddress']}:{nodes[0]['NodeManagerPort']}"
        runtime_env = serialize_runtime_env(variables)
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
    style: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False} if own else {}
    return json.dumps(merged, sort_keys=True, **style)


# ------------------------------------------------------------------ tasks
def run_tasks(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], cpus: float, gpus: float, at_once: int,
    stop: Callable[[], bool],
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Yield (index of the arguments, result) of each call as it ends, with at most `at_once` calls running.

    Stops early, cancelling what runs, when `stop()` is true. Raises JobError when a task failed.
    """
    name = getattr(function, "__name__", "task")
    remote = ray.remote(_run_task).options(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_TASK_RETRIES, name=name)
    waiting = list(enumerate(arguments))[::-1]
    running: dict[Any, int] = {}
    try:
        while (waiting or running) and not stop():
            while waiting and len(running) < at_once:
                number, argument = waiting.pop()
                running[remote.remote(function, *argument)] = number
            done, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
            for reference in done:
                yield running.pop(reference), ray.get(reference)
    except RayTaskError as error:
        raise JobError(f"{type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise JobError(f"a task's worker died {MAX_TASK_RETRIES + 1} times: {error}") from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _run_task(function: Callable[..., Any], *arguments: Any) -> Any:
    prepare_output()  # of the worker's process
    return function(*arguments)
