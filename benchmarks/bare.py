"""Bare trainings: plain processes side by side, without cluster, driver or tracking, to hold orchestration against.

`python -m benchmarks.bare JSON` trains one job in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import frame
from orchestrator.tracking import journal
from orchestrator.training.job import TrainJob, journal_of


def side_by_side(place: Path, jobs: Sequence[TrainJob], patience_seconds: float) -> list[float]:
    """Seconds of each job's training, from its first step to its end; all of them at once. `place` is for logs."""
    place.mkdir(parents=True, exist_ok=True)
    logs = [place / f"{number}.log" for number in range(len(jobs))]
    runs = []
    try:
        for job, log in zip(jobs, logs, strict=True):
            runs.append(process("benchmarks.bare", job.to_json(), log=log))
        for run in runs:
            if run.wait(patience_seconds):
                raise RuntimeError(f"a bare run ended with status {run.returncode}: {tail(logs)}")
    finally:
        for run in runs:
            run.kill()
            run.wait()
    found = []
    for job in jobs:
        events, _ = journal.read(journal_of(job.folder))
        moments = {event.kind: event.time for event in events}
        found.append(moments["finished"] - moments["started"])
    shown = ", ".join(f"{one:.1f} s" for one in found)
    frame.progress(f"bare runs of {jobs[0].recipe.epochs} epochs, side by side: {shown}")
    return found


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
    """What a worker needs of a launcher, where there is none."""

    def report(self, metrics: dict[str, float]) -> None:
        """Nobody asks."""

    def preempted(self) -> bool:
        """Never."""
        return False

    def wanted(self) -> bool:
        """Always."""
        return True


def train(payload: Mapping[str, Any]) -> None:
    """Train a job in this process."""
    torch, entry, world = (
        import_module(name) for name in ("torch", "orchestrator.training.entry", "orchestrator.training.world")
    )
    outcome = entry.run(TrainJob.from_dict(payload), world.current(torch.device("cpu")), _Alone())
    if outcome.status != "finished":
        raise RuntimeError(f"{outcome.status}: {outcome.message}")


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
