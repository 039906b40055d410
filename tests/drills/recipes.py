"""The run of the drills: three ranks on the digits, dropout and augmentation on, long enough to be hit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.checkpoint.checkpoint import FinalWeights
from orchestrator.data import manifest
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET
from orchestrator.recipe.presets import googlenet_tiny
from tests.drills import checks
from tests.drills.checks import Report
from tests.drills.faults import FAULTS
from tests.drills.stage import Cluster, Run, Stuck

RANKS = 3
BATCH = 64
# Between a restart and the next fault, so that each meets steps; and the last one some way before the end.
EPOCHS_PER_FAULT, EPOCHS_AROUND = 2, 2
CHECKPOINT_SECONDS = 1.0
# The others wait this long for a suspended rank.
STEP_SECONDS = 8.0


def flags(epochs: int, *more: str, ranks: int = RANKS) -> tuple[str, ...]:
    """Return the command line of a run that checks for signals every step and saves each second."""
    recipe = googlenet_tiny()
    assert isinstance(recipe.model, GoogLeNetConfig)
    assert recipe.model.dropout > 0 and recipe.augmentation.area[0] < 1, "the drills need dropout and augmentation"
    return (
        recipe.name,
        f"--epochs={epochs}",
        f"--batch-size={BATCH}",
        f"--placement.workers={ranks}",
        "--placement.max-restarts=100",
        f"--cadence.checkpoint-seconds={CHECKPOINT_SECONDS}",
        "--cadence.pulse-steps=1",
        "--cadence.log-steps=1",
        f"--cadence.validate-epochs={epochs}",
        f"--cadence.limits.step-seconds={STEP_SECONDS}",
        *more,
    )


def epochs_for(faults: int) -> int:
    """Return the epochs that a run with this many faults needs."""
    return EPOCHS_PER_FAULT * faults + EPOCHS_AROUND


@contextmanager
def submitted(cluster: Cluster, storage: Path, words: tuple[str, ...], logs: Path | None = None) -> Iterator[Run]:
    """Submit a run; end its drivers afterwards."""
    run = Run(cluster, storage, words, logs)
    run.submit()
    try:
        yield run
    finally:
        run.close()


def undisturbed(cluster: Cluster, storage: Path, words: tuple[str, ...]) -> FinalWeights:
    """Return the final weights of an undisturbed run. Raises Stuck when it does not finish."""
    with submitted(cluster, storage, words) as run:
        ended = run.ended()
        if ended.status != 0:
            raise Stuck(f"the undisturbed run ended with {ended.status}: {ended.out.strip()[-400:]}")
        return checks.final(run)


def samples_of(run: Run, epochs: int) -> int:
    """Return the samples of this many epochs of the run."""
    data = manifest.load(str(run.storage / "data" / EMBEDDED_DATASET))
    return epochs * (data.count_samples("train") // BATCH) * BATCH


def hit_at_random(
    run: Run, expected: FinalWeights, faults: list[str], dice: random.Random, name: str
) -> Iterator[Report]:
    """Inject the faults at random points of the run, in this order; yield a report of each, then of the whole."""
    incidents = 0
    run.await_samples(1)
    length = samples_of(run, epochs_for(len(faults)))
    for number, fault in enumerate(faults):
        point = int(length * (number + dice.uniform(0.3, 0.8)) / (len(faults) + 0.5))
        run.await_samples(point)
        hit = FAULTS[fault](run, dice)
        incidents += hit.incidents
        yield checks.recovered(run, hit, f"{name}.{number + 1:02d}.{fault}")
    report = Report(f"{name}.whole")
    report.problems += checks.whole(run, expected, incidents)
    yield report
