"""Ray clusters of several machines on this one, and a further machine for the services that they share."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import yaml

from tests.support.launched import ROOT, process_tree, title
from tests.support.machines import BIN, Machine, network

PORT = 6379
START_SECONDS = 90.0
STORE_BYTES = 100_000_000
# How the head watches its nodes: one that is cut off counts as dead after about 8 s instead of Ray's 66 s. The
# settings of cluster/ssh are slower, too (`shipped_health`): tests have no time.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "4",
}
_HEALTH = re.compile(r"(RAY_health_check_\w+)=(\d+)")
_RANK = re.compile(r"\(ip=([\d.]+), pid=(\d+)\) world_rank=(\d+)")


@dataclass
class Cluster:
    """Nodes 0 (the head), 1, 2 ... with Ray on each, and a machine without Ray, off until a test boots it."""

    nodes: list[Machine]
    services: Machine
    cpus: tuple[int, ...]
    # Variables of Ray on all nodes, beside the test's own environment, and on the head alone.
    environment: Mapping[str, str] = field(default_factory=dict)
    head: Mapping[str, str] = field(default_factory=lambda: HEALTH)
    # Whether the head takes jobs (`ray job submit`), on its loopback.
    jobs: bool = False

    @property
    def address(self) -> str:
        """RAY_ADDRESS for a driver."""
        return f"{self.nodes[0].address}:{PORT}"

    def start(self, numbers: Sequence[int]) -> None:
        """Switch nodes on, the head first, and let them join."""
        for some in ([0], [number for number in numbers if number != 0]):
            joining = [(number, self.join(number)) for number in some if number in numbers]
            for number, ray in joining:
                assert ray.wait(START_SECONDS) == 0, self.log_of(number).read_text()

    def add(self, number: int, scratch: str = "") -> None:
        """Switch one node on and let it join; scratch: how much its /tmp/ray holds ("64m"), else what the disk does."""
        assert self.join(number, scratch).wait(START_SECONDS) == 0, self.log_of(number).read_text()

    def join(self, number: int, scratch: str = "") -> "subprocess.Popen[bytes]":
        """Switch one node on and have its Ray started: the command, which may still be at it."""
        node = self.nodes[number]
        node.boot([*self.nodes, self.services], scratch)
        dashboard = ["--dashboard-host=127.0.0.1"] if self.jobs else ["--include-dashboard=false"]
        role = ["--head", f"--port={PORT}", *dashboard] if number == 0 else [f"--address={self.address}"]
        start = [
            str(BIN / "ray"), "start", *role, f"--node-ip-address={node.address}", f"--num-cpus={self.cpus[number]}",
            "--num-gpus=0", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats",
        ]  # fmt: skip
        with open(self.log_of(number), "wb") as log:
            return node.exec(start, out=log, env={**self.environment, **(self.head if number == 0 else {})})

    def log_of(self, number: int) -> Path:
        """Return the file of the output of Ray's start on a node."""
        return self.nodes[number].folder / "start.log"

    def exec(
        self, number: int, argv: Sequence[str], out: IO[bytes] | None = None, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on a node, in the folder /; it is killed with its node at the latest."""
        return self.nodes[number].exec(argv, out, env)

    def ask(self, number: int, argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """Return the output of a command on a node, which must succeed."""
        return self.nodes[number].ask(argv, {"RAY_ADDRESS": self.address, **(env or {})})

    def drain(self, number: int, seconds: float) -> None:
        """Announce that a node is taken away in so many seconds (the caller must do it)."""
        listed = self.ask(0, [sys.executable, "-c", _IDS])
        ids = dict(line.split() for line in listed.splitlines() if line.startswith("10."))
        deadline = round(seconds)
        self.ask(
            0,
            [
                str(BIN / "ray"), "drain-node", f"--address={self.address}",
                f"--node-id={ids[self.nodes[number].address]}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=spot", f"--deadline-remaining-seconds={deadline}",
            ],
        )  # fmt: skip

    def workers(self, number: int) -> list[int]:
        """Pids of the training workers on a node, seen from outside."""
        if self.nodes[number].unshare is None:
            return []
        return [pid for pid in process_tree(self.nodes[number].init) if "RayTrainWorker" in title(pid)]

    def groups(self) -> list[dict[int, int]]:
        """Return the groups of workers started so far, from the logs of Ray Train's controllers: node by rank."""
        started: list[dict[int, int]] = []
        numbers = {node.address: node.number for node in self.nodes}
        logs = [log for node in self.nodes for log in (node.folder / "ray").glob(_CONTROLLERS)]
        for log in sorted(logs, key=lambda log: log.stat().st_mtime):
            for part in log.read_text(errors="replace").split("Started training worker group")[1:]:
                ranks = _RANK.findall(part)
                started.append({int(rank): numbers[address] for address, _, rank in ranks})
        return started


def shipped_health() -> dict[str, str]:
    """Return the health checks of a head that cluster/ssh/cluster.yaml starts."""
    launcher = yaml.safe_load((ROOT / "cluster" / "ssh" / "cluster.yaml").read_text())
    settings = dict(_HEALTH.findall(" ".join(launcher["head_start_ray_commands"])))
    assert settings.keys() == HEALTH.keys(), settings
    return settings


@contextmanager
def cluster(
    folder: Path,
    cpus: Sequence[int],
    on: Sequence[int] | None = None,
    head: Mapping[str, str] = HEALTH,
) -> Iterator[Cluster]:
    """Start a cluster with these CPUs by node, node 0 being the head; skip the test where the host permits none.

    folder: of the nodes' private files; with a short path, for Ray's sockets. on: the nodes that are on.
    head: variables of the head's Ray alone.
    """
    with network(folder, len(cpus) + 1) as machines:
        made = Cluster(machines[:-1], machines[-1], tuple(cpus), head=head)
        made.start(on if on is not None else range(len(cpus)))
        yield made


_CONTROLLERS = "session_2*/logs/train/ray-train-app-controller-*"
_IDS = """
import os
from ray._raylet import GcsClient
for key, node in GcsClient(address=os.environ["RAY_ADDRESS"]).get_all_node_info().items():
    if node.state == 0:
        print(node.node_manager_address, key.hex())
"""
