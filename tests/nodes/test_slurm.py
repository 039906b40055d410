"""cluster/slurm on a real Slurm of three nodes: exit statuses, ends without leftovers, preemption, lost nodes."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.drills import checks, stage
from tests.nodes.scenes import flags
from tests.support import slurm as slurms
from tests.support.launched import ROOT, process_tree, title, until
from tests.support.machines import Machine
from tests.support.nodes import HEALTH
from tests.support.slurm import ENDED, Slurm

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]

SCRIPT = ROOT / "cluster" / "slurm" / "train.sbatch"
# The third node has two, so that two jobs can share it.
CPUS = (1, 1, 2)
PATIENCE_SECONDS = 240.0
_RAY = re.compile(r"ray::|raylet|gcs_server|site-packages/ray|bin/ray ")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """Yield three idle nodes."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurms.cluster(Path(folder), CPUS) as made:
        yield made


@dataclass
class Job(stage.Run):
    """A job of cluster/slurm/train.sbatch, and the run that it trains, if it trains one."""

    slurm: Slurm = field(kw_only=True)
    number: int = 0

    def begin(self, options: tuple[str, ...], command: tuple[str, ...], script: Path = SCRIPT) -> None:
        """Submit the job."""
        self.storage.mkdir(parents=True, exist_ok=True)
        environment = {
            **HEALTH,
            "ORCHESTRATOR_RUNS": str(self.storage),
            "TRAIN_SCRATCH": "/tmp/ray",  # where `leftovers` looks
            "TRAIN_STORE_MB": "100",
        }
        output = f"--output={self.storage}/job-%j.log"
        self.number = self.slurm.submit([output, *options, str(script), *command], environment)

    @property
    def said(self) -> str:
        """The output of the job and its nodes; of an array, of all its jobs."""
        logs = sorted(self.storage.glob("job-*.log"))
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def await_that(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition, which must hold before the job ends."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            state = self.slurm.job(self.number)["JobState"]
            assert state not in ENDED and time.monotonic() < deadline, f"{what}: {state}: {self.said[-4000:]}"
            time.sleep(0.5)

    def end(self) -> tuple[str, str]:
        """Wait for its end; return its state and exit code, as Slurm prints them."""
        record = self.slurm.ended(self.number, PATIENCE_SECONDS)
        self.slurm.await_idle(PATIENCE_SECONDS)
        return record["JobState"], record["ExitCode"]

    def steps(self, since: float = 0.0) -> bool:
        """Return whether both workers took a step, in a group that began after `since`."""
        events = [event for event in self.events() if event.time > since]
        starts = [number for number, event in enumerate(events) if event.kind == "started"]
        return bool(starts) and any(event.kind in stage.STEPPED for event in events[starts[-1] :])

    def machines_that_train(self) -> list[Machine]:
        """Return the machines of its workers."""
        return [machine for machine in self.slurm.machines if any(stage.WORKER in one for one in titles(machine))]


@pytest.fixture
def job(slurm: Slurm, tmp_path: Path) -> Iterator[Job]:
    """Yield a job that is not submitted yet; cancel it at the end."""
    made = Job(stage.Cluster(0, {}), tmp_path / "runs", (), slurm=slurm)
    yield made
    if made.number:
        slurm.call("scancel", "--quiet", str(made.number))
    for machine in slurm.machines:
        if machine.unshare is None:
            slurm.start(machine.number)
    slurm.await_idle(PATIENCE_SECONDS)


def train(*more: str, epochs: int, checkpoint_seconds: float = 3600.0) -> tuple[str, ...]:
    """Return a command that trains with two workers."""
    words = flags(2, *more, epochs=epochs, checkpoint_seconds=checkpoint_seconds)
    return ("python", "jobs/train.py", *words)


def titles(machine: Machine) -> list[str]:
    """Return the titles of the processes of a machine."""
    return [title(pid) for pid in process_tree(machine.init)] if machine.unshare is not None else []


def leftovers(job: Job) -> list[str]:
    """Return what an ended job has left: files with its token, Ray's files and processes.

    Machines that are off are left out.
    """
    left = [str(path) for folder in job.storage.glob(".slurm*") for path in (folder, *folder.rglob("*"))]
    for machine in (one for one in job.slurm.machines if one.unshare is not None):
        left += [str(path) for path in (machine.folder / "ray").glob("ray-*")]
        left += [one for one in titles(machine) if _RAY.search(one)]
    return left


# ------------------------------------------------------------------ ends
def test_a_job_trains_on_two_nodes_and_is_completed(slurm: Slurm, job: Job) -> None:
    began = time.monotonic()
    job.begin(("--nodes=2", f"--exclude={slurm.machines[2].name}"), train(epochs=2))
    job.await_that((job.storage / ".slurm" / str(job.number) / "token").exists, "a token")
    for path, mode in ((".slurm", 0o700), (f".slurm/{job.number}", 0o700), (f".slurm/{job.number}/token", 0o600)):
        assert (job.storage / path).stat().st_mode & 0o777 == mode, path
    token = (job.storage / ".slurm" / str(job.number) / "token").read_text()
    job.await_that(lambda: len(job.machines_that_train()) == 2, "workers on both nodes")
    assert not any(token in one for machine in slurm.machines for one in titles(machine))
    assert job.end() == ("COMPLETED", "0:0"), job.said
    print(f"completed after {time.monotonic() - began:.0f} s")
    assert not leftovers(job)
    assert [event.values["workers"] for event in job.events("started")] == [2]
    assert not job.events("incident")
    assert not checks.audited(job)


CLUSTERS = """
import os, sys, time, ray
ray.init(log_to_driver=False)
print("nodes", len(ray.nodes()), "cpus", ray.cluster_resources()["CPU"])
time.sleep(20)
sys.exit(int(os.environ["SLURM_ARRAY_TASK_ID"]))
"""


def test_jobs_of_an_array_share_a_node_and_keep_their_exit_statuses(slurm: Slurm, job: Job, tmp_path: Path) -> None:
    script = tmp_path / "shared.sbatch"
    script.write_text(SCRIPT.read_text().replace("#SBATCH --exclusive\n", ""))
    options = ("--nodes=1", "--array=3-4", "--cpus-per-task=1", f"--nodelist={slurm.machines[2].name}")
    job.begin(options, ("python", "-c", CLUSTERS), script)
    tasks = [f"{job.number}_{task}" for task in (3, 4)]
    job.await_that(lambda: all(slurm.job(task).get("JobState") == "RUNNING" for task in tasks), "both running")
    ends = [slurm.ended(task, PATIENCE_SECONDS) for task in tasks]
    slurm.await_idle(PATIENCE_SECONDS)
    assert [(end["JobState"], end["ExitCode"]) for end in ends] == [("FAILED", "3:0"), ("FAILED", "4:0")], job.said
    assert job.said.count("nodes 1 cpus 1.0") == 2
    assert not leftovers(job)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"TRAIN_VENV": "/nowhere"}, "/nowhere has no python with Ray"),
        ({"ORCHESTRATOR_RUNS": "runs"}, "must be an absolute path or a URL, got runs"),
        ({"TRAIN_INTERFACE": "ib7"}, "no address of .* that other nodes see"),
    ],
)
def test_an_impossible_setting_is_one_line(slurm: Slurm, job: Job, changed: dict[str, str], message: str) -> None:
    assign = [f"{name}={value}" for name, value in changed.items()]
    job.storage.mkdir(parents=True)
    words = ["--nodes=1", f"--output={job.storage}/job-%j.log", f"--export=ALL,{','.join(assign)}", str(SCRIPT), "true"]
    job.number = slurm.submit(words, {"ORCHESTRATOR_RUNS": str(job.storage), **changed})
    assert job.end() == ("FAILED", "2:0")
    assert re.search(f"train.sbatch: error: .*{message}", job.said), job.said
    assert not leftovers(job)


