"""Seven equal members on a cluster of two one-core slots against four waves of the bare run: `make bench-fleet`.

The bare run is the same training, validations and checkpoints included, in a plain process with no cluster, driver or
tracking. It is timed under the load that a member has: two of them side by side, since members share memory and caches
with a neighbour. From the fleet's first step on, the two of them and the fleet have the machine in turns of some
seconds (benchmarks/turns.py), so that its slow spells meet both; what stands still does not count. Its seconds run from
its first step to its end, and the plan's own bound is made of them.

The training phase runs from the first member's first step to the last member's end: the starts of later waves are in
it. The first start, and what starts take in all, are reported apart.

`python -m benchmarks.fleet --seconds 20` tries it with members of 20 s, which are mostly start.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from benchmarks import bare, frame, turns
from benchmarks.frame import Figure
from benchmarks.turns import Side, Stopwatch
from orchestrator.data import manifest
from orchestrator.data.build.sources import digits
from orchestrator.ensemble import members
from orchestrator.ensemble.members import EnsembleConfig
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import googlenet_digits, googlenet_tiny
from orchestrator.tracking import journal
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_journal_dir
from tests.drills import stage
from tests.support.launched import until

MEMBERS, SLOTS = 7, 2
# Of a member, as calibrated: at least three minutes are wanted, and the machine may be faster afterwards.
SECONDS = 225.0
CALIBRATION_EPOCHS = 16  # the first ones are slower
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 240.0  # beyond what training should take
# Bare runs take a quarter of what the fleet does: with these turns they last about as long.
FLEET_TURN_SECONDS, BARE_TURN_SECONDS = 17.0, 4.0
GOAL = 1.10


class Times(NamedTuple):
    """Moments of a run, in seconds of the fleet's own clock, which stands still while it is the bare runs' turn."""

    begun: float  # its lease was taken, or its process started
    started: float  # ready for its first step
    finished: float  # its last word
    released: float  # its slot is free


def figures(folder: str, seconds: float = SECONDS) -> Iterator[Figure]:
    """The figures of `make bench-fleet`."""
    place = Path(folder) / "fleet"
    data = place / "data"
    digits.pack_digits(str(data))
    each = _bare(place / "calibration", data, CALIBRATION_EPOCHS) / CALIBRATION_EPOCHS
    epochs = max(2, math.ceil(seconds / each))
    frame.progress(f"members of {epochs} epochs, about {epochs * each:.0f} s each")
    jobs = _jobs(place / "bare", data, epochs)
    with _standing_by(place / "bare", jobs) as alone:
        began = time.time()
        with stage.cluster(SLOTS) as cluster:
            up = time.time()
            fleet = _driver(place, data, epochs, cluster, alone, PATIENCE_SECONDS + 10 * epochs * each)
            ended = fleet.until(time.time())
        alone_s = _seconds(place / "bare", jobs, alone, PATIENCE_SECONDS + 3 * epochs * each)
    yield Figure("fleet.bare_s", alone_s)
    times = sorted(_times(run, fleet) for run in (place / "runs" / "models").glob("*"))
    if len(times) != MEMBERS:
        raise RuntimeError(f"{len(times)} runs, where {MEMBERS} are expected")
    bound = _bound(_specs(place, data, epochs), alone_s)
    phase = max(one.finished for one in times) - min(one.started for one in times)
    yield Figure("fleet.bound_s", bound)
    yield Figure("fleet.training_phase_s", phase)
    yield Figure("fleet.training_phase/bound", phase / bound, at_most=GOAL)
    yield Figure("fleet.member.training_s", median(one.finished - one.started for one in times))
    yield Figure("fleet.member.start_s", median(one.started - one.begun for one in times))
    yield Figure("fleet.member.end_s", median(one.released - one.finished for one in times))
    yield Figure("fleet.member/bare", median(one.finished - one.started for one in times) / alone_s)
    yield Figure("fleet.first_start_s", min(one.started for one in times) - fleet.until(up))
    yield Figure("fleet.cluster_start_s", up - began)
    yield Figure("fleet.whole/bound", (ended - fleet.until(up)) / bound)


def _bound(specs: list[RunSpec], seconds: float) -> float:
    """The plan's makespan for runs that take equally long, which no other plan betters."""
    # Not imported above: Ray reads its switches when it is imported, and the driver, which is this module, sets them.
    from orchestrator.ray_backend import cluster
    from orchestrator.scheduler import run_plan

    capacity = cluster.ClusterCapacity((cluster.Node(SLOTS, 0),))
    return float(run_plan.plan_runs(specs, capacity, 0, [seconds] * len(specs)).makespan)


def _recipes(epochs: int) -> tuple[Recipe, ...]:
    """Members of equal work, which differ in their seeds."""
    base = googlenet_tiny().model_copy(update={"name": "fleet", "epochs": epochs, "model": googlenet_digits().model})
    return members.build_recipes(base, EnsembleConfig(members=MEMBERS, wider=1.0, vary_crops=False))


