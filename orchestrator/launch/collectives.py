"""The process group of a run's workers: which network interface it uses, and how it is left."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

SETUP_SECONDS = 60.0
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SIOCGIFADDR = 0x8915
_REQUEST = 256  # bytes that the kernel may write


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) > 1:
            ray.get(worker_group.execute_async(choose_interface), timeout=SETUP_SECONDS)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the workers are killed next, and a rank that hangs in a collective would hold the others up."""


class Collectives(TorchConfig):
    """Ray Train's set-up of torch.distributed with our backend around it."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """What runs in the controller when workers start and end."""
        return _Backend


def choose_interface() -> None:
    """Have this process's collectives use the interface of its Ray node's address, unless the user named one.

    By itself gloo takes whatever the host's name resolves to, often a loopback address that no other node reaches;
    NCCL takes the first that is up.
    """
    found = interface_of(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    if found is not None:
        for name in INTERFACES:
            os.environ.setdefault(name, found)


def interface_of(address: str) -> str | None:
    """The name of the interface with this IPv4 address; None when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_REQUEST}s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # it has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
