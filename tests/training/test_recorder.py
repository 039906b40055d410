"""What rank 0 writes of an attempt, and how it sees the stop flag."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.data.audit import BadEntry
from orchestrator.storage import files
from orchestrator.tracking import journal
from orchestrator.tracking.journal import Event, JournalWriter
from orchestrator.training import recorder
from orchestrator.training.job import Outcome, TrainJob, journal_of
from orchestrator.training.progress import Progress
from orchestrator.training.recorder import Recorder, last_event
from orchestrator.training.world import World
from tests.support.runs import ALONE, CPU, ask_to_stop, events, recipe

AT = Progress(320, 32, 100)
FOLLOWER = World(1, 2, CPU)


@pytest.fixture(autouse=True)
def _sharp_eye(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "POLL_SECONDS", 0.005)


@pytest.fixture
def one(tmp_path: Path) -> TrainJob:
    return TrainJob(
        recipe=recipe(), data="/nowhere", dataset_digest="0", folder=str(tmp_path), stop_flag=str(tmp_path / "stop")
    )


@pytest.fixture
def leader(one: TrainJob) -> Iterator[Recorder]:
    made = Recorder(one, ALONE, 2)
    yield made
    made.close()


def seen_within(seconds: float, of: Recorder) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not of.stop_requested():
        time.sleep(0.005)
    return of.stop_requested()


def test_the_stop_flag_is_seen(one: TrainJob, leader: Recorder) -> None:
    assert not seen_within(0.05, leader)
    ask_to_stop(one)
    assert seen_within(5, leader)


def test_only_rank_0_looks_and_writes(one: TrainJob) -> None:
    follower = Recorder(one, FOLLOWER, 2)
    ask_to_stop(one)
    assert not seen_within(0.05, follower)
    follower.started(AT, FOLLOWER, None, [])
    follower.point(AT, 1.0, 0.1)
    follower.epoch(AT, {})
    follower.bad_samples(AT, [BadEntry(id=0, key="k", source="x", offset=0, reason="broken")])
    follower.ended(Outcome(status="finished"))
    follower.close()
    assert files.list_names(journal_of(one.folder)) == []


def test_not_to_know_is_not_to_stop(one: TrainJob) -> None:
    blind = Recorder(one.model_copy(update={"stop_flag": "nonsense://nowhere/stop"}), ALONE, 1)
    assert not seen_within(0.05, blind)
    blind.close()


def test_what_happens_is_journalled(one: TrainJob, leader: Recorder) -> None:
    leader.started(AT, ALONE, Event("stopped", time.time(), 320), [])
    leader.point(AT, 0.5, 0.1)
    leader.epoch(AT, {"train/loss": float("nan")})
    leader.ended(Outcome(status="diverged", message="why", samples=352))
    leader.close()
    kinds = [(event.kind, event.samples) for event in events(one)]
    assert kinds == [("started", 320), ("metrics", 320), ("epoch", 320), ("failed", 352)]
    started, point, _, failed = (event.values for event in events(one))
    assert started == {"attempt": 2, "workers": 1, "device": "cpu", "resumed": True}
    assert point == {"train/loss": 0.5, "train/rate": 0.1}
    assert failed == {"status": "diverged", "message": "why"}


def test_bad_samples_are_journalled_up_to_a_bound(one: TrainJob, leader: Recorder) -> None:
    entries = [BadEntry(id=n, key=f"k{n}", source="/d/x.tar", offset=n, reason="broken") for n in range(70)]
    leader.bad_samples(AT, entries[:2])
    leader.bad_samples(AT, [])
    for _ in range(3):
        leader.bad_samples(AT, entries)
    leader.close()
    told = events(one, "bad-sample")
    assert len(told) == recorder.MOST_BAD_TOLD
    assert told[1].samples == 320
    assert told[1].values == {"id": 1, "key": "k1", "source": "/d/x.tar", "offset": 1, "reason": "broken"}


@pytest.mark.parametrize("kind", ["finished", "stopped", "failed"])
def test_an_end_in_order_is_no_incident(one: TrainJob, leader: Recorder, kind: str) -> None:
    leader.started(AT, ALONE, Event(kind, time.time(), 320), [])
    leader.close()
    assert [event.kind for event in events(one)] == ["started"]


def test_a_first_attempt_is_no_incident(one: TrainJob) -> None:
    first = Recorder(one, ALONE, 1)
    first.started(AT, ALONE, None, [])
    first.close()
    assert [event.kind for event in events(one)] == ["started"]


def test_a_death_before_the_first_event_is_an_incident(one: TrainJob, leader: Recorder) -> None:
    leader.started(AT, ALONE, None, [])
    leader.close()
    incident, _ = (event.values for event in events(one))
    assert "without an outcome" in str(incident["cause"])
    assert incident["samples_replayed"] == 0


def test_a_crash_is_the_next_incidents_cause(one: TrainJob, leader: Recorder) -> None:
    leader.epoch(Progress(640, 32, 100), {})
    leader.crashed(RuntimeError("the disk is full"))
    leader.close()
    crashed = last_event(one)
    assert crashed is not None
    assert (crashed.kind, crashed.samples) == ("crashed", 640)
    third = Recorder(one, ALONE, 3)
    third.started(AT, ALONE, crashed, [])
    third.close()
    incident = next(event.values for event in events(one) if event.kind == "incident")
    assert incident["cause"] == "the attempt before crashed: RuntimeError: the disk is full"
    assert incident["samples_replayed"] == 320


@pytest.mark.parametrize("kind", ["started", "metrics", "epoch", "incident"])
def test_an_end_without_a_word_is_an_incident(one: TrainJob, leader: Recorder, kind: str) -> None:
    leader.started(AT, ALONE, Event(kind, time.time() - 60, 480), ["x: damaged"])
    leader.close()
    incident, _ = (event.values for event in events(one))
    assert "without an outcome" in str(incident["cause"])
    assert incident["samples_replayed"] == 480 - 320
    assert isinstance(seconds := incident["seconds_since_last_event"], float)
    assert 60 <= seconds < 70
    assert incident["checkpoints_passed_over"] == ["x: damaged"]


def test_a_checkpoint_passed_over_is_an_incident_after_an_end_in_order_too(one: TrainJob, leader: Recorder) -> None:
    leader.started(AT, ALONE, Event("stopped", time.time(), 480), ["x: damaged"])
    leader.close()
    incident = events(one)[0].values
    assert incident["checkpoints_passed_over"] == ["x: damaged"]
    assert "without an outcome" not in str(incident["cause"])


# ------------------------------------------------------------------ the attempt before
def written(of: TrainJob, attempt: int, *kinds: str) -> None:
    writer = JournalWriter(journal_of(of.folder), attempt)
    for samples, kind in enumerate(kinds):
        writer.append(kind, samples)
    assert writer.close(10)


def test_the_last_event_is_that_of_the_last_attempt(one: TrainJob) -> None:
    assert last_event(one) is None
    written(one, 2, "started", "stopped")
    written(one, 1, "started", "metrics")
    found = last_event(one)
    assert found is not None
    assert (found.kind, found.samples) == ("stopped", 1)


@pytest.mark.parametrize(("damaged", "kind"), [(1, "epoch"), (2, "epoch"), (3, "metrics")])
def test_a_damaged_segment_keeps_no_attempt_from_starting(one: TrainJob, damaged: int, kind: str) -> None:
    for attempt, said in enumerate(("started", "metrics", "epoch"), 1):
        written(one, attempt, said)
    files.write_bytes(files.join(journal_of(one.folder), journal.segment_name(damaged, 1)), b"{}\n")
    found = last_event(one)
    assert found is not None
    assert found.kind == kind
