"""Machines of a network on this one: each has its own network, processes, name, hosts file, /tmp and /dev/shm.

A machine is a network namespace on a bridge and a process namespace whose end kills everything on it. The file
system beside /tmp is one: it stands for the storage that real machines share. Cables can be cut, narrowed and made
lossy, CPUs rationed. Needs root, iproute2 and util-linux; rations need the cpu controller of cgroups.
"""

import functools
import os
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

from tests.support.launched import ROOT, until

COMMAND_SECONDS = 60.0
BIN = Path(sys.executable).parent
CGROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_MICROSECONDS = 100_000
TMP = Path("/tmp")
# Folders that tests share with their machines, beside those that every machine needs (`_shared`).
SHARED: set[Path] = set()
# The first process of a machine: mounts the machine's private folders, then reaps until it is killed. Its /tmp is put
# together in its folder, since the other one is out of sight as soon as this one is in its place.
INIT = """
set -e
hostname "$NODE"; mount --make-rprivate /
mount --bind "$PRIVATE/hosts" /etc/hosts
for place; do
    mkdir -p "$PRIVATE/tmp${place#/tmp}"
    mount --rbind "$place" "$PRIVATE/tmp${place#/tmp}"
done
mkdir -p "$PRIVATE/tmp/ray"
if [ -n "$SCRATCH" ]; then mount -t tmpfs -o size="$SCRATCH" tmpfs "$PRIVATE/tmp/ray"
else mount --bind "$PRIVATE/ray" "$PRIVATE/tmp/ray"; fi
mount --rbind "$PRIVATE/tmp" /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
touch "$PRIVATE/ready"
set +e
trap : CHLD TERM
while :; do sleep 3600 & wait -n; done
"""


