"""Bare trainings: plain processes side by side, without cluster, driver or tracking, to hold orchestration against.

`python -m benchmarks.bare JSON` trains one job in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import frame
from orchestrator.tracking import journal
from orchestrator.training.config import TrainJob
from orchestrator.training.run_dir import get_journal_dir

Runs = Sequence[subprocess.Popen[bytes]]


def side_by_side(place: Path, jobs: Sequence[TrainJob], patience_seconds: float) -> list[float]:
    """Seconds of each job's training, from its first step to its end; all at the same time. `place` is for logs."""
    with begun(place, jobs) as runs:
        ended(place, runs, patience_seconds)
    found = [end - start for start, end in (span(job) for job in jobs)]
    shown = ", ".join(f"{one:.1f} s" for one in found)
    frame.progress(f"bare runs of {jobs[0].recipe.epochs} epochs, side by side: {shown}")
    return found


@contextmanager
def begun(place: Path, jobs: Sequence[TrainJob]) -> Iterator[Runs]:
    """Start jobs side by side; what is left of them ends at the end. `place` is for logs."""
    place.mkdir(parents=True, exist_ok=True)
    runs: list[subprocess.Popen[bytes]] = []
    try:
        for number, job in enumerate(jobs):
            runs.append(process("benchmarks.bare", job.to_json(), log=_log(place, number)))
        yield runs
    finally:
        for run in runs:
            run.kill()
            run.wait()


def ended(place: Path, runs: Runs, patience_seconds: float) -> None:
    """Wait until all have ended. Raises RuntimeError when one failed."""
    for run in runs:
        if run.wait(patience_seconds):
            logs = [_log(place, number) for number in range(len(runs))]
            raise RuntimeError(f"a bare run ended with status {run.returncode}: {tail(logs)}")


def has_started(folder: str) -> bool:
    """Return whether the run in a folder is at its first step."""
    return any(event.kind == "started" for event in journal.read_events(get_journal_dir(folder))[0])


def span(job: TrainJob) -> tuple[float, float]:
    """When the training of a job that has finished began and ended, in unix seconds."""
    moments = {event.kind: event.time for event in journal.read_events(get_journal_dir(job.folder))[0]}
    return moments["started"], moments["finished"]


def _log(place: Path, number: int) -> Path:
    return place / f"{number}.log"


def process(
    module: str, *words: str, log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A module in a process of its own."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", module, *words], cwd=frame.ROOT, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})},
        )  # fmt: skip


def tail(logs: Sequence[Path]) -> str:
    """The last words of logs."""
    return "".join(path.read_text(errors="replace")[-500:] for path in logs)


class _Alone:
    """Stand-in for the launcher, which a bare run lacks."""

    def report(self, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def has_preemption_notice(self) -> bool:
        """Never."""
        return False

    def should_continue(self) -> bool:
        """Always."""
        return True


def train(payload: Mapping[str, Any]) -> None:
    """Train a job in this process."""
    import torch

    from orchestrator.training import distributed, trainer

    outcome = trainer.run_training(TrainJob.from_dict(payload), distributed.get_context(torch.device("cpu")), _Alone())
    if outcome.status != "finished":
        raise RuntimeError(f"{outcome.status}: {outcome.message}")


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
