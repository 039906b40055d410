"""Attempts: numbers, what the next one learns of the one before, checkpoints that no longer count."""

import json
import time
from pathlib import Path

import pytest

from orchestrator.checkpoint.checkpoint_dir import CheckpointFolder
from orchestrator.storage import file_io
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import JournalWriter
from orchestrator.training import attempts
from orchestrator.training.attempts import (
    CHECKPOINT_UNUSABLE_CAUSE,
    WORKER_LOST_CAUSE,
    Attempt,
    Goodput,
    PreviousAttempt,
    build_incident,
    find_failure_cause,
)
from orchestrator.training.run_dir import (
    get_attempts_dir,
    get_final_weights_dir,
    get_journal_dir,
    get_outcome_path,
    load_finished_outcome,
)
from tests.support.damage import DAMAGED


def write(folder: Path, attempt: int, *events: tuple[str, int], **values: object) -> None:
    writer = JournalWriter(get_journal_dir(str(folder)), attempt)
    for kind, samples in events:
        writer.append(kind, samples, **values)
    assert writer.close(10)


def failed(folder: Path, moment: float, **causes: str) -> None:
    about = {"time": moment, "causes": {rank.strip("r"): text for rank, text in causes.items()}}
    file_io.write_bytes(
        file_io.join(get_attempts_dir(str(folder)), f"failed-{round(1000 * moment)}.json"), json.dumps(about).encode()
    )


def test_numbers_go_up_and_no_two_have_one(tmp_path: Path) -> None:
    first = attempts.create_attempt(str(tmp_path), 1)
    assert (first.number, first.previous, first.elapsed_seconds) == (1, None, 0.0)
    assert not first.is_superseded()
    second = attempts.create_attempt(str(tmp_path), 3)
    assert second.number == 2
    assert first.is_superseded()
    assert not second.is_superseded()


def test_other_files_do_not_count_as_attempts(tmp_path: Path) -> None:
    first = attempts.create_attempt(str(tmp_path), 1)
    first.write_heartbeat(64)
    first.record_resume(0)
    first.record_stall(2, "why")
    failed(tmp_path, time.time(), r0="x")
    assert attempts.create_attempt(str(tmp_path), 1).number == 2


def test_what_is_known_of_the_attempt_before(tmp_path: Path) -> None:
    first = attempts.create_attempt(str(tmp_path), 2)
    write(tmp_path, 1, ("started", 0), ("metrics", 320))
    first.write_heartbeat(640)
    first.record_stall(1, "rank 1: no end")
    moment = time.time() + 5
    failed(tmp_path, moment, r0="its node died")
    failed(tmp_path, moment + 1, r0="later")
    before = attempts.create_attempt(str(tmp_path), 2).previous
    assert before is not None
    assert not before.ended_cleanly
    assert before.samples == 640
    assert before.stall_causes == ("rank 1: no end",)
    assert before.failure is not None
    assert before.failure.values == {"0": "its node died"}
    assert before.failure.time == pytest.approx(moment, abs=0.001)
    assert before.heartbeat is not None
    assert before.last_seen == max(before.heartbeat.time, before.last_event.time if before.last_event else 0)


def test_a_failure_before_the_attempt_began_is_not_its_own(tmp_path: Path) -> None:
    failed(tmp_path, time.time() - 60, r0="long ago")
    attempts.create_attempt(str(tmp_path), 1)
    before = attempts.create_attempt(str(tmp_path), 1).previous
    assert before is not None
    assert before.failure is None


def test_events_of_an_earlier_attempt_are_not_the_last_ones(tmp_path: Path) -> None:
    attempts.create_attempt(str(tmp_path), 1)
    write(tmp_path, 1, ("stopped", 320))
    attempts.create_attempt(str(tmp_path), 1)
    before = attempts.create_attempt(str(tmp_path), 1).previous
    assert before is not None
    assert before.last_event is None
    assert not before.ended_cleanly


def test_damaged_records_keep_no_attempt_from_starting(tmp_path: Path) -> None:
    first = attempts.create_attempt(str(tmp_path), 1)
    first.write_heartbeat(1)
    folder = get_attempts_dir(str(tmp_path))
    for name in file_io.list_names(folder):
        file_io.write_bytes(file_io.join(folder, name), b"{half")
    second = attempts.create_attempt(str(tmp_path), 1)
    assert second.number == 2
    assert second.previous is not None
    assert second.previous.samples == 0


def test_a_requested_pause_does_not_count(tmp_path: Path) -> None:
    """Attempt 1 ran 10 s and was stopped, a pause, attempt 2 was killed after 5 s, found dead 20 s later."""
    folder = get_attempts_dir(str(tmp_path))
    now = time.time()
    file_io.write_bytes(file_io.join(folder, "000001.json"), json.dumps({"time": now - 1000, "elapsed": 0.0}).encode())
    file_io.write_bytes(file_io.join(folder, "000001.beat"), json.dumps({"time": now - 990, "samples": 8}).encode())
    write(tmp_path, 1)
    writer = JournalWriter(get_journal_dir(str(tmp_path)), 1)
    writer.append("stopped", 8)
    assert writer.close(10)
    second = attempts.create_attempt(str(tmp_path), 1)
    assert second.elapsed_seconds == pytest.approx(1000, abs=5), "its last sign of life is the event, of now"
    third = attempts.create_attempt(str(tmp_path), 1)
    assert third.elapsed_seconds == pytest.approx(1000, abs=5)


