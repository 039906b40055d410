"""Stop and status as a person uses them: on a real run, from processes that know nothing but its storage."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrator.tracking import journal
from orchestrator.training.run_dir import get_journal_dir
from tests.support.launched import ROOT, job, until

pytestmark = [pytest.mark.process]

SECONDS = 240.0  # a deadlock shows as a time-out; a busy machine is slow to start Ray
# Long enough to be stopped, with a checkpoint only when it is asked for.
COMMAND = ("googlenet-tiny", "--epochs", "5000", "--cadence.pulse-steps", "2", "--cadence.checkpoint-seconds", "3600")


@contextmanager
def training(runs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a job that trains; kill it at the end if it still runs."""
    with log_of(runs).open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "train.py"), *COMMAND],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={**os.environ, "ORCHESTRATOR_RUNS": str(runs)},
        )
        try:
            yield driver
        finally:
            if driver.poll() is None:
                driver.kill()
            driver.wait(SECONDS)


def log_of(runs: Path) -> Path:
    return runs.with_name("train.log")


def shown(runs: Path) -> dict[str, Any]:
    """Return the only run as `status.py --json` prints it; empty when there is none yet."""
    done = job("status.py", "--json", runs=runs)
    assert done.err == ""
    rows: list[dict[str, Any]] = json.loads(done.out)
    return rows[0] if rows else {}


def makes_progress(driver: subprocess.Popen[bytes], runs: Path, beyond: int) -> bool:
    row = shown(runs)
    assert driver.poll() is None, log_of(runs).read_text()
    assert row.get("state") not in ("failed", "lost", "finished"), row
    return row.get("state") == "running" and row["samples"] > beyond


@pytest.mark.cluster
def test_a_run_is_shown_stopped_with_a_checkpoint_and_resumed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with training(runs) as driver:
        until(lambda: makes_progress(driver, runs, 0), SECONDS, 1.0)
        table = job("status.py", runs=runs)
        assert (table.status, table.err) == (0, "")
        assert "googlenet-tiny" in table.out and " running " in table.out
        assert f"run by process {driver.pid} on " in table.out
        name = shown(runs)["name"]
        stopped = job("stop.py", name, runs=runs)
        assert stopped.status == 0, stopped.out + stopped.err
        assert driver.wait(SECONDS) == 143  # 128 + SIGTERM
    row = shown(runs)
    assert row["state"] == "stopped"
    assert row["checkpoint_samples"] == row["samples"] > 0
    assert f"its newest checkpoint is at {row['samples']} samples" in stopped.out
    assert "not running" in job("stop.py", name, runs=runs).out

    with training(runs) as driver:
        until(lambda: makes_progress(driver, runs, row["samples"]), SECONDS, 1.0)
        hurried = job("stop.py", name, "--no-save", runs=runs)
        assert hurried.status == 0, hurried.out + hurried.err
        assert driver.wait(SECONDS) == 143
    again = shown(runs)
    assert (again["state"], again["incidents"]) == ("stopped", 0)
    assert again["checkpoint_samples"] == row["samples"]  # none was written this time
    events, _ = journal.read_events(get_journal_dir(str(runs / "models" / name)))
    assert [event.samples for event in events if event.kind == "started"] == [0, row["samples"]]


def test_status_and_stop_need_neither_ray_nor_torch_nor_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from orchestrator.cli import status, stop\n"
        "from orchestrator.cli.config import StatusConfig\n"
        "from orchestrator.cli.exit_status import make_console\n"
        f"status.run_status(StatusConfig(storage={str(tmp_path)!r}), make_console())\n"
        "assert not {'ray', 'torch', 'mlflow', 's3fs'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (0, f"no runs in {tmp_path}\n"), done.stderr
