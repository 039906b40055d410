"""A worker's part of forming the process group: which network interface it uses, and joining it."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from datetime import timedelta

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915
_IFREQ_BYTES = 256  # bytes that the kernel may write


def join_process_group(backend: str, host: str, port: int, timeout_seconds: float) -> None:
    """Join the run's process group, whose store rank 0 keeps at host:port; returns when all ranks have.

    timeout_seconds: of every collective. Sets what launchers of torch set in the environment, too.
    """
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
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=timeout_seconds))


def set_network_interface() -> None:
    """Have this process's collectives use the interface of its Ray node's address, unless the user named one.

    By itself gloo takes whatever the host's name resolves to, often a loopback address that no other node reaches;
    NCCL takes the first that is up.
    """
    found = find_network_interface(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    if found is not None:
        for name in INTERFACE_VARIABLES:
            os.environ.setdefault(name, found)


def find_network_interface(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