# ------------------------------------------------------------------ what no longer counts
def test_checkpoints_beyond_where_a_later_attempt_began_are_void(tmp_path: Path) -> None:
    second = Attempt(get_attempts_dir(str(tmp_path)), 2, 0.0)
    void = attempts.load_stale_checkpoint_check(str(tmp_path))
    assert void(CheckpointFolder("x", 640, 1)) is None
    second.record_resume(320)
    void = attempts.load_stale_checkpoint_check(str(tmp_path))
    assert void(CheckpointFolder("x", 320, 1)) is None
    assert "attempt 2" in str(void(CheckpointFolder("x", 640, 1)))
    assert void(CheckpointFolder("x", 640, 2)) is None
    assert void(CheckpointFolder("x", 640, 3)) is None


def test_a_later_attempt_that_began_farther_voids_nothing(tmp_path: Path) -> None:
    Attempt(get_attempts_dir(str(tmp_path)), 2, 0.0).record_resume(320)
    Attempt(get_attempts_dir(str(tmp_path)), 3, 0.0).record_resume(640)
    void = attempts.load_stale_checkpoint_check(str(tmp_path))
    assert void(CheckpointFolder("x", 640, 2)) is None
    assert void(CheckpointFolder("x", 640, 1)) is not None
    assert void(CheckpointFolder("x", 960, 2)) is not None


# ------------------------------------------------------------------ incidents
def before(**changes: object) -> PreviousAttempt:
    return PreviousAttempt(**({"start_time": time.time() - 100, "elapsed_seconds": 0.0} | changes))  # type: ignore[arg-type]


def attempt(of: PreviousAttempt | None) -> Attempt:
    return Attempt("/nowhere", 2, time.time(), 0.0, of)


def test_the_seconds_of_an_incident() -> None:
    now = time.time()
    found = build_incident(
        attempt(before(start_time=now - 30, failure=Event("failure", now - 20, values={"1": "worker died: SIGKILL"}))),
        320,
        [],
    )
    assert found is not None
    assert found.seconds_to_detect == pytest.approx(10, abs=1)
    assert found.seconds_to_restart == pytest.approx(20, abs=1)
    assert found.cause == "rank 1: worker died: SIGKILL"


def test_a_lost_driver_leaves_no_time_of_detection() -> None:
    found = build_incident(attempt(before()), 0, [])
    assert found is not None
    assert found.seconds_to_detect is None
    assert found.seconds_to_restart == pytest.approx(100, abs=1)
    assert found.cause == WORKER_LOST_CAUSE


@pytest.mark.parametrize("passed_over", [[], ["x: damaged"]])
def test_a_first_attempt(passed_over: list[str]) -> None:
    found = build_incident(attempt(None), 0, passed_over)
    assert (found is None) == (not passed_over)
    assert found is None or (found.cause, found.checkpoints_passed_over) == (CHECKPOINT_UNUSABLE_CAUSE, passed_over)


ECHO = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2024"


def test_the_best_witness_tells_the_cause() -> None:
    failure = Event("failure", time.time(), values={"0": ECHO, "1": "its node died"})
    assert find_failure_cause(before(failure=failure)) == "rank 1: its node died"
    assert find_failure_cause(before(failure=failure, stall_causes=("rank 2: no end of the phase 'step'",))).startswith(
        "rank 2"
    )
    assert find_failure_cause(before(failure=Event("failure", time.time(), values={"0": ECHO}))) == WORKER_LOST_CAUSE
    assert find_failure_cause(before(failure=Event("failure", time.time(), values={"controller": "gone"}))) == "gone"


def test_goodput_is_the_share_that_counted() -> None:
    began = time.time() - 10
    fresh = Goodput(Attempt("/nowhere", 1, began))
    assert fresh.productive_share == pytest.approx(0.0, abs=0.05)
    resumed = Goodput(Attempt("/nowhere", 2, began, elapsed_seconds=90.0), productive_seconds_before=50.0)
    assert resumed.productive_share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("data", DAMAGED)
def test_no_damaged_record_keeps_the_next_attempt_from_starting(data: bytes, tmp_path: Path) -> None:
    first = attempts.create_attempt(str(tmp_path), 1)
    first.write_heartbeat(64)
    first.record_stall(0, "why")
    failed(tmp_path, time.time(), r0="x")
    write(tmp_path, 1, ("started", 0), ("crashed", 64))  # a crash without its cause
    folders = (get_attempts_dir(str(tmp_path)), get_journal_dir(str(tmp_path)))
    records = [file_io.join(folder, name) for folder in folders for name in file_io.list_names(folder)]
    assert len(records) > 4
    for record in records:
        kept = file_io.read_bytes(record)
        file_io.write_bytes(record, data)
        taken = attempts.create_attempt(str(tmp_path), 1)
        assert taken.previous is not None and find_failure_cause(taken.previous)
        file_io.remove(file_io.join(get_attempts_dir(str(tmp_path)), f"{taken.number:06d}.json"))
        file_io.write_bytes(record, kept)


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_record_of_an_end_is_named_and_not_raised(
    data: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path)
    whole = json.dumps({"files": {}, "about": {"weights": "x"}}).encode()
    outcome = json.dumps({"status": "finished", "newer": {"a": 1}}).encode()
    done = file_io.join(get_final_weights_dir(folder), "DONE")
    file_io.write_bytes(done, whole)
    file_io.write_bytes(get_outcome_path(folder), outcome)
    assert load_finished_outcome(folder) is not None, "a field of a newer version is ignored"
    assert not caplog.text
    file_io.write_bytes(get_outcome_path(folder), data)
    assert load_finished_outcome(folder) is None
    assert f"{get_outcome_path(folder)}: damaged: " in caplog.text
    file_io.write_bytes(get_outcome_path(folder), outcome)
    for damage in (data, b'{"files": {}}', b'{"files": {}, "about": {}}'):
        caplog.clear()
        file_io.write_bytes(done, damage)
        assert load_finished_outcome(folder) is None
        assert f"rerun its training: {done}: " in caplog.text
