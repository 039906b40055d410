"""A session as jobs have it, without cluster and tracker."""

import io
from pathlib import Path
from typing import cast

from rich.console import Console

from orchestrator.data import manifest
from orchestrator.ray_backend.cluster import ClusterCapacity, Node
from orchestrator.ray_backend.run_spec import Destination, Placement
from orchestrator.ray_backend.session import RunRecorder, Session
from orchestrator.ray_backend.signals import Interruption
from orchestrator.tracking.replay import JournalReplayer


def session(storage: Path) -> Session:
    """A session on a node of two CPUs, over the dataset in `storage`/data; its output is kept (see `said`)."""
    dataset = manifest.load(str(storage / "data"))
    return Session(
        Destination(data=str(storage / "data"), storage=str(storage), tracking=f"sqlite:///{storage}/x.db"),
        Placement(),
        dataset,
        ClusterCapacity((Node(2, 0),)),
        0.0,
        RunRecorder(str(storage), dataset.name, cast(JournalReplayer, None)),
        Interruption(),
        Console(file=io.StringIO(), width=10_000),
    )


def said(of: Session) -> str:
    """Return the output so far."""
    return cast(io.StringIO, of.console.file).getvalue()