def _specs(place: Path, data: Path, epochs: int) -> list[RunSpec]:
    digest = manifest.load(str(data)).digest()
    destination = _destination(place, data)
    return [
        RunSpec(recipe=recipe, placement=Placement(), destination=destination, dataset_digest=digest)
        for recipe in _recipes(epochs)
    ]


def _destination(place: Path, data: Path) -> Destination:
    return Destination(data=str(data), storage=str(place / "runs")).resolve()


def _times(folder: Path, fleet: Stopwatch) -> Times:
    """The moments of a run that finished in its first attempt."""
    events, _ = journal.read_events(get_journal_dir(str(folder)))
    moments = {event.kind: event.time for event in events}
    if "finished" not in moments or (folder / "attempts" / "000002.json").exists():
        raise RuntimeError(f"{folder}: not finished in its first attempt")
    lease, released = folder / "lease" / "000001.json", folder / "lease" / "000001.released"
    found = (lease.stat().st_mtime, moments["started"], moments["finished"], released.stat().st_mtime)
    return Times(*(fleet.until(moment) for moment in found))


# ------------------------------------------------------------------ in processes of their own
class Alone(NamedTuple):
    """Bare runs that have the machine when the fleet has not."""

    runs: bare.Runs
    side: Side


def _jobs(place: Path, data: Path, epochs: int) -> list[TrainJob]:
    """As many bare trainings as there are slots, with the seeds of the first members."""
    return [
        TrainJob(
            recipe=spec.recipe,
            data=str(data),
            dataset_digest=spec.dataset_digest,
            folder=str(place / str(number)),
            stop_flag=str(place / "stop"),
        )
        for number, spec in enumerate(_specs(place, data, epochs)[:SLOTS])
    ]


def _bare(place: Path, data: Path, epochs: int) -> float:
    """Seconds of training of a bare run beside another one; the mean of both."""
    return mean(bare.side_by_side(place, _jobs(place, data, epochs), PATIENCE_SECONDS))


@contextmanager
def _standing_by(place: Path, jobs: list[TrainJob]) -> Iterator[Alone]:
    """Bare runs that have been started, and stopped at their first steps."""
    with bare.begun(place, jobs) as runs:
        side = Side(lambda: [run.pid for run in runs if run.poll() is None])
        until(lambda: all(bare.has_started(job.folder) for job in jobs), PATIENCE_SECONDS)
        side.stop()
        yield Alone(runs, side)


def _seconds(place: Path, jobs: list[TrainJob], alone: Alone, patience: float) -> float:
    """Wait for the end of bare runs; seconds of training, the mean of all."""
    bare.ended(place, alone.runs, patience)
    found = [alone.side.watch.between(*bare.span(job)) for job in jobs]
    frame.progress("bare runs, in their turns: " + ", ".join(f"{one:.1f} s" for one in found))
    return mean(found)


def _driver(
    place: Path, data: Path, epochs: int, cluster: stage.Cluster, alone: Alone, patience: float
) -> Stopwatch:  # fmt: skip
    """Train the members as the job does, without scoring them, in turns with the bare runs; the fleet's clock."""
    log = place / "driver.log"
    words = ("--fleet", str(place), str(data), str(epochs))
    driver = bare.process("benchmarks.fleet", *words, log=log, environment=cluster.environment)
    fleet = Side(lambda: [cluster.pid, *([driver.pid] if driver.poll() is None else [])])
    try:
        until(lambda: _begun(place) or driver.poll() is not None, PATIENCE_SECONDS, LOOK_SECONDS)
        with turns.taken(fleet, FLEET_TURN_SECONDS, alone.side, BARE_TURN_SECONDS):
            if driver.wait(patience):
                raise RuntimeError(f"the fleet ended with status {driver.returncode}: {bare.tail([log])}")
    finally:
        driver.kill()
        driver.wait()
    return fleet.watch


def _begun(place: Path) -> bool:
    """Return whether a member is at its first step."""
    return any(bare.has_started(str(run)) for run in (place / "runs" / "models").glob("*"))


def drive(place: Path, data: Path, epochs: int) -> int:
    """Train the members on the cluster at hand; the exit status."""
    from orchestrator.ray_backend import ray_env

    ray_env.configure_ray_or_exit("benchmarks.fleet", _destination(place, data), Placement())
    from orchestrator.cli import exit_status
    from orchestrator.ray_backend import session
    from orchestrator.scheduler import multi_run

    with session.open_session(_destination(place, data), Placement(), exit_status.make_console()) as opened:
        result = multi_run.train_runs(opened, _specs(place, data, epochs))
        return 0 if [each.status for each in result.results.values()] == ["finished"] * MEMBERS else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fleet"]:
        raise SystemExit(drive(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
    wanted = float(sys.argv[2]) if sys.argv[1:2] == ["--seconds"] else SECONDS
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        raise SystemExit(frame.report(figures(scratch, wanted)))
