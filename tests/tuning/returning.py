"""A driver for test_ray_tune.py: two trials on two CPUs; one is ended early, and the other sees what is free then.

`python -m tests.tuning.returning FOLDER` prints what it saw, as JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import Literal

import ray

from orchestrator.data import manifest
from orchestrator.data.build.sources import digits
from orchestrator.ray_backend import cluster, ray_env
from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.recipe.presets import googlenet_tiny
from orchestrator.tuning import ray_tune
from orchestrator.tuning.config import SearchConfig
from orchestrator.tuning.sweep import Sweep, Verdict
from orchestrator.tuning.trial import Metric, TrialReport, TrialTask
from tests.support.launched import process_tree, title

EPOCHS = 1000
LATEST_SECONDS = 60.0


class EndsOne(Sweep):
    """Trial 2 is ended at its first report; trial 1 continues until a CPU is free, or it is too late."""

    def __init__(self, storage: str) -> None:
        self._storage = storage
        self._digest = manifest.load(f"{storage}/data").digest()
        self._handed, self._ended = 0, 0.0
        self.seconds = math.inf  # from the end of trial 2 until its CPU was free
        self.errors: list[str | None] = []
        self.actors: set[int] = set()

    def next_task(self) -> TrialTask | Literal["later"] | None:
        if self._handed == 2:
            return None
        self._handed += 1
        return self._task(self._handed)

    def on_trial_report(self, report: TrialReport) -> Verdict:
        self.actors |= pids("ray::TrialActor")
        if report.number == 2:
            return "stop"
        if not self._ended:
            return "judge"
        since = time.monotonic() - self._ended
        if _free_cpus() >= 1.0:
            self.seconds = since
        return "stop" if self.seconds < math.inf or since > LATEST_SECONDS else "judge"

    def on_trial_ended(self, number: int, error: str | None) -> None:
        self._ended = self._ended or time.monotonic()
        self.errors.append(error)

    def _task(self, number: int) -> TrialTask:
        recipe = googlenet_tiny().model_copy(update={"name": f"returning-{number}", "epochs": EPOCHS})
        destination = Destination(data=f"{self._storage}/data", storage=self._storage, tracking="sqlite:////no/x.db")
        spec = RunSpec(recipe=recipe, placement=Placement(), destination=destination, dataset_digest=self._digest)
        return TrialTask(
            number=number,
            spec=spec,
            metric=Metric(name="top1_error"),
            stop_flag=f"{self._storage}/stop",
            successor="",
            gpus=0,
        )


def _free_cpus() -> float:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free.get("CPU", 0.0)


def pids(word: str) -> set[int]:
    """This driver's processes of that title."""
    return {pid for pid in process_tree(os.getpid()) if title(pid).startswith(word)}


def main(storage: str) -> None:
    """Run them."""
    digits.pack_digits(f"{storage}/data")
    ray_env.set_tune_variables()
    ray_env.set_ray_variables()
    cluster.connect_in_background(trial_cpus=1)
    with cluster.connect_cluster() as capacity:
        deadline = time.monotonic() + 60
        while len(ahead := pids("ray::IDLE")) < capacity.cpus:
            assert time.monotonic() < deadline, "no process is started ahead"
            time.sleep(0.1)
        sweep = EndsOne(storage)
        scheduler = ray_tune.make_scheduler(sweep, SearchConfig(scheduler="none"), googlenet_tiny())
        ray_tune.run_tuner(sweep, scheduler, Placement(max_restarts=0), 0.0)
        result = {"seconds": sweep.seconds, "errors": sweep.errors, "ahead": len(sweep.actors & ahead)}
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
