"""The Ray cluster at hand: a private local one, or the one that a job was submitted to."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.state import state as ray_state
from ray.core.generated import gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import signals, worker_prestart
from orchestrator.ray_backend.launch_errors import ClusterError
from orchestrator.ray_backend.ray_env import check_ray_environment, has_existing_cluster
from orchestrator.ray_backend.run_spec import Placement
from orchestrator.ray_backend.temp_dir import make_temp_dir

LOCAL_OBJECT_STORE_BYTES = 200_000_000
_TOKEN_PLACES = "RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH names, else ~/.ray/auth_token"  # noqa: S105
_NO_TOKEN = f"there is no token for it: give that of the cluster in {_TOKEN_PLACES}"
_WRONG_TOKEN = f"it refuses the token of this process: give that of the cluster in {_TOKEN_PLACES}"
_NO_GRPC = (
    "something listens there that does not answer as Ray's head: is it that port (6379 by default), and do both sides "
    "use TLS (RAY_USE_TLS and the three RAY_TLS_ files) or neither?"
)
# Names of what protobuf's compiler made are there at run time only.
_gcs_service_pb2: Any = import_module("ray.core.generated.gcs_service_pb2")
_log = logging.getLogger(__name__)
HEAD_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Node:
    """What a live node has."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class ClusterCapacity:
    """The live nodes, and the most that an autoscaler could bring (None: the cluster has no autoscaler)."""

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
        """How many workers of this size the live nodes hold at once."""
        return sum(
            min(
                _count_fits(node.cpus, cpus), _count_fits(node.gpus, gpus) if gpus > 0 else _count_fits(node.cpus, cpus)
            )
            for node in self.nodes
        )


_pending_connection: Future[None] | None = None


def connect_in_background(workers: int = 0, trial_cpus: int = 0) -> None:
    """Start to connect in the background: importing the rest of a job takes as long.

    workers: processes to have ready for the workers of the first run. trial_cpus: CPUs of each trial of a sweep, for
    which processes are to be ready.
    """
    global _pending_connection  # noqa: PLW0603  there is one connection in a process
    future: Future[None] = Future()

    def run() -> None:
        try:
            _init_ray()
            worker_prestart.prestart_workers(workers)
            if trial_cpus:
                worker_prestart.prestart_trial_workers(trial_cpus)
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
    """Connect to the given cluster, or start a private local one that ends with this process.

    Raises ClusterError when the cluster does not answer, ConfigError for surroundings that Ray cannot work in.
    """
    global _pending_connection
    begun, _pending_connection = _pending_connection, None
    try:
        if begun is None:
            _init_ray()
        else:
            begun.result()
    except ConfigError:
        raise
    except ClusterError as error:
        raise ClusterError(f"cannot use {os.environ.get('RAY_ADDRESS', '')}: {error}") from error
    except Exception as error:
        address = os.environ.get("RAY_ADDRESS", "a new local cluster")
        raise ClusterError(f"cannot use {address}: {error}; is it up, and is its token at hand?") from error
    try:
        yield get_capacity()
    finally:
        ray.shutdown()


def _init_ray() -> None:
    check_ray_environment()
    if has_existing_cluster():
        _check_head(os.environ["RAY_ADDRESS"])
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    # No dashboard: nothing but this driver talks to the cluster. No process ahead of its use, but for what is asked for
    # by `prestart`: Ray's own have another runtime environment than our workers, and would never be used.
    with signals.shield_children_from_hangup():
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES, _temp_dir=make_temp_dir(),
            _system_config={"prestart_worker_first_driver": False, "enable_worker_prestart": False},
        )  # fmt: skip


