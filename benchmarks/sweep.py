"""Cost of a sweep besides training: `make bench-sweep`.

Eight trials of about 20 s, two at a time on a private cluster, against the same epochs in bare processes: pairs of the
same training side by side, one pair before the sweep and one after it, so that a slow spell of the machine meets both;
their mean, from first step to end, times four. The sweep's time is that of the whole command, from the start of its
process to its end, report and all. The trials differ in their learning rate alone, so their work is equal.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from benchmarks import bare, frame
from benchmarks.frame import Figure
from orchestrator.data import manifest
from orchestrator.data.build.sources import digits
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import googlenet_digits, googlenet_tiny
from orchestrator.tracking import journal
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_journal_dir

TRIALS, AT_ONCE = 8, 2
SECONDS = 20.0  # of a trial
CALIBRATION_EPOCHS = 4
PATIENCE_SECONDS = 900.0
GOAL = 1.25


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-sweep`."""
    place = Path(folder) / "sweep"
    data = place / "runs" / "data" / "digits"
    digits.pack_digits(str(data))
    each = _bare(place / "calibration", data, CALIBRATION_EPOCHS) / CALIBRATION_EPOCHS
    epochs = max(2, math.ceil(SECONDS / each))
    frame.progress(f"trials of {epochs} epochs, about {epochs * each:.0f} s each")
    before = _bare(place / "before", data, epochs)
    began, ended = _sweep(place, epochs)
    after = _bare(place / "after", data, epochs)
    whole = mean((before, after)) * TRIALS / AT_ONCE
    spans = sorted(_span(run) for run in (place / "runs" / "sweeps").glob("*/models/*"))
    if len(spans) != TRIALS:
        raise RuntimeError(f"{len(spans)} trials, where {TRIALS} are expected")
    first, last = spans[0][0], max(end for _, end in spans)
    trained = sum(end - start for start, end in spans)
    yield Figure("sweep.bare.before_s", before)
    yield Figure("sweep.bare.after_s", after)
    yield Figure("sweep.bare.whole_s", whole)
    yield Figure("sweep.whole_s", ended - began)
    yield Figure("sweep.whole/bare", (ended - began) / whole, at_most=GOAL)
    yield Figure("sweep.trial.training_s", trained / TRIALS)
    yield Figure("sweep.until_the_first_step_s", first - began)
    yield Figure("sweep.until_the_second_actors_first_step_s", spans[1][0] - began)
    # Both actors' time between the first step and the last trial's end that is no training.
    yield Figure("sweep.between_trials_s", (AT_ONCE * (last - first) - trained) / (TRIALS - AT_ONCE))
    yield Figure("sweep.after_the_last_trial_s", ended - last)


def _recipe(epochs: int) -> Recipe:
    base = googlenet_tiny().model_copy(update={"epochs": epochs, "model": googlenet_digits().model})
    return Recipe.from_dict(base.to_dict())


def _bare(place: Path, data: Path, epochs: int) -> float:
    """Seconds of a bare training beside another one; the mean of both."""
    digest = manifest.load(str(data)).digest()
    jobs = [
        TrainJob(
            recipe=_recipe(epochs), data=str(data), dataset_digest=digest, folder=str(place / str(number)),
            stop_flag=str(place / "stop"),
        )
        for number in range(AT_ONCE)
    ]  # fmt: skip
    return mean(bare.side_by_side(place, jobs, PATIENCE_SECONDS))


def _sweep(place: Path, epochs: int) -> tuple[float, float]:
    """Run the job; when its process began and when it had ended, in unix seconds."""
    recipe, space = place / "recipe.json", place / "space.json"
    recipe.write_text(_recipe(epochs).to_json())
    rates = [0.01 * (1 + number / TRIALS) for number in range(TRIALS)]
    space.write_text(json.dumps({"dimensions": {"schedule.base_rate": {"values": rates}}}))
    began = time.time()
    done = subprocess.run(
        [
            *(sys.executable, "jobs/tune.py", str(recipe), "--space", str(space), "--sampler", "grid"),
            *("--scheduler", "none", "--budget.trials", str(TRIALS)),
        ],
        cwd=frame.ROOT, env={**os.environ, "ORCHESTRATOR_RUNS": str(place / "runs")}, capture_output=True, text=True,
        check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    ended = time.time()
    if done.returncode:
        raise RuntimeError(f"the sweep ended with status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return began, ended


def _span(run: Path) -> tuple[float, float]:
    """When a trial made ready for its first step, and when it had ended, in unix seconds."""
    events, _ = journal.read_events(get_journal_dir(str(run)))
    moments = {event.kind: event.time for event in events}
    return moments["started"], moments["finished"]
