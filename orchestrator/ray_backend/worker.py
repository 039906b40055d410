"""A Ray Train worker: how a run's workers form their process group, and the training inside Ray's context.

The driver imports this module to name the entry, so torch, two seconds of a start, is imported in the workers alone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from orchestrator.config.output import prepare_output
from orchestrator.ray_backend import ray_env
from orchestrator.training.config import LauncherContext, TrainJob

SETUP_MARGIN_SECONDS = 60.0
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915
_IFREQ_BYTES = 256  # bytes that the kernel may write


class RayTrainContext(LauncherContext):
    """Context of the training inside Ray Train. Nothing is reported to Ray: all is in the run's own journal.

    Ray Train drops metrics that come without a checkpoint, and each report would stop the training for a barrier of all
    ranks. Only the stop flag ends a training early.
    """

    def __init__(self, fast_start: bool) -> None:
        """fast_start: whether the controller is that of `fast_start`."""
        self._fast_start = ray_env.load_fast_start() if fast_start else None

    def has_preemption_notice(self) -> bool:
        """Return whether the workers are about to be shut down. All ranks must call this equally often."""
        if self._fast_start is None:  # a barrier: rank 0's answer counts
            return ray.train.get_preemption_info() is not None
        return bool(self._fast_start.is_shutdown_imminent())


def run_train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train as this worker; return the outcome as a dict.

    payload: the TrainJob as a dict under "job"; under "fast_start", whether the controller is that of `fast_start`.
    """
    import ray.train.torch  # in the workers alone: torch takes two seconds
    import torch  # as above

    from orchestrator.training import distributed, trainer  # they import torch

    prepare_output()
    job = TrainJob.from_dict(payload["job"])
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    context = RayTrainContext(payload["fast_start"])
    return trainer.run_training(job, distributed.get_context(device), context).to_dict()


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Has the workers form a torch.distributed group, when there are several of them."""

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[_ProcessGroupBackend]:
        """Return what the controller calls when workers start and end."""
        return _ProcessGroupBackend


class _ProcessGroupBackend(Backend):
    # Its on_shutdown does nothing: workers are killed next, and a rank that hangs would hold up the others.
    # All workers of a node see all its devices: NCCL's peer access needs it, each takes its own by its local rank.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) == 1:
            return
        host, port = worker_group.execute_single(0, _find_free_address)
        seconds = backend_config.timeout_s
        joined = worker_group.execute_async(_join_process_group, backend_config.backend, host, port, seconds)
        ray.get(joined, timeout=SETUP_MARGIN_SECONDS + seconds)


def _find_free_address() -> tuple[str, int]:
    """Return this worker's address and a port of it that is free now."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return host, probe.getsockname()[1]


def _join_process_group(backend: str, host: str, port: int, timeout_seconds: float) -> None:
    """Join the process group, whose store rank 0 keeps at host:port; set the variables that launchers of torch set."""
    import torch.distributed as dist  # in the workers alone: torch takes two seconds
    from ray.train.torch import get_device  # it imports torch

    set_network_interface()
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    device = get_device()
    if device.type == "cuda":
        import torch  # in the workers alone, as above

        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=timeout_seconds))


def set_network_interface() -> None:
    """Have this process's collectives use the interface of its Ray node's address, unless the user named one.

    By itself gloo takes whatever the host's name resolves to, often a loopback address that no other node reaches;
    NCCL takes the first that is up.
    """
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode()[:15])
            with suppress(OSError):  # it has no IPv4 address
                if socket.inet_ntoa(fcntl.ioctl(query.fileno(), _SIOCGIFADDR, request)[20:24]) == address:
                    for variable in INTERFACE_VARIABLES:
                        os.environ.setdefault(variable, name)