def _check_head(address: str) -> None:
    """Raise when nobody listens at HOST:PORT, or this process does not get in there: Ray would try for minutes, loudly.

    Raises OSError, or ClusterError for a token that is not the cluster's and for another version of Ray.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()) or "/" in host:
        return
    socket.create_connection((host.strip("[]"), int(port)), HEAD_TIMEOUT_SECONDS).close()
    try:
        with init_grpc_channel(address) as channel:
            head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
            theirs = head.CheckAlive(_gcs_service_pb2.CheckAliveRequest(), timeout=HEAD_TIMEOUT_SECONDS).ray_version
    except AuthenticationError as error:
        raise ClusterError(_NO_TOKEN) from error
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ClusterError(_WRONG_TOKEN) from error
        if code == grpc.StatusCode.UNAVAILABLE:
            raise ClusterError(_NO_GRPC) from error
        # A head that is busy, say: ray.init has more patience, and the last word.
        _log.debug("the head does not say how it is", exc_info=True)
        return
    if theirs != ray.__version__:
        raise ClusterError(
            f"it runs Ray {theirs} and this environment has Ray {ray.__version__}: give all nodes, and what submits to "
            "them, the same version"
        )


def get_capacity() -> ClusterCapacity:
    """The capacity now."""
    nodes = tuple(
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    )
    most = ray_state.get_max_resources_from_cluster_config()
    if most is None:
        return ClusterCapacity(nodes)
    return ClusterCapacity(nodes, float(most.get("CPU", 0)), float(most.get("GPU", 0)))


def has_autoscaler() -> bool:
    """Whether the cluster has an autoscaler."""
    return ray_state.get_max_resources_from_cluster_config() is not None


def wait_for_capacity(placement: Placement, say: Callable[[str], None]) -> ClusterCapacity:
    """The capacity, once it holds one run of this placement.

    A cluster that can never hold it is refused at once; one that may grow is waited for, visibly, up to the
    placement's deadline. Raises ClusterError.
    """
    began = time.monotonic()
    said = False
    while True:
        now = get_capacity()
        gpus = resolve_gpus_per_worker(placement, now)
        if now.count_bundles(placement.cpus_per_worker, gpus) >= placement.fewest_workers:
            return now
        deadline = _compute_wait_seconds(placement, now, gpus)
        least = f"{placement.fewest_workers} to " if placement.is_elastic else ""
        wants = f"{least}{placement.workers} workers of {placement.cpus_per_worker} CPU and {gpus:g} GPU"
        has = f"{len(now.nodes)} node(s) with {now.cpus:g} CPUs and {now.gpus:g} GPUs"
        if deadline == 0:
            raise ClusterError(
                f"placement.workers: {wants} do not fit the cluster, which has {has} and no way to grow: lower "
                "--placement.workers or --placement.cpus-per-worker, or let it wait for nodes to join with "
                "--placement.wait-seconds"
            )
        if time.monotonic() - began > deadline:
            raise ClusterError(f"placement.workers: waited {deadline:g} s for {wants}; the cluster has {has}")
        if not said:
            say(f"WAITING for {wants}: the cluster has {has}; giving up after {deadline:g} s")
            said = True
        time.sleep(2.0)


def _count_fits(available: float, each: float) -> int:
    # Ray counts in ten thousandths; in floats 1 // 0.1 would be 9.
    return round(available * 10_000) // max(1, round(each * 10_000))


def resolve_gpus_per_worker(placement: Placement, available: ClusterCapacity) -> float:
    """GPUs of each worker: as placed, else one where there are any."""
    if placement.gpus_per_worker is not None:
        return placement.gpus_per_worker
    return 1.0 if available.gpus > 0 else 0.0


def _compute_wait_seconds(placement: Placement, now: ClusterCapacity, gpus: float) -> float:
    """Seconds that waiting makes sense; 0 when it never does."""
    if now.max_cpus is None or now.max_gpus is None:
        return placement.wait_seconds
    enough = (
        now.max_cpus >= placement.fewest_workers * placement.cpus_per_worker
        and now.max_gpus >= placement.fewest_workers * gpus
    )
    return placement.autoscale_seconds if enough else 0.0
