"""The process group of a run's workers: how Ray's controller has it formed, and how it is left.

The driver imports this: torch, two seconds of a start, is imported in the workers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

SETUP_MARGIN_SECONDS = 60.0


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Has the workers form a torch.distributed group, when there are several of them."""

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[_ProcessGroupBackend]:
        """What runs in the driver when workers start and end."""
        return _ProcessGroupBackend


class _ProcessGroupBackend(Backend):
    # All workers of a node see all its devices: NCCL's peer access needs it, each takes its own by its local rank.
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(worker_group) == 1:
            return
        host, port = worker_group.execute_single(0, get_address_and_port)
        seconds = backend_config.timeout_s
        joined = worker_group.execute_async(
            call_in_worker, "join_process_group", backend_config.backend, host, port, seconds
        )
        ray.get(joined, timeout=SETUP_MARGIN_SECONDS + seconds)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the workers are killed next, and a rank that hangs in a collective would hold the others up."""


def call_in_worker(name: str, *arguments: object) -> object:
    """Call a function of `process_group_join`. Sent to workers from processes that do not import that module."""
    from orchestrator.ray_backend import process_group_join  # torch is imported in the workers alone

    return getattr(process_group_join, name)(*arguments)
