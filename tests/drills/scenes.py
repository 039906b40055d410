"""The drills by name. Each yields a report per fault and raises other errors."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.checkpoint.checkpoint import FinalWeights
from tests.drills import checks, ensembles, recipes
from tests.drills.checks import Report
from tests.drills.faults import Hit, kill_worker
from tests.drills.stage import PATIENCE_SECONDS, Cluster, Run, Stuck, send
from tests.support.runs import farthest, identical

# Shares of the random drill's faults.
SHARES = {"worker": 8, "driver": 4, "mid-checkpoint": 4, "suspended-worker": 2, "stop": 2}
EPOCHS = 5
# A lease that was not renewed for 15 s is stale.
SUSPENDED_SECONDS = 20.0
ROOM, LEFT = "48m", 32 * 1024  # of a full storage: all, and the bytes that are free
# Few and small steps: sums of float32 in another order differ by rounding, which training makes larger step by step.
COUNTED_EPOCHS, SMALL_RATE = 2, "--schedule.base-rate=0.001"
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 0.1


class Skipped(Exception):
    """This machine does not permit the drill."""


@dataclass
class Scene:
    """The cluster, folder and random generator that the drills share."""

    cluster: Cluster
    folder: Path
    dice: random.Random
    kills: int
    _expected: dict[tuple[str, ...], FinalWeights] = field(default_factory=dict)

    def expected(self, words: tuple[str, ...]) -> FinalWeights:
        """Return the weights of the undisturbed run of this command, which is run once."""
        if words not in self._expected:
            storage = self.folder / f"undisturbed-{len(self._expected)}"
            self._expected[words] = recipes.undisturbed(self.cluster, storage, words)
        return self._expected[words]

    @contextmanager
    def run(self, name: str, words: tuple[str, ...]) -> Iterator[Run]:
        """Submit a run in a storage of its own."""
        with recipes.submitted(self.cluster, self.folder / name, words) as run:
            yield run


def random_faults(scene: Scene) -> Iterator[Report]:
    """Inject faults of all kinds at random points."""
    faults = [name for name, share in SHARES.items() for _ in range(round(share * scene.kills / sum(SHARES.values())))]
    scene.dice.shuffle(faults)
    words = recipes.flags(recipes.epochs_for(len(faults)))
    expected = scene.expected(words)
    with scene.run("random", words) as run:
        yield from recipes.hit_at_random(run, expected, faults, scene.dice, "random")


def other_counts(scene: Scene) -> Iterator[Report]:
    """Compare one, two and three workers: losses and weights are equal up to rounding."""
    losses, finals = {}, {}
    for ranks in (1, 2, 3):
        with scene.run(f"ranks-{ranks}", recipes.flags(COUNTED_EPOCHS, SMALL_RATE, ranks=ranks)) as run:
            if (ended := run.ended()).status != 0:
                raise Stuck(f"{ranks} workers: the driver ended with {ended.status}: {ended.out[-300:]}")
            losses[ranks] = [float(str(event.values["train/loss"])) for event in run.events("epoch")]
            finals[ranks] = checks.final(run)
    for ranks in (1, 2):
        report = Report(f"counts.{ranks}-against-3")
        if [len(losses[ranks]), len(losses[3])] != [COUNTED_EPOCHS] * 2:
            report.problems.append(f"epochs {losses[ranks]} and {losses[3]}, {COUNTED_EPOCHS} of each expected")
        pairs = zip(losses[ranks], losses[3], strict=False)
        off, far = max(abs(ours - expected) / expected for ours, expected in pairs), farthest(finals[ranks], finals[3])
        if not (off <= LOSS_TOLERANCE and far <= WEIGHT_TOLERANCE):
            report.problems.append(
                f"an epoch's losses differ by {off:.2g}, at most {LOSS_TOLERANCE} allowed; weights by {far:.2g} of "
                f"the largest, at most {WEIGHT_TOLERANCE} allowed"
            )
        yield report


def damaged_checkpoint(scene: Scene) -> Iterator[Report]:
    """Damage the newest checkpoint while no driver runs: it is named and the one before it is used."""
    words = recipes.flags(EPOCHS)
    expected = scene.expected(words)
    with scene.run("damaged", words) as run:
        run.wait(lambda: len(run.committed()) >= 2, "a second checkpoint")
        run.driver.kill()
        hit = Hit("damaged", time.time())
        run.driver.wait()
        _await(lambda: not run.workers(), "the end of the workers")
        newest = run.committed()[0].url
        state = Path(newest) / "state.pt"
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 0xFF
        state.write_bytes(content)
        run.submit()
        report = checks.recovered(run, hit, "damaged")
        passed_over = [str(event.values.get("checkpoints_passed_over")) for event in run.events("incident")]
        if not any(Path(newest).name in text for text in passed_over):
            report.problems.append(f"{Path(newest).name} is not named as passed over: {passed_over}")
        report.problems += checks.whole(run, expected, 1)
        yield report


def lost_ledger(scene: Scene) -> Iterator[Report]:
    """Overwrite Ray's own record of the run, then remove it; kill a rank each time. It is never read."""
    words = recipes.flags(EPOCHS + recipes.EPOCHS_PER_FAULT)
    expected = scene.expected(words)
    with scene.run("ledger", words) as run:
        run.wait(lambda: bool(run.committed()), "a checkpoint")
        for name in ("damaged", "gone"):
            ledgers = list(run.scratch.glob("orchestrator-ray-*"))
            if not ledgers:
                raise Stuck(f"{run.scratch}: Ray's scratch folder is not there")
            for ledger in ledgers:
                _damage(ledger) if name == "damaged" else shutil.rmtree(ledger, ignore_errors=True)
            yield checks.recovered(run, kill_worker(run, scene.dice), f"ledger.{name}")
        yield Report("ledger.whole", problems=checks.whole(run, expected, 2))