def test_the_script_outside_of_slurm_is_an_error(slurm: Slurm) -> None:
    done = slurm.machines[0].call(["bash", str(SCRIPT), "true"])
    assert done.returncode == 2
    assert "this is no job of Slurm's" in done.stderr


# ------------------------------------------------------------------ stopped, preempted
def test_scancel_lets_the_run_save_and_leaves_nothing(slurm: Slurm, job: Job) -> None:
    job.begin(("--nodes=2", f"--exclude={slurm.machines[2].name}"), train(epochs=100_000))
    job.await_that(job.steps, "a step")
    assert not job.committed()
    asked = time.monotonic()
    slurm.call("scancel", str(job.number))
    state, _ = job.end()
    print(f"gone {time.monotonic() - asked:.0f} s after scancel")
    assert state == "CANCELLED"
    assert not leftovers(job)
    if slurms.tells_first_only():  # otherwise Slurm ends the workers before they can save
        assert job.committed(), job.said
        assert "the command has ended with 143" in job.said


def test_a_preempted_job_saves_and_resumes_later(slurm: Slurm, job: Job) -> None:
    epochs = 20
    job.begin(("--nodes=2", f"--exclude={slurm.machines[2].name}"), train(epochs=epochs))
    job.await_that(job.steps, "a step")
    asked = time.monotonic()
    urgent = slurm.submit(["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 8"])
    job.await_that(lambda: slurm.job(urgent)["JobState"] == "RUNNING", "the other job")
    print(f"the nodes were free {time.monotonic() - asked:.0f} s after others wanted them")
    assert not leftovers(job)
    assert job.end() == ("COMPLETED", "0:0"), job.said
    assert slurm.job(job.number)["Restarts"] == "1"
    starts = job.events("started")
    if slurms.tells_first_only():
        assert not job.events("incident")
        assert [(event.samples or 0) > 0 for event in starts] == [False, True], job.said
    assert not checks.audited(job)


