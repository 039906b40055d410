"""Journal events of an attempt."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.data.sample_audit import AuditRecord, BadEntry
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training.attempts import Attempt, PreviousAttempt
from orchestrator.training.callbacks import journal_logger
from orchestrator.training.callbacks.journal_logger import JournalLogger
from orchestrator.training.config import Outcome, TrainJob
from orchestrator.training.distributed import DistributedContext
from orchestrator.training.rank_sync import SyncReport, SyncResult
from orchestrator.training.run_dir import get_attempts_dir, get_journal_dir
from orchestrator.training.train_state import Progress
from tests.support.runs import ALONE, CPU, events, recipe

AT = Progress(320, 32, 100)
FOLLOWER = DistributedContext(1, 2, CPU)


@pytest.fixture
def one(tmp_path: Path) -> TrainJob:
    return TrainJob(
        recipe=recipe(), data="/nowhere", dataset_digest="0", folder=str(tmp_path), stop_flag=str(tmp_path / "stop")
    )


@pytest.fixture
def leader(one: TrainJob) -> Iterator[JournalLogger]:
    made = JournalLogger(one, Attempt(get_attempts_dir(one.folder), 2, time.time()))
    yield made
    made.on_end()


def after(one: TrainJob, before: PreviousAttempt) -> JournalLogger:
    """The recorder of an attempt after this one."""
    return JournalLogger(one, Attempt(get_attempts_dir(one.folder), 2, time.time(), 0.0, before))


def sync(logger: JournalLogger, one: TrainJob, progress: Progress, bad: Sequence[BadEntry] = ()) -> None:
    """Call on_sync as at a stop, where no point of the curves is recorded."""
    trainer: Any = SimpleNamespace(job=one, state=SimpleNamespace(progress=progress))
    logger.on_sync(trainer, SyncResult(SyncReport(should_stop=1), AuditRecord(), list(bad)))


def test_what_happens_is_journalled(one: TrainJob, leader: JournalLogger) -> None:
    leader.log_start(AT, ALONE, [])
    leader.append("metrics", AT, **{"train/step_loss": 0.5, "train/rate": 0.1})
    leader.append("epoch", AT, **{"train/loss": float("nan")})
    leader.log_outcome(Outcome(status="diverged", message="why", samples=352))
    leader.on_end()
    kinds = [(event.kind, event.samples) for event in events(one)]
    assert kinds == [("started", 320), ("metrics", 320), ("epoch", 320), ("failed", 352)]
    started, point, _, failed = (dict(event.values) for event in events(one))
    assert 0 <= started.pop("seconds_to_start") < 10  # type: ignore[operator]
    assert started == {
        "attempt": 2,
        "workers": 1,
        "device": "cpu",
        "resumed": True,
        "samples_per_epoch": 3200,
    }
    assert point == {"train/step_loss": 0.5, "train/rate": 0.1}
    assert failed == {"status": "diverged", "message": "why"}


def test_bad_samples_are_journalled_up_to_a_bound(one: TrainJob, leader: JournalLogger) -> None:
    entries = [BadEntry(id=n, key=f"k{n}", source="/d/x.tar", offset=n, reason="broken") for n in range(70)]
    sync(leader, one, AT, entries[:2])
    sync(leader, one, AT)
    for _ in range(3):
        sync(leader, one, AT, entries)
    leader.on_end()
    logged = events(one, "bad-sample")
    assert len(logged) == journal_logger.MAX_BAD_SAMPLES_LOGGED
    assert logged[1].samples == 320
    assert logged[1].values == {"id": 1, "key": "k1", "source": "/d/x.tar", "offset": 1, "reason": "broken"}


@pytest.mark.parametrize("kind", ["finished", "stopped", "failed"])
def test_an_end_in_order_is_no_incident(one: TrainJob, kind: str) -> None:
    second = after(one, PreviousAttempt(time.time() - 9, 0.0, Event(kind, time.time(), 320)))
    second.log_start(AT, ALONE, [])
    second.on_end()
    assert [event.kind for event in events(one)] == ["started"]


def test_an_incident_and_what_it_cost_in_the_end(one: TrainJob) -> None:
    now = time.time()
    before = PreviousAttempt(
        now - 90,
        0.0,
        Event("metrics", now - 62, 400),
        Event("heartbeat", now - 60, 480),
        Event("failure", now - 50, values={"1": "its node died"}),
    )
    second = after(one, before)
    second.log_start(AT, ALONE, ["x: damaged"])
    for samples in (448, 480, 512):
        sync(second, one, Progress(samples, 32, 100))
    second.on_end()
    incident, _, recovered = events(one)
    assert incident.kind == "incident"
    seconds = {name: incident.values[name] for name in ("seconds_to_detect", "seconds_to_restart")}
    assert seconds["seconds_to_detect"] == pytest.approx(10, abs=0.5)
    assert seconds["seconds_to_restart"] == pytest.approx(50, abs=1)
    assert incident.values["cause"] == "rank 1: its node died"
    assert incident.values["samples_replayed"] == 480 - 320
    assert incident.values["checkpoints_passed_over"] == ["x: damaged"]
    assert incident.values["attempt"] == 2
    assert (recovered.kind, recovered.samples) == ("recovered", 480)
    assert recovered.values["seconds_lost"] == pytest.approx(60, abs=2)


def test_a_crash_is_the_next_incidents_cause(one: TrainJob, leader: JournalLogger) -> None:
    leader.append("epoch", Progress(640, 32, 100))
    leader.log_crash(RuntimeError("the disk is full"))
    leader.on_end()
    found = journal.read_last_event(get_journal_dir(one.folder))
    assert found is not None
    number, crashed = found
    assert (number, crashed.kind, crashed.samples) == (2, "crashed", 640)
    third = JournalLogger(
        one, Attempt(get_attempts_dir(one.folder), 3, time.time(), 0.0, PreviousAttempt(0.0, 0.0, crashed))
    )
    third.log_start(AT, ALONE, [])
    third.on_end()
    incident = next(event.values for event in events(one) if event.kind == "incident")
    assert incident["cause"] == "the attempt before crashed: RuntimeError: the disk is full"
    assert incident["samples_replayed"] == 320


def test_a_checkpoint_passed_over_is_an_incident_after_an_end_in_order_too(one: TrainJob) -> None:
    second = after(one, PreviousAttempt(time.time(), 0.0, Event("stopped", time.time(), 480)))
    second.log_start(AT, ALONE, ["x: damaged"])
    second.on_end()
    incident = events(one)[0].values
    assert incident["checkpoints_passed_over"] == ["x: damaged"]
    assert incident["samples_replayed"] == 160
    assert "without an outcome" not in str(incident["cause"])
