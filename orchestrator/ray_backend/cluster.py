"""The Ray cluster of this process: a private local one, or the one that a job was submitted to."""

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
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError

from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import ray_compat, signals, worker_prestart
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
_log = logging.getLogger(__name__)
HEAD_TIMEOUT_SECONDS = 5.0


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
        needs_gpu = gpus > 0
        return sum(
            min(
                _count_fits(node.cpus, cpus),
                _count_fits(node.gpus, gpus) if needs_gpu else _count_fits(node.cpus, cpus),
            )
            for node in self.nodes
        )


_pending_connection: Future[None] | None = None


def connect_in_background(workers: int = 0, trial_cpus: int = 0) -> None:
    """Start to connect in the background, since importing the rest of a job takes as long.

    workers: processes to start ahead for the workers of the first run. trial_cpus: CPUs of each trial of a sweep, for
    which processes are started ahead.
    """
    global _pending_connection  # noqa: PLW0603  there is one connection in a process
    future: Future[None] = Future()
    ray_compat.load_ray_internals()  # in this thread: two threads that import from Ray can deadlock

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
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if has_existing_cluster():
        _check_head(os.environ["RAY_ADDRESS"])
        ray.init(**options)
        return
    temp_dir = make_temp_dir()
    if (internals := ray_compat.load_ray_internals()) is not None:
        options |= internals.build_init_options(temp_dir)
    else:
        os.environ["RAY_TMPDIR"] = str(Path(temp_dir).parent)  # Ray appends the last part of temp_dir
    # No dashboard: only this driver talks to the cluster.
    with signals.shield_children_from_hangup():
        ray.init(
            address="local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **options
        )  # fmt: skip


def _check_head(address: str) -> None:
    """Raise when nothing listens at HOST:PORT, or this process is not let in: Ray itself would try for minutes.

    Raises OSError; with the fast start also ClusterError for a wrong token and for another version of Ray.
    """
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdigit()) or "/" in host:
        return
    socket.create_connection((host.strip("[]"), int(port)), HEAD_TIMEOUT_SECONDS).close()
    if (internals := ray_compat.load_ray_internals()) is None:
        return
    try:
        head_version = internals.read_head_version(address, HEAD_TIMEOUT_SECONDS)
    except AuthenticationError as error:
        raise ClusterError(_NO_TOKEN) from error
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise ClusterError(_WRONG_TOKEN) from error
        if code == grpc.StatusCode.UNAVAILABLE:
            raise ClusterError(_NO_GRPC) from error
        # A head that is busy, for example: ray.init waits longer, and decides.
        _log.debug("the head did not answer", exc_info=True)
        return
    if head_version != ray.__version__:
        raise ClusterError(
            f"it runs Ray {head_version} and this environment has Ray {ray.__version__}: give all nodes, and what "
            "submits to them, the same version"
        )


def get_capacity() -> ClusterCapacity:
    """Return the capacity now."""
    nodes = tuple(
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    )
    internals = ray_compat.load_ray_internals()
    limits = None if internals is None else internals.read_autoscaler_limits()
    if limits is None:
        return ClusterCapacity(nodes)
    return ClusterCapacity(nodes, float(limits.get("CPU", 0)), float(limits.get("GPU", 0)))


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
        deadline = _compute_wait_seconds(placement, now, gpus)
        least = f"{placement.fewest_workers} to " if placement.is_elastic else ""
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
        time.sleep(2.0)


def _count_fits(available: float, each: float) -> int:
    # Ray counts in ten thousandths; in floats 1 // 0.1 would be 9.
    return round(available * 10_000) // max(1, round(each * 10_000))


def resolve_gpus_per_worker(placement: Placement, capacity: ClusterCapacity) -> float:
    """Return the GPUs of each worker: as placed, else one where the cluster has any."""
    if placement.gpus_per_worker is not None:
        return placement.gpus_per_worker
    return 1.0 if capacity.gpus > 0 else 0.0


def _compute_wait_seconds(placement: Placement, now: ClusterCapacity, gpus: float) -> float:
    """Return the seconds to wait for nodes; 0 when enough can never come."""
    if now.max_cpus is None or now.max_gpus is None:
        return placement.wait_seconds
    enough = (
        now.max_cpus >= placement.fewest_workers * placement.cpus_per_worker
        and now.max_gpus >= placement.fewest_workers * gpus
    )
    return placement.autoscale_seconds if enough else 0.0
