"""Run specifications, journals, jobs and processes for tests of the rooms that launch runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.ray_backend.run_spec import Destination, Placement, RunSpec
from orchestrator.recipe.config import Recipe
from orchestrator.recipe.presets import googlenet_tiny
from orchestrator.storage import file_io
from orchestrator.tracking.journal import JournalWriter
from orchestrator.training.config import Cadence
from orchestrator.training.run_dir import get_journal_dir

ROOT = Path(__file__).resolve().parent.parent.parent


def recipe(name: str = "tiny", **changes: Any) -> Recipe:
    """Return the tiny recipe under another name and with other fields."""
    return Recipe.from_dict({**googlenet_tiny().to_dict(), "name": name, **changes})


def wide(name: str, epochs: int, width: float) -> Recipe:
    """Return a recipe whose work is epochs x width squared."""
    base = googlenet_tiny()
    model = base.model.model_copy(update={"width": width})
    return base.model_copy(update={"name": name, "epochs": epochs, "model": model})


def spec(of: Recipe | None = None, storage: str = "/nowhere", **placement: Any) -> RunSpec:
    """Return a run of that recipe."""
    return RunSpec(
        recipe=of or recipe(),
        placement=Placement(**placement),
        destination=Destination(
            data=file_io.join(storage, "data"), storage=storage, tracking="sqlite:////nowhere/x.db"
        ),
        cadence=Cadence(),
        dataset_digest="0123456789abcdef",
    )


def write_journal(folder: str, attempt: int, events: list[tuple[str, int, Mapping[str, object]]]) -> None:
    """Write one attempt's events (kind, samples, values) into a run's folder, as its rank 0 does."""
    writer = JournalWriter(get_journal_dir(folder), attempt, flush_seconds=0.01)
    for kind, samples, values in events:
        writer.append(kind, samples, **values)
    assert writer.close(10)


def until(condition: Callable[[], Any], seconds: float = 10.0, pause: float = 0.02) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not come true in {seconds:g} s"
        time.sleep(pause)


@dataclass(frozen=True)
class Ended:
    """The status, output and seconds of a job that ended."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def complaints(self) -> list[str]:
        """Lines on stderr."""
        return self.err.splitlines()


@contextmanager
def ended_with(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """Yield a process; kill it and all its descendants at the end of the block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in process_tree(process.pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def job(script: str, *arguments: str, runs: Path, seconds: float = 300, **changes: str) -> Ended:
    """Run a job as a user does, from another folder, with its own folder of runs."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd="/",
        env={**os.environ, "ORCHESTRATOR_RUNS": str(runs), **changes},
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


@contextmanager
def started(script: str, *arguments: str, runs: Path) -> Iterator["subprocess.Popen[str]"]:
    """Start a job, its two streams in one; kill it and all its descendants at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env={**os.environ, "ORCHESTRATOR_RUNS": str(runs)},
    )
    with ended_with(process):
        yield process


def process_tree(pid: int) -> list[int]:
    """Return a process and all its descendants, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    pids = [pid]
    for parent in pids:
        pids.extend(children.get(parent, []))
    return pids


def title(pid: int) -> str:
    """Return the title of a process, "" when it is gone."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""
