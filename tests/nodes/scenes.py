"""A run of jobs/train.py on several nodes, and the scenes that tests and drills play with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.drills import checks, stage
from tests.support import nodes
from tests.support.launched import ROOT, process_tree, title, until
from tests.support.nodes import Cluster

ENDLESS = 100_000  # epochs: such a run is stopped when the scene is over
BATCH = 64
STOP_SECONDS = 120.0
# All nodes share two cores.
SLOW_SECONDS = 240.0


@dataclass
class NodesRun(stage.Run):
    """A run whose driver is on the head of a cluster of several nodes; storage is what all of them share."""

    nodes: Cluster = field(kw_only=True)
    home: int = field(kw_only=True, default=0)  # the node of its drivers

    def submit(self) -> subprocess.Popen[bytes]:
        """Start a driver; the same command each time."""
        self.storage.mkdir(parents=True, exist_ok=True)
        environment = {
            "RAY_ADDRESS": self.nodes.address,
            "ORCHESTRATOR_RUNS": str(self.storage),
            "TMPDIR": str(self.scratch),
        }
        with open(self.log(len(self.drivers)), "wb") as log:
            driver = self.nodes.exec(
                self.home, [sys.executable, str(ROOT / "jobs" / "train.py"), *self.flags], out=log, env=environment
            )
        self.drivers.append(driver)
        return driver

    def workers(self) -> list[int]:
        """Return the processes of its ranks."""
        return [pid for node in self.nodes.nodes for pid in self.nodes.workers(node.number)]

    def stop(self) -> int:
        """Stop it as `ray job stop` does, with a checkpoint; return the driver's exit status."""
        for pid in process_tree(self.driver.pid):
            if title(pid).startswith(sys.executable):
                os.kill(pid, signal.SIGTERM)
        return self.driver.wait(STOP_SECONDS)

    def await_workers(self, count: int, moment: float) -> float:
        """Wait for a step of an attempt with `count` workers that began after `moment`; return its time."""
        times: list[float] = []

        def stepped() -> bool:
            since = [event for event in self.events() if event.time > moment]
            workers: object = None
            for event in since:
                workers = event.values["workers"] if event.kind == "started" else workers
                if workers == count and event.kind in stage.STEPPED:
                    times.append(event.time)
            return bool(times)

        self.wait(stepped, f"a step of {count} workers", SLOW_SECONDS)
        return times[0]

    def rank_0(self) -> int:
        """Return the node of rank 0 of the newest group."""
        until(self.nodes.groups, SLOW_SECONDS, 0.5)
        return self.nodes.groups()[-1][0]


def flags(workers: int, *more: str, epochs: int = ENDLESS, checkpoint_seconds: float = 1.0) -> tuple[str, ...]:
    """Return a command line on the embedded digits that checks for signals every step."""
    return (
        "googlenet-tiny",
        f"--epochs={epochs}",
        f"--batch-size={BATCH}",
        f"--placement.workers={workers}",
        "--placement.max-restarts=100",
        f"--cadence.checkpoint-seconds={checkpoint_seconds}",
        "--cadence.pulse-steps=1",
        "--cadence.log-steps=1",
        f"--cadence.validate-epochs={epochs}",
        *more,
    )


@contextmanager
def submitted(
    storage: Path,
    cpus: Sequence[int],
    words: tuple[str, ...],
    on: Sequence[int] | None = None,
    home: int = 0,
    head: Mapping[str, str] = nodes.HEALTH,
) -> Iterator[NodesRun]:
    """Submit a run on a cluster of its own; end both afterwards.

    on: the nodes that are on, by default all. home: the node of the driver. head: how it watches its nodes.
    """
    with (
        tempfile.TemporaryDirectory(prefix="nodes-") as private,
        nodes.cluster(Path(private), cpus, on, head) as cluster,
    ):
        run = NodesRun(stage.Cluster(0, {}), storage, words, nodes=cluster, home=home)
        run.submit()
        yield run


def elastic(storage: Path) -> dict[str, float]:
    """Kill one of three nodes while three workers train, and restart it; return seconds and samples of each change."""
    words = flags(3, "--placement.min-workers=2", checkpoint_seconds=5.0)
    with submitted(storage, (1, 1, 1), words) as run:
        run.await_workers(3, 0.0)
        lost = time.time()
        run.nodes.nodes[2].kill()
        down = run.await_workers(2, lost)
        returned = time.time()
        run.nodes.add(2)
        joined = time.time()
        up = run.await_workers(3, joined)
        run.stop()
        incidents = run.events("incident")
        problems = checks.audited(run)
        assert not problems, problems
    replayed = [float(str(one.values["samples_replayed"])) for one in incidents]
    assert len(replayed) == 2, incidents
    seconds = {"down": down - lost, "node up": joined - returned, "up": up - joined}
    return seconds | {"replayed down": replayed[0], "replayed up": replayed[1]}
