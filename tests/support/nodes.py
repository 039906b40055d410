"""Ray clusters of several machines on this one: each node has its own network, processes, /tmp/ray and name.

A node is a network namespace on a bridge and a process namespace whose end kills everything on the node at once. The
file system is one: it stands for the storage that real nodes share. Needs root, iproute2 and util-linux.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from tests.support.launched import process_tree, title, until

PORT = 6379
START_SECONDS = 90.0
COMMAND_SECONDS = 60.0
STORE_BYTES = 100_000_000
BIN = Path(sys.executable).parent
# How the head watches its nodes: one that is cut off counts as dead after about 8 s instead of 66 s.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "4",
}
# The first process of a node: mounts what is the node's own, then reaps until it is killed.
INIT = """
hostname "$NODE"; mount --make-rprivate /
mount --bind "$PRIVATE/hosts" /etc/hosts; mount --bind "$PRIVATE/ray" /tmp/ray
mount -t tmpfs -o size=1g tmpfs /dev/shm
touch "$PRIVATE/ready"
trap : CHLD TERM
while :; do sleep 3600 & wait -n; done
"""
_RANK = re.compile(r"\(ip=([\d.]+), pid=(\d+)\) world_rank=(\d+)")


@functools.cache
def trouble() -> str | None:
    """Why there can be no such nodes here; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter", "hostname"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (packages iproute2, util-linux, hostname)"
    name = f"probe-{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "netns", "del", name)
        _run("unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc", "true")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip() or error}"
    return None


@dataclass
class Node:
    """One machine."""

    number: int
    name: str
    folder: Path  # what is its own: /tmp/ray, /etc/hosts
    unshare: "subprocess.Popen[bytes] | None" = None

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return f"10.88.0.{self.number + 1}"

    @property
    def init(self) -> int:
        """The pid of its first process, seen from outside."""
        assert self.unshare is not None, f"{self.name} is off"
        return int((Path("/proc") / str(self.unshare.pid) / f"task/{self.unshare.pid}/children").read_text().split()[0])


