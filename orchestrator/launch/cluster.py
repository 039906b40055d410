"""The Ray cluster at hand: a private local one, or the one that a job was submitted to."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private.state import state as ray_state

from orchestrator.launch.config import Placement

# Switches of Ray that are set for everything the project runs, unless the user set them.
_SWITCHES = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Each run would start a Prometheus exporter in its controller; our metrics go to MLflow.
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
LOCAL_STORE_BYTES = 200_000_000


class ClusterError(RuntimeError):
    """The cluster cannot be reached or is too small; the message says what to do."""


@dataclass(frozen=True)
class Node:
    """What a live node has."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Capacity:
    """The live nodes, and the most that an autoscaler could bring (None: the cluster has no autoscaler)."""

    nodes: tuple[Node, ...]
    most_cpus: float | None = None
    most_gpus: float | None = None

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)

    def bundles(self, cpus: float, gpus: float) -> int:
        """How many workers of this size the live nodes hold at once."""
        return sum(
            int(min(node.cpus // cpus, node.gpus // gpus if gpus > 0 else node.cpus // cpus)) for node in self.nodes
        )


def set_switches(placement: Placement) -> None:
    """Set Ray's switches in this process; Ray hands them on to what it starts."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    # One report or death is seen per poll: small runs pay the default 2 s again and again (pitfalls 3).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(placement.poll_seconds))


def is_submitted() -> bool:
    """Whether this process runs on a cluster that was given to it (ray job submit, or RAY_ADDRESS)."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def connected(placement: Placement) -> Iterator[Capacity]:
    """Connect to the given cluster, or start a private local one that ends with this process.

    Raises ClusterError when the cluster does not answer.
    """
    set_switches(placement)
    local = not is_submitted()
    if local and not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        # A token for this cluster alone; without it Ray would write one into the user's home.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        if local:
            # No dashboard: nothing but this driver talks to the cluster.
            ray.init(
                address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
                object_store_memory=LOCAL_STORE_BYTES,
            )  # fmt: skip
        else:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        address = os.environ.get("RAY_ADDRESS", "a new local cluster")
        raise ClusterError(f"cannot use {address}: {error}; is it up, and is its token at hand?") from error
    try:
        yield capacity()
    finally:
        ray.shutdown()


def capacity() -> Capacity:
    """The capacity now."""
    nodes = tuple(
        Node(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    )
    most = ray_state.get_max_resources_from_cluster_config()
    if most is None:
        return Capacity(nodes)
    return Capacity(nodes, float(most.get("CPU", 0)), float(most.get("GPU", 0)))


def wait_for(placement: Placement, say: Callable[[str], None]) -> Capacity:
    """The capacity, once it holds one run of this placement.

    A cluster that can never hold it is refused at once; one that may grow is waited for, visibly, up to the
    placement's deadline. Raises ClusterError.
    """
    began = time.monotonic()
    said = False
    while True:
        now = capacity()
        gpus = gpus_per_worker(placement, now)
        if now.bundles(placement.cpus_per_worker, gpus) >= placement.workers:
            return now
        deadline = _deadline(placement, now, gpus)
        wants = f"{placement.workers} workers of {placement.cpus_per_worker} CPU and {gpus:g} GPU"
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


def gpus_per_worker(placement: Placement, available: Capacity) -> float:
    """GPUs of each worker: as placed, else one where there are any."""
    if placement.gpus_per_worker is not None:
        return placement.gpus_per_worker
    return 1.0 if available.gpus > 0 else 0.0


def _deadline(placement: Placement, now: Capacity, gpus: float) -> float:
    """Seconds that waiting makes sense; 0 when it never does."""
    if now.most_cpus is None or now.most_gpus is None:
        return placement.wait_seconds
    enough = (
        now.most_cpus >= placement.workers * placement.cpus_per_worker and now.most_gpus >= placement.workers * gpus
    )
    return placement.autoscale_seconds if enough else 0.0