def two_submissions(scene: Scene) -> Iterator[Report]:
    """Submit a live run a second time: it fails and names the owner; the first one continues."""
    with scene.run("twice", recipes.flags(EPOCHS)) as run:
        run.await_samples(1)
        first = run.driver
        second = run.submit()
        ended = run.ended(PATIENCE_SECONDS)
        run.drivers.remove(second)
        report = Report("twice")
        if ended.status != 1 or f"process {first.pid} " not in ended.out:
            report.problems.append(f"the second ended with {ended.status}, not naming {first.pid}: {ended.out[-300:]}")
        report.problems += checks.whole(run, scene.expected(recipes.flags(EPOCHS)), 0)
        yield report


def suspended_driver(scene: Scene) -> Iterator[Report]:
    """Suspend a driver until another takes over, and resume it: it writes nothing that counts."""
    # Longer than the take-over takes.
    words = recipes.flags(40)
    expected = scene.expected(words)
    with scene.run("suspended", words) as run:
        run.wait(lambda: bool(run.committed()), "a checkpoint")
        old = run.driver
        send(old.pid, signal.SIGSTOP)
        hit = Hit("suspended-driver", time.time())
        time.sleep(SUSPENDED_SECONDS)
        try:
            run.submit()
            leases = run.folder / "lease"
            run.wait((leases / "000002.json").exists, "a second lease")
            hit = Hit("suspended-driver", time.time(), incidents=0)
            report = checks.recovered(run, hit, "suspended")
        finally:
            send(old.pid, signal.SIGCONT)
        _await(lambda: old.poll() is not None, "the end of the driver that came back")
        if old.returncode == 0:
            report.problems.append("the driver that came back ended with status 0, as if the run were its own")
        report.problems += checks.whole(run, expected, len(run.events("incident")))
        yield report


def full_storage(scene: Scene) -> Iterator[Report]:
    """Fill the storage: the run fails and says so, its last checkpoint stays good; with space it resumes."""
    words = recipes.flags(EPOCHS + 1)
    expected = scene.expected(words)
    with _small(scene.folder / "full") as storage:
        # Everything but the run itself has a place with room, also a driver's long output.
        tracking = f"--tracking=sqlite:///{scene.folder / 'full-mlflow.db'}"
        words = (*words, tracking, "--placement.max-restarts=1")
        with recipes.submitted(scene.cluster, storage, words, scene.folder) as run:
            run.wait(lambda: bool(run.committed()), "a checkpoint")
            ballast = storage / "ballast"
            with ballast.open("wb") as file:
                file.write(b"\0" * max(0, shutil.disk_usage(storage).free - LEFT))
            ended = run.ended(PATIENCE_SECONDS)
            report = Report("full")
            if ended.status != 1 or "No space left" not in ended.out:
                report.problems.append(f"the driver ended with {ended.status} and printed: {ended.out[-300:]}")
            if not run.committed():
                report.problems.append("no checkpoint is left")
            ballast.unlink()
            hit = Hit("full", time.time())
            run.submit()
            report.seconds = run.await_steps_after(hit.time).time - hit.time
            if run.ended().status != 0:
                report.problems.append("it did not finish with room")
            elif not identical(checks.final(run), expected):
                report.problems.append("its final weights are not those of the undisturbed run")
            report.problems += checks.audited(run)
            yield report


@contextmanager
def _small(folder: Path) -> Iterator[Path]:
    """Mount a small file system. Raises Skipped without the right to do so."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "drill", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        raise Skipped(f"no right to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _damage(ledger: Path) -> None:
    for path in ledger.rglob("*"):
        if path.is_file():
            path.write_bytes(b"\0" + path.read_bytes()[::2])


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise Stuck(f"{what} did not come in {PATIENCE_SECONDS:g} s")
        time.sleep(0.1)


def ensemble(scene: Scene) -> Iterator[Report]:
    """Kill the driver of an ensemble of seven in training, then in scoring; the same command finishes."""
    yield from ensembles.killed_twice(scene.cluster, scene.folder / "ensemble")


SCENES: dict[str, Callable[[Scene], Iterator[Report]]] = {
    "twice": two_submissions,
    "damaged": damaged_checkpoint,
    "ledger": lost_ledger,
    "counts": other_counts,
    "full": full_storage,
    "suspended": suspended_driver,
    "ensemble": ensemble,
    "random": random_faults,
}
