import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from orchestrator.storage import file_io
from orchestrator.tracking import replay
from orchestrator.tracking import tracker as trackers
from orchestrator.tracking.journal import JournalWriter
from orchestrator.tracking.mlflow_tracker import MlflowTracker
from orchestrator.tracking.replay import JournalReplayer, ReplayedRun
from orchestrator.tracking.tracker import TrackedRun, Tracker, TrackingError
from tests.support.tracker import RecordingTracker

POLL = 0.02


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_MIN_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(trackers, "_MAX_RETRY_SECONDS", 0.1)


@pytest.fixture
def tracker() -> RecordingTracker:
    return RecordingTracker()


@pytest.fixture
def replayer(tracker: RecordingTracker) -> Iterator[JournalReplayer]:
    made = JournalReplayer(lambda: tracker, POLL)
    yield made
    made.stop({}, 5)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JournalWriter]:
    made = JournalWriter(str(tmp_path / "journal"), 0, flush_seconds=0.01)
    yield made
    made.close(5)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)


def follow(replayer: JournalReplayer, tmp_path: Path, key: str = "a") -> None:
    replayer.follow(TrackedRun(key, f"run {key}"), str(tmp_path / "journal"))


def test_events_become_points_incidents_and_an_outcome(
    tracker: RecordingTracker, replayer: JournalReplayer, writer: JournalWriter, tmp_path: Path
) -> None:
    follow(replayer, tmp_path)
    writer.append("metrics", samples=128, loss=2.5, note="text", good=True, deep={"a": 1})
    writer.append("metrics", loss=9.0)  # no clock: not on a curve
    writer.append("incident", samples=128, cause="worker lost", seconds=float("nan"))
    writer.append("epoch", samples=256, loss=2, top5=10.5)
    writer.append("finished", samples=256)
    assert writer.flush(5)
    assert replayer.drain(5)
    run = tracker.runs[replayer.wait_for_run_id("a", 5)]
    found = [(point.name, point.value, point.step) for point in run.points]
    assert found == [("loss", 2.5, 128), ("loss", 2.0, 256), ("top5", 10.5, 256)]
    assert run.tags["orchestrator.incidents"] == "1"
    (incident,) = json.loads(run.texts["incidents.json"])
    assert incident["samples"] == 128
    assert incident["values"] == {"cause": "worker lost", "seconds": "nan"}
    assert not replayer._runs["a"].pending
    writer.append("incident", samples=300, cause="again")
    assert writer.flush(5)
    assert replayer.drain(5)
    assert run.tags["orchestrator.incidents"] == "2"
    assert len(json.loads(run.texts["incidents.json"])) == 2


