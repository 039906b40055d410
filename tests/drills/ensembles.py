"""An ensemble whose driver is killed while it trains, and again while it scores; the same command finishes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mlflow.tracking import MlflowClient

from tests.drills.checks import SHOWN_CHARS, Report
from tests.drills.stage import PATIENCE_SECONDS, Cluster, Run
from tests.support.launched import until

MEMBERS, EPOCHS = 7, 3
WORDS = ("googlenet-tiny", f"--ensemble.members={MEMBERS}", f"--epochs={EPOCHS}", "--cadence.checkpoint-seconds=1")
SECONDS = 600.0


def killed_twice(cluster: Cluster, storage: Path) -> Iterator[Report]:
    """Yield a report per kill: seconds until the next driver has come farther than the killed one."""
    run = Run(cluster, storage, WORDS, job="train_ensemble.py")
    run.submit()
    try:
        for name, progress, least in (("training", trained, 2), ("scoring", scored, 3)):
            run.wait(partial(_reached, progress, storage, least), f"{least} parts of {name}", SECONDS)
            yield _killed(run, f"ensemble.{name}", progress)
        ended = run.ended(SECONDS)
        report = Report("ensemble.end")
        if ended.status != 0 or f"{MEMBERS} of {MEMBERS} models, " not in ended.out:
            report.problems.append(f"the last driver ended with {ended.status}: {ended.out.strip()[-SHOWN_CHARS:]}")
        if f"{MEMBERS} of {MEMBERS} models are trained already" not in ended.out:
            report.problems.append("the driver after the kill in scoring trained a model again")
        report.problems += recorded(storage, {"FINISHED": MEMBERS})
        yield report
    finally:
        run.close()


def _reached(progress: Callable[[Path], int], storage: Path, least: int) -> bool:
    return progress(storage) >= least


def _killed(run: Run, name: str, progress: Callable[[Path], int]) -> Report:
    """Kill the driver, submit the same command and wait until it has come farther."""
    report = Report(name)
    run.driver.kill()
    moment, reached = time.monotonic(), progress(run.storage)
    run.driver.wait()
    until(lambda: not run.workers(), PATIENCE_SECONDS, 0.2)
    if progress is trained and not 2 <= reached < MEMBERS:
        report.problems.append(f"{reached} of {MEMBERS} were trained when the driver was killed")
    run.submit()
    run.wait(lambda: progress(run.storage) > reached, "more of it", SECONDS)
    report.seconds = time.monotonic() - moment
    return report


def trained(storage: Path) -> int:
    """Count the models that are fully trained."""
    return len(list(storage.glob("models/*/final/**/DONE")))


def scored(storage: Path) -> int:
    """Count the parts of scores that are stored."""
    return len(list(storage.glob("models/*/scores/*/*/DONE")))


def recorded(storage: Path, children: dict[str, int]) -> list[str]:
    """Return the problems of the tracker, which must have one parent, and `children` runs by state."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    below = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    parents = [run.info.status for run in runs if run not in below]
    problems = [] if parents == ["FINISHED"] else [f"parents in MLflow: {parents}, one expected, FINISHED"]
    if (counted := Counter(run.info.status for run in below)) != children:
        problems.append(f"children in MLflow: {dict(counted)}, {children} expected")
    return problems
