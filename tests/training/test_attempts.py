"""Attempts: numbers, what the next one learns of the one before, checkpoints that no longer count."""

import json
import time
from pathlib import Path

import pytest

from orchestrator.checkpoint.format import Place
from orchestrator.storage import files
from orchestrator.tracking.journal import JournalWriter
from orchestrator.training import attempts
from orchestrator.training.attempts import Attempt, Before, Failure
from orchestrator.training.incident import LOST, UNUSABLE, Goodput, cause, incident
from orchestrator.training.job import attempts_of, final_of, journal_of, outcome_of
from orchestrator.training.outcome import finished
from tests.support.damage import DAMAGED


def write(folder: Path, attempt: int, *events: tuple[str, int], **values: object) -> None:
    writer = JournalWriter(journal_of(str(folder)), attempt)
    for kind, samples in events:
        writer.append(kind, samples, **values)
    assert writer.close(10)


def failed(folder: Path, moment: float, **causes: str) -> None:
    about = {"time": moment, "causes": {rank.strip("r"): text for rank, text in causes.items()}}
    files.write_bytes(
        files.join(attempts_of(str(folder)), f"failed-{round(1000 * moment)}.json"), json.dumps(about).encode()
    )


def test_numbers_go_up_and_no_two_have_one(tmp_path: Path) -> None:
    first = attempts.take(str(tmp_path), 1)
    assert (first.number, first.before, first.elapsed) == (1, None, 0.0)
    assert not first.superseded()
    second = attempts.take(str(tmp_path), 3)
    assert second.number == 2
    assert first.superseded()
    assert not second.superseded()


def test_other_files_do_not_count_as_attempts(tmp_path: Path) -> None:
    first = attempts.take(str(tmp_path), 1)
    first.beat(64)
    first.resumed(0)
    first.stalled(2, "why")
    failed(tmp_path, time.time(), r0="x")
    assert attempts.take(str(tmp_path), 1).number == 2


def test_what_is_known_of_the_attempt_before(tmp_path: Path) -> None:
    first = attempts.take(str(tmp_path), 2)
    write(tmp_path, 1, ("started", 0), ("metrics", 320))
    first.beat(640)
    first.stalled(1, "rank 1: no end")
    moment = time.time() + 5
    failed(tmp_path, moment, r0="its node died")
    failed(tmp_path, moment + 1, r0="later")
    before = attempts.take(str(tmp_path), 2).before
    assert before is not None
    assert not before.orderly
    assert before.samples == 640
    assert before.stalled == ("rank 1: no end",)
    assert before.failure is not None
    assert before.failure.causes == {"0": "its node died"}
    assert before.failure.time == pytest.approx(moment, abs=0.001)
    assert before.beat is not None
    assert before.ended == max(before.beat.time, before.last.time if before.last else 0)


def test_a_failure_before_the_attempt_began_is_not_its_own(tmp_path: Path) -> None:
    failed(tmp_path, time.time() - 60, r0="long ago")
    attempts.take(str(tmp_path), 1)
    before = attempts.take(str(tmp_path), 1).before
    assert before is not None
    assert before.failure is None


def test_events_of_an_earlier_attempt_are_not_the_last_ones(tmp_path: Path) -> None:
    attempts.take(str(tmp_path), 1)
    write(tmp_path, 1, ("stopped", 320))
    attempts.take(str(tmp_path), 1)
    before = attempts.take(str(tmp_path), 1).before
    assert before is not None
    assert before.last is None
    assert not before.orderly


def test_damaged_records_keep_no_attempt_from_starting(tmp_path: Path) -> None:
    first = attempts.take(str(tmp_path), 1)
    first.beat(1)
    folder = attempts_of(str(tmp_path))
    for name in files.list_names(folder):
        files.write_bytes(files.join(folder, name), b"{half")
    second = attempts.take(str(tmp_path), 1)
    assert second.number == 2
    assert second.before is not None
    assert second.before.samples == 0


def test_time_that_nobody_wanted_does_not_count(tmp_path: Path) -> None:
    """Attempt 1 ran 10 s and was stopped, a pause, attempt 2 was killed after 5 s, found dead 20 s later."""
    folder = attempts_of(str(tmp_path))
    now = time.time()
    files.write_bytes(files.join(folder, "000001.json"), json.dumps({"time": now - 1000, "elapsed": 0.0}).encode())
    files.write_bytes(files.join(folder, "000001.beat"), json.dumps({"time": now - 990, "samples": 8}).encode())
    write(tmp_path, 1)
    writer = JournalWriter(journal_of(str(tmp_path)), 1)
    writer.append("stopped", 8)
    assert writer.close(10)
    second = attempts.take(str(tmp_path), 1)
    assert second.elapsed == pytest.approx(1000, abs=5), "its last sign of life is the event, of now"
    third = attempts.take(str(tmp_path), 1)
    assert third.elapsed == pytest.approx(1000, abs=5)


