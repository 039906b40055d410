"""What runs on each Ray Train worker: our training entry inside Ray's context."""

from __future__ import annotations

import threading
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context

from orchestrator.training import entry, world
from orchestrator.training.job import TrainJob

_leaving = threading.Event()  # this process was told that its group is about to be replaced


class RayContext:
    """Reports to Ray Train: metrics only, no checkpoint of ours ever (design: training on the cluster)."""

    def report(self, metrics: dict[str, float]) -> None:
        """One report per epoch and rank."""
        ray.train.report(metrics)

    def preempted(self) -> bool:
        """Whether the workers are about to be taken down: a node of theirs drains, or their number is to change.

        As this rank knows; it costs nothing and waits for nobody. (Ray's public question is a barrier of all ranks.)
        """
        return _leaving.is_set() or deadline() is not None


def deadline() -> float | None:
    """When a draining node of the run goes away, in unix seconds (0: unknown); None when none drains.

    Ray's watcher tells every rank; a Ray that does not know of it never does.
    """
    notice = getattr(get_train_context(), "preemption_context", None)
    info = getattr(notice, "preemption_info", None)
    return None if info is None else (info.deadline_ms or 0) / 1000


def announce() -> None:
    """Note that the group of workers is about to be replaced. Called in rank 0's process, from Ray's controller."""
    _leaving.set()


def train(payload: dict[str, Any]) -> dict[str, Any]:
    """Train as this worker; the outcome as a plain dict."""
    job = TrainJob.from_dict(payload)
    device: torch.device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return entry.run(job, world.current(device), RayContext()).to_dict()
