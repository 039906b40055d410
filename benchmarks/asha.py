"""Successive halving against the whole grid: `make bench-asha`.

One finite space of schedules, tried whole and by ASHA, for several seeds of training and of the order of trials. Both
are real sweeps. Training is a function of its recipe alone, so a trial that both have gives both the same errors; what
differs is which trials ASHA carried to their end.

LeNet-5, since it learns from its first epoch on. GoogLeNet without batch norm is at the level of chance for the first
epochs, where any rule that ends trials early throws dice: docs/benchmarks.md has what that costs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from benchmarks import frame
from benchmarks.frame import Figure
from orchestrator.data.build.sources import digits
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import lenet_5_digits

SEEDS = 5
EPOCHS = 27
GRACE, REDUCTION = 3, 3  # rungs at epochs 3 and 9
RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
KINDS = ("step", "polynomial", "cosine")
MOST_EPOCHS = 0.40  # of the grid's
MOST_POINTS = 1.0
PATIENCE_SECONDS = 900.0
SPACE = {
    "dimensions": {
        "schedule.kind": {"values": list(KINDS)},
        "schedule.base_rate": {"values": list(RATES)},
        "schedule.decay_epochs": {"values": [4.0], "when": {"schedule.kind": ["step"]}},
        "schedule.decay_factor": {"values": [0.6], "when": {"schedule.kind": ["step"]}},
    }
}


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-asha`."""
    place = Path(folder) / "asha"
    digits.pack_digits(str(place / "runs" / "data" / "digits"))
    (place / "space.json").write_text(json.dumps(SPACE))
    shares, differences = [], []
    for seed in range(SEEDS):
        grid, asha = _sweep(place, seed, "none"), _sweep(place, seed, "asha")
        if len(grid) != len(RATES) * len(KINDS) or {one["state"] for one in grid} - {"finished", "diverged"}:
            raise RuntimeError(f"seed {seed}: the grid has {len(grid)} trials, or was not tried whole")
        shares.append(_epochs(asha) / _epochs(grid))
        differences.append(_best(asha) - _best(grid))
        frame.progress(
            f"seed {seed}: best of the grid {_best(grid):.2f}%, of ASHA {_best(asha):.2f}%, "
            f"{_epochs(asha)} of {_epochs(grid)} epochs"
        )
        yield Figure(f"asha.seed_{seed}.grid_best_error", _best(grid))
        yield Figure(f"asha.seed_{seed}.asha_best_error", _best(asha))
    low, high = stats.t.interval(0.95, SEEDS - 1, mean(differences), stdev(differences) / SEEDS**0.5 or 1e-12)
    yield Figure("asha.epochs/grid_epochs.mean", mean(shares), at_most=MOST_EPOCHS)
    yield Figure("asha.epochs/grid_epochs.worst", max(shares))
    yield Figure("asha.best_error-grid_best_error.mean_points", mean(differences), at_most=MOST_POINTS)
    yield Figure("asha.best_error-grid_best_error.low_points", float(low))
    yield Figure("asha.best_error-grid_best_error.high_points", float(high))


def _epochs(trials: list[dict[str, Any]]) -> int:
    return sum(int(one["epochs"]) for one in trials)


def _best(trials: list[dict[str, Any]]) -> float:
    """The error of the best trial that was trained to its end, in percent."""
    return min(float(one["top1_error"]) for one in trials if one["state"] == "finished")


def _sweep(place: Path, seed: int, scheduler: str) -> list[dict[str, Any]]:
    """The trials of a sweep over the whole space, as its ranking has them."""
    base = lenet_5_digits()
    seeds = base.seeds.model_copy(update={kind: value + seed for kind, value in base.seeds})
    recipe = Recipe.from_dict(base.model_copy(update={"epochs": EPOCHS, "seeds": seeds}).to_dict())
    file, runs = place / f"recipe-{seed}.json", place / "runs"
    file.write_text(recipe.to_json())
    before = set((runs / "sweeps").glob("*"))
    done = subprocess.run(
        [
            *(sys.executable, "jobs/tune.py", str(file), "--space", str(place / "space.json"), "--sampler", "random"),
            *("--seed", str(seed), "--scheduler", scheduler, "--budget.trials", "100"),
            *("--grace-epochs", str(GRACE), "--reduction", str(REDUCTION)),
        ],
        cwd=frame.ROOT, env={**os.environ, "ORCHESTRATOR_RUNS": str(runs)}, capture_output=True, text=True,
        check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the sweep ended with status {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    (made,) = set((runs / "sweeps").glob("*")) - before
    found: list[dict[str, Any]] = json.loads((made / "ranking.json").read_text())["trials"]
    return found