def test_an_outage_loses_nothing_and_is_logged_once(
    tracker: RecordingTracker,
    replayer: JournalReplayer,
    writer: JournalWriter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker.down = True
    follow(replayer, tmp_path)
    for step in range(1, 501):
        writer.append("metrics", samples=step, loss=float(step))
    assert writer.flush(5)
    assert not replayer.drain(0.3)
    with pytest.raises(TrackingError, match="recording tracker is down"):
        replayer.wait_for_run_id("a", 0.01)
    tracker.down = False
    assert replayer.drain(5)
    assert replayer.wait_for_run_id("a", 5) == "id-a"
    tracker.down = True
    writer.append("metrics", samples=501, loss=501.0)
    assert writer.flush(5)
    until(lambda: replayer._tracker_retry.failures > 0)
    tracker.down = False
    assert replayer.drain(5)
    assert [point.step for point in tracker.runs["id-a"].points] == list(range(1, 502))
    lines = [record.getMessage() for record in caplog.records if record.name == trackers.__name__]
    assert [line for line in lines if "trying again" in line] == [line for line in lines if "down" in line]
    assert len(lines) == 4, lines


def test_lost_answer_makes_no_duplicates(
    tracker: RecordingTracker, replayer: JournalReplayer, writer: JournalWriter, tmp_path: Path
) -> None:
    tracker.lossy = True
    follow(replayer, tmp_path)
    for step in range(1, 6001):  # more than one delivery
        writer.append("metrics", samples=step, loss=float(step))
    assert writer.flush(5)
    assert replayer.drain(10)
    assert [point.step for point in tracker.runs["id-a"].points] == list(range(1, 6001))


def test_second_driver_replays_from_the_start_without_duplicates(
    tracker: RecordingTracker, writer: JournalWriter, tmp_path: Path
) -> None:
    for step in (1, 2):
        writer.append("metrics", samples=step, loss=0.0)
        writer.append("incident", cause=str(step))
        assert writer.flush(5)
        replayer = JournalReplayer(lambda: tracker, POLL)
        follow(replayer, tmp_path)
        assert replayer.stop({"a": "KILLED"}, 5)
    run = tracker.runs["id-a"]
    assert [point.step for point in run.points] == [1, 2]
    assert run.tags["orchestrator.incidents"] == "2"


def test_a_slow_opening_delays_no_caller(tracker: RecordingTracker, tmp_path: Path) -> None:
    release, fails = threading.Event(), [ValueError("bad uri"), OSError("not yet")]

    def factory() -> Tracker:
        release.wait(20)
        if fails:
            raise fails.pop()
        return tracker

    started = time.monotonic()
    replayer = JournalReplayer(factory, POLL)
    follow(replayer, tmp_path)
    future = replayer.submit(lambda given: given.set_tags("id-a", {"x": "1"}))
    assert time.monotonic() - started < 10  # the opening takes 20
    release.set()
    assert replayer.wait_for_run_id("a", 5) == "id-a"
    future.result(5)
    assert tracker.runs["id-a"].tags["x"] == "1"
    assert replayer.stop({"a": "FINISHED"}, 5)


def test_parent_is_opened_first_and_by_key(tracker: RecordingTracker, replayer: JournalReplayer) -> None:
    replayer.follow(TrackedRun("parent", "ensemble"), None)
    for n in range(7):
        replayer.follow(TrackedRun(f"m{n}", f"member {n}"), None, parent_key="parent")
    assert replayer.drain(5)
    assert [tracker.runs[f"id-m{n}"].run.parent_id for n in range(7)] == ["id-parent"] * 7
    with pytest.raises(ValueError, match="'unknown'"):
        replayer.follow(TrackedRun("x", "x"), None, parent_key="unknown")
    with pytest.raises(ValueError, match="followed are"):
        replayer.close("unknown", "FINISHED")


def test_requests_keep_their_order_through_an_outage(tracker: RecordingTracker, replayer: JournalReplayer) -> None:
    replayer.follow(TrackedRun("a", "a"), None)
    replayer.wait_for_run_id("a", 5)
    tracker.down = True
    done: list[int] = []

    def request(n: int) -> Callable[[Tracker], None]:
        def act(given: Tracker) -> None:
            given.log_text("id-a", "f", str(n))
            done.append(n)

        return act

    futures = [replayer.submit(request(n)) for n in range(5)]
    time.sleep(0.2)
    assert (done, len(replayer._requests)) == ([], 5)
    tracker.down = False
    for future in futures:
        future.result(5)
    assert done == [0, 1, 2, 3, 4]


def test_a_failing_request_is_given_up(replayer: JournalReplayer, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def broken(_: Tracker) -> None:
        tries.append(1)
        raise KeyError("bug")

    first, second = replayer.submit(broken), replayer.submit(lambda tracker: tracker.check())
    assert isinstance(first.exception(5), KeyError)
    assert second.result(5) is None
    assert len(tries) == 1
    assert "given up" in caplog.text


def test_a_run_is_closed_although_its_storage_fails_for_a_moment(
    tracker: RecordingTracker,
    replayer: JournalReplayer,
    writer: JournalWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    follow(replayer, tmp_path)
    assert replayer.drain(5)
    failures = iter([file_io.StorageError("cannot list journal: timed out")])
    finish = ReplayedRun.finish

    def finish_later(run: ReplayedRun, *arguments: Any) -> None:
        for error in failures:
            raise error
        finish(run, *arguments)

    monkeypatch.setattr(ReplayedRun, "finish", finish_later)
    assert replayer.close("a", "FINISHED").exception(5) is None
    assert tracker.runs["id-a"].status == "FINISHED"
    assert replayer.stop({}, 5)


def test_an_error_of_one_run_does_not_affect_others(
    tracker: RecordingTracker, replayer: JournalReplayer, writer: JournalWriter, tmp_path: Path
) -> None:
    real = tracker.open_run

    def open_run(run: TrackedRun) -> str:
        if run.key == "bad":
            raise TrackingError("refused")
        return real(run)

    tracker.open_run = open_run  # type: ignore[method-assign]
    replayer.follow(TrackedRun("bad", "bad"), None)
    follow(replayer, tmp_path)
    writer.append("metrics", samples=1, loss=0.0)
    assert writer.flush(5)
    until(lambda: bool(tracker.runs.get("id-a") and tracker.runs["id-a"].points))
    assert not replayer.drain(0.2)
    with pytest.raises(TrackingError, match="refused"):
        replayer.wait_for_run_id("bad", 0.01)
    assert not replayer.stop({"a": "FINISHED", "bad": "FAILED"}, 2)
    assert tracker.runs["id-a"].status == "FINISHED"


def test_stop_closes_and_a_closed_run_can_be_followed_again(
    tracker: RecordingTracker, replayer: JournalReplayer, writer: JournalWriter, tmp_path: Path
) -> None:
    follow(replayer, tmp_path)
    assert replayer.drain(5)
    replayer.submit(lambda given: None).result(5)
    replayer._runs["a"].close("FAILED", tracker)
    calls = tracker.calls.count("log")
    assert replayer.drain(5)
    assert tracker.calls.count("log") == calls  # no heartbeat of a closed run
    follow(replayer, tmp_path)
    assert replayer.drain(5)
    assert tracker.runs["id-a"].status == "RUNNING"
    writer.append("metrics", samples=1, loss=0.0)
    assert writer.flush(5)
    assert replayer.stop({"a": "FINISHED"}, 5)
    assert tracker.runs["id-a"].status == "FINISHED"
    assert len(tracker.runs["id-a"].points) == 1
    with pytest.raises(RuntimeError, match="stopped"):
        replayer.submit(lambda given: None)


def test_stop_in_an_outage_says_what_is_left(
    tracker: RecordingTracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.down = True
    replayer = JournalReplayer(lambda: tracker, POLL)
    follow(replayer, tmp_path)
    waiting = replayer.submit(lambda given: None)
    started = time.monotonic()
    assert not replayer.stop({"a": "FINISHED"}, 1)
    assert time.monotonic() - started < 15  # of an outage without end
    assert replayer.first_error == "the recording tracker is down"
    assert caplog.text.count("is down") == 1
    assert isinstance(waiting.exception(5), TrackingError)


def test_a_damaged_segment_is_skipped_and_reported(
    tracker: RecordingTracker,
    replayer: JournalReplayer,
    writer: JournalWriter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    writer.append("metrics", samples=1, loss=0.0)
    assert writer.close(5)
    file_io.create_bytes(str(tmp_path / "journal" / "000000-000002.jsonl"), b"torn")
    later = JournalWriter(str(tmp_path / "journal"), 1, flush_seconds=0.01)
    later.append("metrics", samples=2, loss=0.0)
    assert later.close(5)
    with caplog.at_level(logging.ERROR, replay.__name__):
        follow(replayer, tmp_path)
        until(lambda: len(tracker.runs["id-a"].points) == 2 if "id-a" in tracker.runs else False)
    assert "000000-000002.jsonl" in caplog.text
    assert replayer.drain(5)
    assert tracker.runs["id-a"].tags["orchestrator.journal_segments_lost"] == "1"


def test_into_a_real_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for attempt, last in enumerate((300, 500)):
        writer = JournalWriter(str(tmp_path / "journal"), attempt, flush_seconds=0.05)
        replayer = JournalReplayer(lambda: MlflowTracker(uri, "e"), POLL)
        replayer.follow(TrackedRun("parent", "ensemble"), None)
        replayer.follow(TrackedRun("a", "a"), str(tmp_path / "journal"), parent_key="parent")
        # The second attempt repeats steps 201..300, as after a crash.
        for step in range(200 * attempt + 1, last + 1):
            writer.append("metrics", samples=step, loss=float(step))
        assert writer.close(5)
        assert replayer.stop({"a": "FINISHED", "parent": "FINISHED"}, 30)
        run_id = replayer.wait_for_run_id("a", 1)
        history = MlflowClient(uri, uri).get_metric_history(run_id, "loss")
        assert [metric.step for metric in history] == list(range(1, last + 1))


def test_a_request_waits_for_the_run_it_needs_and_others_pass_it(
    tracker: RecordingTracker, replayer: JournalReplayer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opening, asked = threading.Event(), threading.Event()
    original = tracker.open_run

    def slow(run: TrackedRun) -> str:
        if not opening.is_set():
            asked.set()
            raise TrackingError("not yet")
        return original(run)

    tracker.open_run = slow  # type: ignore[method-assign]
    follow(replayer, tmp_path)
    seen: list[str] = []
    needy = replayer.submit(lambda _: seen.append(replayer.wait_for_run_id("a", 0.0)), required_key="a")
    replayer.submit(lambda _: seen.append("other")).result(5)
    assert asked.wait(5)
    assert (seen, needy.done()) == (["other"], False)
    opening.set()
    needy.result(5)
    assert seen == ["other", replayer.wait_for_run_id("a", 0.0)]
    assert "request given up" not in caplog.text


def test_drain_does_not_wait_for_a_rejected_run(
    tracker: RecordingTracker,
    replayer: JournalReplayer,
    writer: JournalWriter,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    follow(replayer, tmp_path)
    replayer.follow(TrackedRun("other", "other"), None)
    assert replayer.drain(5)
    refuse = lambda *_: (_ for _ in ()).throw(TrackingError("the run was deleted"))  # noqa: E731
    real, tracker.log_metrics = tracker.log_metrics, refuse  # type: ignore[method-assign]
    writer.append("metrics", samples=1, loss=0.0)
    assert writer.flush(5)
    until(lambda: replayer._runs["a"].retry.is_permanent)
    called = time.monotonic()
    assert not replayer.drain(60)
    assert time.monotonic() - called < 30, "waiting changes nothing"
    with pytest.raises(TrackingError, match="was deleted"):
        replayer.wait_for_run_url("a", 1.0)
    tracker.log_metrics = real  # type: ignore[method-assign]  # a person restored it
    assert replayer.drain(5)
    assert replayer.wait_for_run_url("a", 1.0) == "recorded://id-a"
    assert len(tracker.runs["id-a"].points) == 1
    said = [record for record in caplog.records if "was deleted" in record.getMessage()]
    assert not any(record.exc_info for record in said), "a line, no traceback"
    assert "trying again" not in said[0].getMessage()


def test_a_rejected_request_fails_immediately_and_the_job_counts_as_unrecorded(
    tracker: RecordingTracker, caplog: pytest.LogCaptureFixture
) -> None:
    replayer = JournalReplayer(lambda: tracker, POLL)
    tries: list[int] = []

    def refused(_: Tracker) -> None:
        tries.append(1)
        raise TrackingError("no permission for artifacts")

    assert isinstance(replayer.submit(refused).exception(5), TrackingError)
    assert len(tries) == 1
    assert not replayer.stop({}, 5)
    assert replayer.first_error == "no permission for artifacts"
    (line,) = caplog.records
    assert not line.exc_info


def test_drain_does_not_wait_for_children_of_a_rejected_run(
    tracker: RecordingTracker, replayer: JournalReplayer
) -> None:
    tracker.open_run = lambda run: (_ for _ in ()).throw(TrackingError("refused"))  # type: ignore[method-assign]
    replayer.follow(TrackedRun("parent", "ensemble"), None)
    replayer.follow(TrackedRun("m", "member"), None, parent_key="parent")
    replayer.submit(lambda _: None, required_key="m")
    called = time.monotonic()
    assert not replayer.drain(60)
    assert time.monotonic() - called < 30


def test_a_deleted_run_is_reported_in_one_line_and_recorded_anew_by_the_next_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, uri)
    writer = JournalWriter(str(tmp_path / "journal"), 0, flush_seconds=0.05)
    replayer = JournalReplayer(lambda: MlflowTracker(uri, "e"), POLL)
    follow(replayer, tmp_path)
    writer.append("metrics", samples=1, loss=1.0)
    assert writer.flush(5)
    assert replayer.drain(30)
    deleted = replayer.wait_for_run_id("a", 1)
    client.delete_run(deleted)
    writer.append("metrics", samples=2, loss=2.0)
    assert writer.close(5)
    called = time.monotonic()
    assert not replayer.stop({"a": "FINISHED"}, 60)
    assert time.monotonic() - called < 30
    assert f"mlflow runs restore --run-id {deleted}" in replayer.first_error
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not line.exc_info
    again = JournalReplayer(lambda: MlflowTracker(uri, "e"), POLL)
    follow(again, tmp_path)
    assert again.stop({"a": "FINISHED"}, 30)
    anew = again.wait_for_run_id("a", 1)
    assert anew != deleted
    assert [metric.step for metric in client.get_metric_history(anew, "loss")] == [1, 2]
