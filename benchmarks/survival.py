"""SIGKILL of a worker: seconds until steps are taken again, samples replayed, and whether the journal says the same.

One worker and two, on a Ray cluster of their own. Watched from outside: the moment of the kill against the moment at
which the first journal event of a new step is on disk, or was made; the newest checkpoint at the kill.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks import frame
from benchmarks.frame import Figure
from orchestrator.tracking.events import Event
from tests.drills import recipes, stage
from tests.drills.stage import Run, send

KILLS = 3
TRAINING_SECONDS = 3.0  # between steps being taken again and the next kill
GOAL_SECONDS = 12.0
# The journal counts from the last sign of life, which is older than the kill, and is written every so often.
AGREE_SECONDS = 3.0
EPOCHS = 400  # more than the kills need; the run is ended then


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-survival`."""
    with stage.cluster() as cluster:
        for ranks in (1, 2):
            words = recipes.flags(EPOCHS, ranks=ranks)
            with recipes.submitted(cluster, Path(folder) / f"survival-{ranks}", words) as run:
                run.wait(lambda run=run: bool(run.committed()), "a checkpoint")  # type: ignore[misc]
                kills = [_kill(run, f"{ranks} worker(s), kill {number + 1} of {KILLS}") for number in range(KILLS)]
            name = f"survival.{ranks}-worker"
            yield Figure(f"{name}.seconds_to_train_again", median(one.seconds for one in kills), at_most=GOAL_SECONDS)
            yield Figure(f"{name}.worst_seconds", max(one.seconds for one in kills))
            yield Figure(f"{name}.samples_replayed", max(one.replayed for one in kills))
            yield Figure(f"{name}.replayed/since_checkpoint", max(one.replay_share for one in kills), at_most=1.0)
            yield Figure(f"{name}.journal_off_seconds", max(one.off for one in kills), at_most=AGREE_SECONDS)


class Kill:
    """One kill, seen from outside and as the journal has it."""

    def __init__(self, moment: float, checkpoint: int, step: Event, incident: Event) -> None:
        self.seconds = step.time - moment
        self.replayed = _number(incident, "samples_replayed")
        # The incident has where training resumed, and how far it had come before; the checkpoint is seen from outside.
        since_checkpoint = (incident.samples or 0) + self.replayed - checkpoint
        self.replay_share = self.replayed / max(1.0, since_checkpoint)
        reported = _number(incident, "seconds_to_detect") + _number(incident, "seconds_to_restart")
        self.off = abs(reported - self.seconds)


def _kill(run: Run, what: str) -> Kill:
    """Kill a worker and wait until steps are taken again."""
    time.sleep(TRAINING_SECONDS)
    known = len(run.events("incident"))
    pid = run.workers()[-1]
    # Taken before the kill: the checkpoint may only get newer, and what is replayed only less.
    checkpoint = run.committed()[0].samples
    assert send(pid, signal.SIGKILL), f"worker {pid} is gone"
    moment = time.time()
    step = run.await_steps_after(moment)
    (incident,) = run.events("incident")[known:]
    found = Kill(moment, checkpoint, step, incident)
    frame.progress(
        f"{what}: {found.seconds:.1f} s, {found.replayed:g} samples replayed: {incident.values.get('cause')}"
    )
    return found


def _number(event: Event, name: str) -> float:
    value = event.values.get(name)
    assert isinstance(value, int | float), f"incident without {name}: {event.values}"
    return float(value)
