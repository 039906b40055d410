"""The state of a run from what drivers and workers leave in storage."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.checkpoint_dir import make_checkpoint_url
from orchestrator.monitor.journal_summary import parse_loss
from orchestrator.monitor.run_status import inspect_run
from orchestrator.ray_backend import lease
from orchestrator.ray_backend.lease import LeaseOwner
from orchestrator.ray_backend.run_spec import RunSpec
from orchestrator.storage import commit, file_io
from orchestrator.tracking.events import Event
from orchestrator.training.run_dir import get_attempts_dir, get_checkpoints_dir, get_final_weights_dir, get_outcome_path
from tests.support import drivers
from tests.support.launched import recipe, spec, write_journal

STARTED = ("started", 0, {"attempt": 1, "workers": 2, "samples_per_epoch": 1000})
INCIDENT = ("incident", 0, {"cause": "rank 1: killed"})


def now() -> LeaseOwner:
    """One who took the lease this moment."""
    return LeaseOwner("another-host", 1, "", time.time())


def point(samples: int) -> tuple[str, int, dict[str, Any]]:
    return "metrics", samples, {"train/step_loss": 0.25}


EPOCH = (
    "epoch",
    1000,
    {
        "train/epoch": 1.0, "train/loss": 0.5, "train/images_per_second": 123.0, "train/goodput": 0.9,
        "validation/raw_top1_error": 40.0, "validation/raw_top5_error": 10.0,
    },
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunSpec:
    one = spec(recipe("net", epochs=4), str(tmp_path), workers=3)
    drivers.begun(one)
    return one


def outcome(folder: str, status: str, message: str = "", attempt: int = 1) -> None:
    about = {"status": status, "message": message, "attempt": attempt}
    file_io.write_bytes(get_outcome_path(folder), json.dumps(about).encode())


# ------------------------------------------------------------------ held and alive
def test_a_run_that_makes_progress(run: RunSpec) -> None:
    drivers.lease(run.folder, beat=1)
    write_journal(run.folder, 1, [STARTED, EPOCH, point(1200)])
    drivers.attempt(run.folder, samples=1500, ago=-10, began=1)
    commit.write_folder(make_checkpoint_url(get_checkpoints_dir(run.folder), 1200, 1), {}, {"time": time.time() - 30})
    found = inspect_run(run.folder)
    assert (found.state, found.model, found.name, found.workers) == ("running", "net", run.name, 2)
    assert (found.epoch, found.epochs, found.samples) == (1.5, 4, 1500)
    assert (found.loss, found.top1_error, found.top5_error, found.goodput) == (0.25, 40.0, 10.0, 0.9)
    assert found.images_per_second == 123.0
    assert found.seconds_left == pytest.approx(10 * 2500 / 1500, rel=0.3)
    assert found.checkpoint_samples == 1200
    assert found.checkpoint_seconds_ago == pytest.approx(30, abs=10)
    assert found.owner.startswith("job raysubmit_abc, process 1 on another-host")
    assert (found.incidents, found.message) == (0, "")


def test_a_lease_without_an_attempt_of_its_own_is_starting_and_then_waits(run: RunSpec) -> None:
    stem = drivers.lease(run.folder, now(), beat=0)
    assert inspect_run(run.folder).state == "starting"
    drivers.attempt(run.folder, samples=10, ago=3000, began=3600)  # of an earlier driver
    write_journal(run.folder, 1, [STARTED])
    drivers.lease(run.folder, LeaseOwner("another-host", 1, "", time.time() - 600), beat=0)
    drivers.beats(stem)
    # The journal is of now: what counts is when the attempt gave its last sign.
    file_io.remove(file_io.join(run.folder, "journal"))
    assert inspect_run(run.folder).state == "waiting"


@pytest.mark.parametrize("kind", ["crashed", "failed", "stalled"])
def test_workers_that_crashed_are_restarting(run: RunSpec, kind: str) -> None:
    drivers.lease(run.folder, beat=0)
    drivers.attempt(run.folder, samples=10)
    write_journal(run.folder, 1, [STARTED, ("crashed", 5, {"cause": "x"})] if kind == "crashed" else [STARTED])
    about = json.dumps({"time": time.time(), "causes": {"0": "killed"}, "cause": "stuck"}).encode()
    name = {"failed": f"failed-{round(1000 * time.time())}.json", "stalled": "000001.stalled-rank-00000.json"}
    if kind in name:
        file_io.write_bytes(file_io.join(get_attempts_dir(run.folder), name[kind]), about)
    assert inspect_run(run.folder).state == "restarting"
    drivers.attempt(run.folder, 2, began=0)
    assert inspect_run(run.folder).state == "restarting"
    write_journal(run.folder, 2, [INCIDENT, STARTED])
    found = inspect_run(run.folder)
    assert (found.state, found.incidents, found.last_incident) == ("running", 1, "rank 1: killed")


def test_a_run_that_was_asked_to_stop(run: RunSpec) -> None:
    drivers.lease(run.folder, beat=0, stop=b"")
    assert inspect_run(run.folder).state == "stopping"


# ------------------------------------------------------------------ not held, or by the dead
def test_finished_needs_final_weights(run: RunSpec) -> None:
    drivers.lease(run.folder, beat=0, released=b"")
    drivers.attempt(run.folder)
    outcome(run.folder, "finished")
    assert inspect_run(run.folder).state == "stopped"
    commit.write_folder(get_final_weights_dir(run.folder), {}, {})
    assert inspect_run(run.folder).state == "finished"


@pytest.mark.parametrize(
    ("status", "state", "message"),
    [
        ("stopped", "stopped", ""),
        ("diverged", "failed", "diverged: too high"),
        ("bad-data", "failed", "bad-data: too high"),
    ],
)
def test_outcomes(run: RunSpec, status: str, state: str, message: str) -> None:
    drivers.lease(run.folder, beat=0, released=b"")
    drivers.attempt(run.folder)
    outcome(run.folder, status, "too high")
    found = inspect_run(run.folder)
    assert (found.state, found.message, found.owner) == (state, message, "")


def test_workers_that_crashed_for_good_failed_with_their_cause(run: RunSpec) -> None:
    drivers.lease(run.folder, beat=0, released=b"")
    outcome(run.folder, "stopped")  # of the attempt before
    drivers.attempt(run.folder, 2)
    write_journal(run.folder, 2, [STARTED, ("crashed", 5, {"cause": "RuntimeError: x"})])
    found = inspect_run(run.folder)
    assert found.state == "failed"
    assert "RuntimeError: x" in found.message
    # A run that was asked to stop and then killed did not fail.
    drivers.lease(run.folder, beat=0, released=b"", stop=b"")
    assert inspect_run(run.folder).state == "stopped"


def test_a_run_whose_driver_died_is_lost(run: RunSpec) -> None:
    drivers.lease(run.folder, beat=5000)
    drivers.attempt(run.folder, samples=10)
    write_journal(run.folder, 1, [STARTED, point(10)])
    found = inspect_run(run.folder)
    assert (found.state, found.owner, found.seconds_left) == ("lost", "", None)
    assert "job raysubmit_abc" in found.message
    held = lease.acquire_lease(run.folder, stale_seconds=0.1)  # by another driver
    try:
        assert inspect_run(run.folder).state == "starting"
    finally:
        held.release()


def test_members_that_were_not_begun_wait_for_their_turn(tmp_path: Path) -> None:
    folder = spec(recipe("net-m7"), str(tmp_path)).folder
    assert inspect_run(folder, "net-x7", "net-m7", awaited=True).state == "waiting"
    found = inspect_run(folder, "net-x7", "net-m7", awaited=False)
    assert (found.state, found.model, found.ensemble, found.epoch) == ("stopped", "net-m7", "net-x7", None)


def test_checkpoints_that_do_not_count_are_passed_over(run: RunSpec) -> None:
    places = get_checkpoints_dir(run.folder)
    commit.write_folder(make_checkpoint_url(places, 500, 1), {}, {})
    commit.write_folder(make_checkpoint_url(places, 900, 1), {}, {})  # void
    file_io.write_bytes(make_checkpoint_url(places, 700, 2) + "/state.pt", b"half")
    file_io.write_bytes(make_checkpoint_url(places, 600, 2) + "/DONE", b"{")
    file_io.write_bytes(file_io.join(get_attempts_dir(run.folder), "000002.resumed-000000000000500"), b"")
    found = inspect_run(run.folder)
    assert (found.checkpoint_samples, found.checkpoint_seconds_ago) == (500, None)


def test_records_that_cannot_be_read_are_no_reason_to_fail(run: RunSpec) -> None:
    for name in ("spec.json", "outcome.json", "attempts/000001.json", "attempts/000001.beat", "lease/000001.json"):
        file_io.write_bytes(file_io.join(run.folder, name), b"{")
    found = inspect_run(run.folder)
    assert (found.state, found.model, found.workers) == ("lost", run.name, None)


@pytest.mark.parametrize(
    ("values", "loss"), [({"train/step_loss": 2.0, "train/loss": 1.0}, 2.0), ({"train/loss": 1.0}, 1.0), ({}, None)]
)
def test_the_loss_of_an_event_is_that_of_its_steps_and_in_earlier_journals_the_only_one(
    values: dict[str, float], loss: float | None
) -> None:
    assert parse_loss(Event("metrics", 0.0, 8, values)) == loss