# ------------------------------------------------------------------ what no longer counts
def test_checkpoints_beyond_where_a_later_attempt_began_are_void(tmp_path: Path) -> None:
    second = Attempt(attempts_of(str(tmp_path)), 2, 0.0)
    void = attempts.void(str(tmp_path))
    assert void(Place("x", 640, 1)) is None
    second.resumed(320)
    void = attempts.void(str(tmp_path))
    assert void(Place("x", 320, 1)) is None
    assert "attempt 2" in str(void(Place("x", 640, 1)))
    assert void(Place("x", 640, 2)) is None
    assert void(Place("x", 640, 3)) is None


def test_a_later_attempt_that_began_farther_voids_nothing(tmp_path: Path) -> None:
    Attempt(attempts_of(str(tmp_path)), 2, 0.0).resumed(320)
    Attempt(attempts_of(str(tmp_path)), 3, 0.0).resumed(640)
    void = attempts.void(str(tmp_path))
    assert void(Place("x", 640, 2)) is None
    assert void(Place("x", 640, 1)) is not None
    assert void(Place("x", 960, 2)) is not None


# ------------------------------------------------------------------ incidents
def before(**changes: object) -> Before:
    return Before(**({"began": time.time() - 100, "elapsed": 0.0} | changes))  # type: ignore[arg-type]


def attempt(of: Before | None) -> Attempt:
    return Attempt("/nowhere", 2, time.time(), 0.0, of)


def test_the_seconds_of_an_incident() -> None:
    now = time.time()
    found = incident(attempt(before(began=now - 30, failure=Failure(now - 20, {"1": "worker died: SIGKILL"}))), 320, [])
    assert found is not None
    assert found.seconds_to_detect == pytest.approx(10, abs=1)
    assert found.seconds_to_restart == pytest.approx(20, abs=1)
    assert found.cause == "rank 1: worker died: SIGKILL"


def test_nobody_noticed_when_the_driver_was_lost() -> None:
    found = incident(attempt(before()), 0, [])
    assert found is not None
    assert found.seconds_to_detect is None
    assert found.seconds_to_restart == pytest.approx(100, abs=1)
    assert found.cause == LOST


@pytest.mark.parametrize("passed_over", [[], ["x: damaged"]])
def test_a_first_attempt(passed_over: list[str]) -> None:
    found = incident(attempt(None), 0, passed_over)
    assert (found is None) == (not passed_over)
    assert found is None or (found.cause, found.checkpoints_passed_over) == (UNUSABLE, passed_over)


ECHO = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2024"


def test_the_best_witness_tells_the_cause() -> None:
    failure = Failure(time.time(), {"0": ECHO, "1": "its node died"})
    assert cause(before(failure=failure)) == "rank 1: its node died"
    assert cause(before(failure=failure, stalled=("rank 2: no end of the phase 'step'",))).startswith("rank 2")
    assert cause(before(failure=Failure(time.time(), {"0": ECHO}))) == LOST
    assert cause(before(failure=Failure(time.time(), {"controller": "gone"}))) == "gone"


def test_goodput_is_the_share_that_counted() -> None:
    began = time.time() - 10
    fresh = Goodput(Attempt("/nowhere", 1, began))
    assert fresh.share == pytest.approx(0.0, abs=0.05)
    resumed = Goodput(Attempt("/nowhere", 2, began, elapsed=90.0), productive_before=50.0)
    assert resumed.share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("data", DAMAGED)
def test_no_damaged_record_keeps_the_next_attempt_from_starting(data: bytes, tmp_path: Path) -> None:
    first = attempts.take(str(tmp_path), 1)
    first.beat(64)
    first.stalled(0, "why")
    failed(tmp_path, time.time(), r0="x")
    write(tmp_path, 1, ("started", 0), ("crashed", 64))  # a crash without its cause
    folders = (attempts_of(str(tmp_path)), journal_of(str(tmp_path)))
    records = [files.join(folder, name) for folder in folders for name in files.list_names(folder)]
    assert len(records) > 4
    for record in records:
        kept = files.read_bytes(record)
        files.write_bytes(record, data)
        taken = attempts.take(str(tmp_path), 1)
        assert taken.before is not None and cause(taken.before)
        files.remove(files.join(attempts_of(str(tmp_path)), f"{taken.number:06d}.json"))
        files.write_bytes(record, kept)


@pytest.mark.parametrize("data", DAMAGED)
def test_no_damaged_record_of_an_end_raises(data: bytes, tmp_path: Path) -> None:
    folder = str(tmp_path)
    whole = json.dumps({"files": {}, "about": {"weights": "x"}}).encode()
    outcome = json.dumps({"status": "finished", "newer": {"a": 1}}).encode()
    done = files.join(final_of(folder), "DONE")
    files.write_bytes(done, whole)
    files.write_bytes(outcome_of(folder), outcome)
    assert finished(folder) is not None, "a field of a newer version is ignored"
    files.write_bytes(outcome_of(folder), data)
    assert finished(folder) is None
    files.write_bytes(outcome_of(folder), outcome)
    for damage in (data, b'{"files": {}}', b'{"files": {}, "about": {}}'):
        files.write_bytes(done, damage)
        assert finished(folder) is None
