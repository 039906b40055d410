"""A real Slurm on machines of a network: its controller on the first, a node on each. Debian's packages, as they are.

Processes are tracked as on real clusters, by cgroups, where the kernel has their first version; that decides whom Slurm
sends its signals: the first process of a step, or all. Everything lies in one folder and ends with the machines.
"""

import functools
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import machines
from tests.support.launched import ROOT, until
from tests.support.machines import Machine, network

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
START_SECONDS = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# Below what each machine has for itself: one setting, and yet a socket for each.
SOCKET = "/tmp/ray/munge.socket"
FREEZER = Path("/sys/fs/cgroup/freezer")
# A requeued job waits for cred_expire to be over, 2 minutes by default; a silent node is DOWN after SlurmdTimeout, by
# default 5 minutes. Jobs of the partition `urgent` preempt those of the other, which have a grace time.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=30
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId={first}
{nodes}
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@functools.cache
def trouble() -> str | None:
    """Return why Slurm cannot run here; None when it can."""
    if (reason := machines.trouble()) is not None:
        return reason
    if missing := [package for program, package in PACKAGES.items() if shutil.which(program) is None]:
        return f"Slurm is not installed: apt-get install -y --no-install-recommends {' '.join(missing)}"
    return None


def tells_first_only() -> bool:
    """Return whether this Slurm sends signals to the first process of a step alone."""
    return (FREEZER / "release_agent").exists()


@dataclass
class Slurm:
    """A controller and its nodes; commands run on the first machine."""

    machines: list[Machine]
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its programs."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self, number: int) -> None:
        """Switch a machine on and have it join."""
        machine = self.machines[number]
        machine.boot(self.machines)
        daemons = {
            "munged": [
                "--foreground", f"--socket={SOCKET}", f"--key-file={self.folder / 'munge.key'}",
                "--pid-file=/tmp/ray/munge.pid", "--seed-file=/tmp/ray/munge.seed", "--log-file=/tmp/ray/munge.log",
            ],
            "slurmctld": ["-D"],
            "slurmd": ["-D", "-N", machine.name],
        }  # fmt: skip
        for name, words in daemons.items():
            if name != "slurmctld" or number == 0:
                with open(self.folder / f"{name}.{number}.log", "ab") as log:
                    machine.exec([name, *words], out=log, env=self.environment)
            if name == "munged":
                until((machine.folder / "ray" / Path(SOCKET).name).exists, START_SECONDS, 0.1)

    def state_of_node(self, number: int) -> str:
        """Return a state such as idle, allocated, down*; empty while the controller does not answer."""
        machine = self.machines[number]
        done = self.call("sinfo", "--noheader", f"--nodes={machine.name}", "--partition=usual", "--format=%T")
        return done.strip()

    def call(self, *argv: str, env: Mapping[str, str] | None = None) -> str:
        """Return the output of a command of Slurm's; empty when it fails."""
        done = self.machines[0].call(argv, {**self.environment, **(env or {})})
        return done.stdout if done.returncode == 0 else ""

    def submit(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        """Submit from the clone's folder; return the job's number."""
        argv = ["env", "-C", str(ROOT), "sbatch", "--parsable", *words]
        return int(self.machines[0].ask(argv, {**self.environment, **(env or {})}))

    def job(self, number: int | str) -> dict[str, str]:
        """Return Slurm's record of a job, or of one of an array (`12_3`): JobState, ExitCode, Restarts and so on."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "--oneliner", str(number))))

    def ended(self, number: int | str, seconds: float) -> dict[str, str]:
        """Wait for a job's end; return Slurm's record of it."""
        until(lambda: self.job(number).get("JobState") in ENDED, seconds, 1.0)
        return self.job(number)

    def await_idle(self, seconds: float) -> None:
        """Wait until no node runs anything of a job."""
        numbers = range(len(self.machines))
        until(lambda: all(self.state_of_node(number) == "idle" for number in numbers), seconds, 0.5)


@contextmanager
def cluster(folder: Path, cpus: Sequence[int]) -> Iterator[Slurm]:
    """Start a Slurm with these CPUs by node; skip the test where it cannot run.

    folder: of all its files; with a short path, for the sockets below it.
    """
    if (reason := trouble()) is not None:
        pytest.skip(reason)
    with network(folder, len(cpus)) as made:
        slurm = Slurm(made, folder)
        _configure(slurm, cpus)
        try:
            for number in range(len(cpus)):
                slurm.start(number)
            slurm.await_idle(START_SECONDS)
            yield slurm
        finally:
            for machine in made:
                machine.kill()
                _forget_cgroups(machine)


def _configure(slurm: Slurm, cpus: Sequence[int]) -> None:
    folder = slurm.folder
    folder.chmod(0o711)  # munge asks that others can reach its socket
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    (folder / "state").mkdir()
    lines = []
    for machine, count in zip(slurm.machines, cpus, strict=True):
        (folder / f"spool.{machine.name}").mkdir()
        lines.append(f"NodeName={machine.name} NodeAddr={machine.address} CPUs={count} RealMemory=1000")
    text = CONFIGURATION.format(
        controller=f"{slurm.machines[0].name}({slurm.machines[0].address})",
        socket=SOCKET,
        folder=folder,
        tracking="cgroup" if tells_first_only() else "linuxproc",
        first=os.getpid() % 10_000 * 100 + 1,
        nodes="\n".join(lines),
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")


def _forget_cgroups(machine: Machine) -> None:
    """Remove the cgroups that Slurm made; nothing is in them any more."""
    for folder, _, _ in os.walk(FREEZER / f"slurm_{machine.name}", topdown=False):
        with suppress(OSError):
            os.rmdir(folder)