@dataclass
class Cluster:
    """Nodes 0 (the head), 1, 2 ... with Ray on each."""

    folder: Path
    cpus: tuple[int, ...]
    prefix: str
    nodes: list[Node] = field(default_factory=list)
    _running: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is for a driver."""
        return f"{self.nodes[0].address}:{PORT}"

    def add(self, number: int) -> None:
        """Switch a node on and let it join."""
        node = self.nodes[number]
        shutil.rmtree(node.folder, ignore_errors=True)
        (node.folder / "ray").mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{one.address} {one.name}" for one in self.nodes)]
        (node.folder / "hosts").write_text("\n".join(lines) + "\n")
        Path("/tmp/ray").mkdir(exist_ok=True)  # where the node's own is mounted
        namespaces = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--uts", "--ipc", "--mount-proc"]
        node.unshare = subprocess.Popen(
            ["nsenter", f"--net=/var/run/netns/{node.name}", *namespaces, "bash", "-c", INIT],
            env={**os.environ, "NODE": node.name, "PRIVATE": str(node.folder)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        until((node.folder / "ready").exists)
        join = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"] if number == 0 else [f"--address={self.address}"]
        )
        start = [
            str(BIN / "ray"), "start", *join, f"--node-ip-address={node.address}", f"--num-cpus={self.cpus[number]}",
            "--num-gpus=0", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats",
        ]  # fmt: skip
        with open(node.folder / "start.log", "wb") as log:
            started = self.exec(number, start, out=log, env=HEALTH if number == 0 else {})
            status = started.wait(START_SECONDS)
        assert status == 0, (node.folder / "start.log").read_text()

    def exec(
        self, number: int, argv: Sequence[str], out: IO[bytes] | None = None, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on a node, in the folder /; it is killed with its node at the latest."""
        process = subprocess.Popen(
            [*self._inside(number), *argv],
            env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out is not None else None,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def ask(self, number: int, argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """What a command prints on a node that must succeed."""
        done = subprocess.run(
            [*self._inside(number), *argv],
            env={**os.environ, "RAY_ADDRESS": self.address, **(env or {})},
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self, number: int) -> None:
        """Take a node's power away."""
        node = self.nodes[number]
        if node.unshare is not None:
            with suppress(IndexError, OSError):  # it has died
                os.kill(node.init, signal.SIGKILL)
            node.unshare.kill()
            node.unshare.wait()
            node.unshare = None

    def cut(self, number: int) -> None:
        """Pull a node's cable: nobody is told."""
        _run("ip", "-n", self.nodes[number].name, "link", "set", "eth0", "down")

    def heal(self, number: int) -> None:
        """Put the cable back."""
        _run("ip", "-n", self.nodes[number].name, "link", "set", "eth0", "up")

    def drain(self, number: int, seconds: float) -> None:
        """Announce that a node is taken away in so many seconds (the caller must do it)."""
        listed = self.ask(0, [sys.executable, "-c", _IDS])
        found = dict(line.split() for line in listed.splitlines() if line.startswith("10."))
        deadline = round(seconds)
        self.ask(
            0,
            [
                str(BIN / "ray"), "drain-node", f"--address={self.address}",
                f"--node-id={found[self.nodes[number].address]}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=spot", f"--deadline-remaining-seconds={deadline}",
            ],
        )  # fmt: skip

    def workers(self, number: int) -> list[int]:
        """Pids of the training workers on a node, seen from outside."""
        if self.nodes[number].unshare is None:
            return []
        return [pid for pid in process_tree(self.nodes[number].init) if "RayTrainWorker" in title(pid)]

    def groups(self) -> list[dict[int, int]]:
        """The groups of workers that were started so far, as Ray Train's controller logged them: node by rank."""
        found: list[dict[int, int]] = []
        numbers = {node.address: node.number for node in self.nodes}
        for log in sorted((self.nodes[0].folder / "ray").glob("session_2*/logs/train/ray-train-app-controller-*")):
            for part in log.read_text(errors="replace").split("Started training worker group")[1:]:
                ranks = _RANK.findall(part)
                found.append({int(rank): numbers[address] for address, _, rank in ranks})
        return found

    def close(self) -> None:
        """Switch everything off and take the network down."""
        for node in reversed(self.nodes):
            self.kill(node.number)
        for process in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)  # its node is gone, so it is, too
        for node in self.nodes:
            # The cable's other end goes with it; the namespace alone may linger until its last process is reaped.
            subprocess.run(["ip", "link", "del", f"{self.prefix}v{node.number}"], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", node.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{self.prefix}br"], check=False, capture_output=True)

    def _inside(self, number: int) -> list[str]:
        spaces = ["--net", "--pid", "--mount", "--uts", "--ipc", "--wd=/"]
        return ["nsenter", "-t", str(self.nodes[number].init), *spaces]


@contextmanager
def cluster(folder: Path, cpus: Sequence[int], on: Sequence[int] | None = None) -> Iterator[Cluster]:
    """A cluster with so many CPUs on each node, node 0 being the head; skips the test, aloud, where it cannot be.

    folder: of what the nodes keep for themselves; short, since Ray's sockets lie below it. on: the nodes that are on.
    """
    if (reason := trouble()) is not None:
        pytest.skip(reason)
    made = Cluster(folder, tuple(cpus), f"o{os.getpid() % 100_000}{time.monotonic_ns() % 1000:03d}")
    bridge = f"{made.prefix}br"
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for number in range(len(cpus)):
            node = Node(number, f"{made.prefix}n{number}", folder / f"node-{number}")
            made.nodes.append(node)
            _wire(node, bridge, f"{made.prefix}v{number}")
        for number in on if on is not None else range(len(cpus)):
            made.add(number)
        yield made
    finally:
        made.close()


def _wire(node: Node, bridge: str, cable: str) -> None:
    _run("ip", "netns", "add", node.name)
    _run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", node.name)
    _run("ip", "link", "set", cable, "master", bridge, "up")
    _run("ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
    _run("ip", "-n", node.name, "link", "set", "eth0", "up")
    _run("ip", "-n", node.name, "link", "set", "lo", "up")


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True, timeout=COMMAND_SECONDS)


_IDS = """
import os
from ray._raylet import GcsClient
for key, node in GcsClient(address=os.environ["RAY_ADDRESS"]).get_all_node_info().items():
    if node.state == 0:
        print(node.node_manager_address, key.hex())
"""