def test_a_job_whose_time_is_nearly_over_saves_and_is_requeued(slurm: Slurm, job: Job) -> None:
    job.begin(("--nodes=2", f"--exclude={slurm.machines[2].name}"), train(epochs=20))
    job.await_that(job.steps, "a step")
    # As Slurm does before the end, by --signal.
    slurm.call("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.end() == ("COMPLETED", "0:0"), job.said
    assert slurm.job(job.number)["Restarts"] == "1"
    assert "requeued: the same command resumes from its last checkpoint" in job.said
    assert not job.events("incident")
    assert [(event.samples or 0) > 0 for event in job.events("started")] == [False, True], job.said
    assert not leftovers(job)
    assert not checks.audited(job)


def test_a_port_in_use_is_named_and_ends_the_job(slurm: Slurm, job: Job) -> None:
    machine, port = slurm.machines[2], 7123
    listener = machine.exec([sys.executable, "-m", "http.server", str(port)])
    try:
        until(lambda: machine.call(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"]).returncode == 0, 30, 0.2)
        job.storage.mkdir(parents=True)
        words = ["--nodes=1", f"--nodelist={machine.name}", f"--output={job.storage}/job-%j.log", str(SCRIPT), "true"]
        job.number = slurm.submit(words, {"ORCHESTRATOR_RUNS": str(job.storage), "TRAIN_PORT": str(port)})
        assert job.end() == ("FAILED", "1:0"), job.said
        assert f"port {port} is in use, by another job or user: choose others with TRAIN_PORT" in job.said
    finally:
        listener.kill()
    assert not leftovers(job)


# ------------------------------------------------------------------ lost nodes
def test_a_job_survives_a_lost_node_and_the_run_continues_elsewhere(slurm: Slurm, job: Job) -> None:
    job.begin(("--nodes=3",), train(epochs=100_000, checkpoint_seconds=1.0))
    job.await_that(lambda: job.steps() and job.committed(), "a checkpoint")
    victim = next(machine for machine in job.machines_that_train() if machine.number > 0)
    victim.kill()
    lost = time.time()
    job.await_that(lambda: job.steps(lost), "a step after the loss")
    print(f"training again {time.time() - lost:.0f} s after a node was lost")
    until(lambda: slurm.state_of_node(victim.number).startswith("down"), PATIENCE_SECONDS, 1.0)
    print(f"Slurm calls it down after {time.time() - lost:.0f} s")
    known = time.time()
    job.await_that(lambda: any(event.time > known for event in job.events()), "training beside a node that is down")
    slurm.call("scancel", "--batch", "--signal=INT", str(job.number))
    ended = slurm.ended(job.number, PATIENCE_SECONDS)
    assert (ended["JobState"], ended["ExitCode"]) in (("FAILED", "143:0"), ("FAILED", "0:15")), job.said
    assert not checks.audited(job)


# Workers without a head keep training until their node gives it up, after a minute.
@pytest.mark.parametrize(("what", "epochs"), [("its node", 200), ("Ray there", 60)])
def test_a_job_that_loses_its_head_is_requeued_and_resumes(slurm: Slurm, job: Job, what: str, epochs: int) -> None:
    job.begin(("--nodes=2", f"--exclude={slurm.machines[0].name}"), train(epochs=epochs, checkpoint_seconds=1.0))
    job.await_that(lambda: job.steps() and job.committed(), "a checkpoint")
    first = slurm.job(job.number)["BatchHost"]
    machine = next(one for one in slurm.machines if one.name == first)
    if what == "its node":
        machine.kill()  # with it train.sbatch and the driver
    else:
        (head,) = [pid for pid in process_tree(machine.init) if "gcs_server" in title(pid).split(" ")[0]]
        os.kill(head, signal.SIGKILL)
    lost = time.monotonic()
    job.await_that(lambda: slurm.job(job.number)["JobState"] == "PENDING", "requeued")
    print(f"requeued {time.monotonic() - lost:.0f} s after {what} was lost")
    time.sleep(5)  # no node has anything of it
    assert not leftovers(job)
    if what == "its node":
        slurm.start(machine.number)
    else:
        assert "Ray on the first node has ended, and with it the cluster" in job.said
    assert job.end() == ("COMPLETED", "0:0"), job.said
    print(f"completed {time.monotonic() - lost:.0f} s after it")
    assert slurm.job(job.number)["Restarts"] == "1"
    assert [(event.samples or 0) > 0 for event in job.events("started")] == [False, True], job.said
    assert not leftovers(job)
    assert not checks.audited(job)