@functools.cache
def trouble() -> str | None:
    """Return why this host permits no machines; None when it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter", "hostname"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (packages iproute2, util-linux, hostname)"
    name = f"probe-{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "netns", "del", name)
        run("unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc", "true")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip() or error}"
    return None


@dataclass
class Machine:
    """One machine: off until it is booted, off again when its power is taken away."""

    number: int
    name: str
    folder: Path  # what is its own: /tmp as `tmp`, /tmp/ray as `ray`, /etc/hosts
    cable: str  # the end of its cable that is outside
    unshare: "subprocess.Popen[bytes] | None" = None
    _running: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return f"10.88.0.{self.number + 1}"

    @property
    def init(self) -> int:
        """The pid of its first process, seen from outside."""
        assert self.unshare is not None, f"{self.name} is off"
        return int((Path("/proc") / str(self.unshare.pid) / f"task/{self.unshare.pid}/children").read_text().split()[0])

    @property
    def inside(self) -> list[str]:
        """The words before a command that run it on this machine, in the folder / and within its ration."""
        enter = ["nsenter", "-t", str(self.init), "--net", "--pid", "--mount", "--uts", "--ipc", "--wd=/"]
        if not (CGROUPS / self.name).is_dir():
            return enter
        return ["bash", "-c", f'echo $$ > {CGROUPS / self.name}/cgroup.procs; exec "$@"', "ration", *enter]

    def boot(self, machines: Sequence["Machine"], scratch: str = "", shared: Sequence[Path] = ()) -> None:
        """Switch it on; it knows the others by name.

        scratch: how much its /tmp/ray holds ("64m"), else the disk's. shared: more of the outer /tmp that it sees.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        for own in ("ray", "tmp"):
            (self.folder / own).mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        lines = ["127.0.0.1 localhost", *(f"{one.address} {one.name}" for one in machines)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        namespaces = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount", "--uts", "--ipc", "--mount-proc"]
        places = [str(place) for place in _shared({self.folder.parent, *shared})]
        self.unshare = subprocess.Popen(
            ["nsenter", f"--net=/var/run/netns/{self.name}", *namespaces, "bash", "-c", INIT, "init", *places],
            env={**os.environ, "NODE": self.name, "PRIVATE": str(self.folder), "SCRATCH": scratch},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        until((self.folder / "ready").exists)

    def exec(
        self, argv: Sequence[str], out: IO[bytes] | None = None, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on it; it is killed with its machine at the latest."""
        process = subprocess.Popen(
            [*self.inside, *argv],
            env=_environment(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out is not None else None,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def ask(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """Return the output of a command on it, which must succeed."""
        done = self.call(argv, env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def call(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, seconds: float = COMMAND_SECONDS
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on it."""
        return subprocess.run(
            [*self.inside, *argv],
            env=_environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def kill(self) -> None:
        """Take its power away."""
        if self.unshare is not None:
            with suppress(IndexError, OSError):  # it has died
                os.kill(self.init, signal.SIGKILL)
            self.unshare.kill()
            self.unshare.wait()
            self.unshare = None

    def cut(self) -> None:
        """Pull its cable, without notice to any process."""
        run("ip", "-n", self.name, "link", "set", "eth0", "down")

    def heal(self) -> None:
        """Put the cable back."""
        run("ip", "-n", self.name, "link", "set", "eth0", "up")

    def narrow(self, mbit_per_second: float) -> None:
        """Limit the rate of its cable, in each direction."""
        rate = ["root", "tbf", "rate", f"{mbit_per_second}mbit", "burst", "128k", "latency", "200ms"]
        run("tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", *rate)
        run("tc", "qdisc", "replace", "dev", self.cable, *rate)

    def lose(self, share: float) -> None:
        """Drop this share of the packets that arrive at it; 0: none."""
        run("tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "clsact")
        run("tc", "-n", self.name, "filter", "del", "dev", "eth0", "ingress")
        if share:
            # tc's own netem is missing from many kernels. A program of four instructions is not: load a random number
            # of 32 bits; is it large enough?; then pass (0); else drop (2).
            code = f"4,32 0 0 4294963256,53 0 1 {min(round(share * 2**32), 2**32 - 1)},6 0 0 0,6 0 0 2"
            run("tc", "-n", self.name, "filter", "add", "dev", "eth0", "ingress", "bpf", "da", "bytecode", code)

    def ration(self, cores: float) -> None:
        """Limit all that starts on it from now on to the time of this many CPUs."""
        group = CGROUPS / self.name
        group.mkdir(exist_ok=True)
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
        (group / "cpu.cfs_quota_us").write_text(str(round(cores * PERIOD_MICROSECONDS)))

    def close(self) -> None:
        """Switch it off and take it from the network."""
        self.kill()
        for process in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)  # its machine is gone, so it is, too
        # The cable's other end goes with it; the namespace alone may linger until its last process is reaped.
        subprocess.run(["ip", "link", "del", self.cable], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        with suppress(OSError):
            (CGROUPS / self.name).rmdir()


@contextmanager
def network(folder: Path, count: int) -> Iterator[list[Machine]]:
    """Yield `count` machines with cables between them, all off; skip the test where the host permits none.

    folder: of the machines' private files; with a short path, for Ray's sockets.
    """
    if (reason := trouble()) is not None:
        pytest.skip(reason)
    prefix = f"o{os.getpid() % 100_000}{time.monotonic_ns() % 1000:03d}"
    made: list[Machine] = []
    try:
        run("ip", "link", "add", f"{prefix}br", "type", "bridge")
        run("ip", "link", "set", f"{prefix}br", "up")
        for number in range(count):
            machine = Machine(number, f"{prefix}n{number}", folder / f"node-{number}", f"{prefix}v{number}")
            made.append(machine)
            _wire(machine, f"{prefix}br")
        yield made
    finally:
        for machine in reversed(made):
            machine.close()
        subprocess.run(["ip", "link", "del", f"{prefix}br"], check=False, capture_output=True)


def _shared(places: set[Path]) -> list[Path]:
    """Return the folders of /tmp that all machines share, without those inside another one."""
    needed = places | SHARED | {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
    resolved = {place for place in (one.resolve() for one in needed) if place.is_relative_to(TMP)}
    return sorted(place for place in resolved if resolved.isdisjoint(place.parents))


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """Return this process's environment for a command on a machine, which has a temporary folder of its own."""
    inherited = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    return {**inherited, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **(more or {})}


def _wire(machine: Machine, bridge: str) -> None:
    name = machine.name
    run("ip", "netns", "add", name)
    run("ip", "link", "add", machine.cable, "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", machine.cable, "master", bridge, "up")
    run("ip", "-n", name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
    run("ip", "-n", name, "link", "set", "eth0", "up")
    run("ip", "-n", name, "link", "set", "lo", "up")


def run(*argv: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(argv, check=True, capture_output=True, text=True, timeout=COMMAND_SECONDS)
