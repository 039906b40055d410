import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.storage import file_io
from orchestrator.tracking import journal
from orchestrator.tracking.journal import Cursor, DamagedSegmentError, JournalWriter, read_events

NEVER = 3600.0


class Storage:
    """files.create_bytes that can fail, before or after the deed."""

    def __init__(self) -> None:
        self.real = file_io.create_bytes
        self.fail_next = 0
        self.lose_answer_next = 0
        self.created: list[str] = []

    def create_bytes(self, url: str, data: bytes) -> bool:
        if self.fail_next:
            self.fail_next -= 1
            raise OSError("storage is down")
        made = self.real(url, data)
        self.created.append(url)
        if self.lose_answer_next:
            self.lose_answer_next -= 1
            raise TimeoutError("the answer was lost")
        return made


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    fake = Storage()
    monkeypatch.setattr(file_io, "create_bytes", fake.create_bytes)
    monkeypatch.setattr(journal, "_FLUSH_WAIT_SECONDS", 0.01)
    return fake


def numbers(folder: str) -> list[object]:
    return [event.values["n"] for event in read_events(folder)[0] if "n" in event.values]


def test_events_come_back_in_order(tmp_path: Path) -> None:
    folder = str(tmp_path / "journal")
    writer = JournalWriter(folder, attempt=0, flush_seconds=NEVER)
    before = time.time()
    writer.append("metrics", samples=128, n=0, loss=float("nan"))
    assert writer.flush(5)
    writer.append("finished", n=1)
    assert writer.close(5)
    events, cursor = read_events(folder, None)
    assert [(event.kind, event.samples, event.values["n"]) for event in events] == [
        ("metrics", 128, 0),
        ("finished", None, 1),
    ]
    assert before <= events[0].time <= time.time()
    assert cursor == Cursor(0, 2) == Cursor(*json.loads(json.dumps(cursor)))


def test_background_thread_uploads_without_being_asked(tmp_path: Path) -> None:
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=0.05)
    writer.append("metrics", n=0)
    deadline = time.monotonic() + 5
    while not numbers(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert numbers(str(tmp_path)) == [0]
    assert writer.close(5)


def test_cursor_reads_only_new_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter(str(tmp_path), 3, flush_seconds=NEVER)
    writer.append("epoch", n=0)
    writer.flush(5)
    events, cursor = read_events(str(tmp_path))
    writer.append("epoch", n=1)
    writer.close(5)
    seen = []
    real = file_io.read_bytes
    monkeypatch.setattr(file_io, "read_bytes", lambda url: seen.append(url) or real(url))  # type: ignore[func-returns-value]
    events, cursor = read_events(str(tmp_path), cursor)
    assert [event.values["n"] for event in events] == [1]
    assert [Path(url).name for url in seen] == ["000003-000002.jsonl"]
    assert read_events(str(tmp_path), cursor) == ([], cursor)


def test_absent_journal_is_empty(tmp_path: Path) -> None:
    events, cursor = read_events(str(tmp_path / "nowhere"))
    assert events == []
    assert read_events(str(tmp_path / "nowhere"), cursor) == ([], cursor)


def test_limit_reads_in_parts(tmp_path: Path) -> None:
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER)
    for n in range(5):
        writer.append("metrics", n=n)
        writer.flush(5)
    writer.close(5)
    first, cursor = read_events(str(tmp_path), None, limit=3)
    rest, _ = read_events(str(tmp_path), cursor)
    assert [len(first), len(rest)] == [3, 2]


def test_events_wait_while_storage_fails(tmp_path: Path, storage: Storage) -> None:
    storage.fail_next = 1_000_000
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=0.01)
    for n in range(100):
        writer.append("metrics", n=n)
    assert not writer.flush(0.2)
    storage.fail_next = 0
    assert writer.close(5)
    assert numbers(str(tmp_path)) == list(range(100))


def test_append_does_not_wait_for_storage_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    real = file_io.create_bytes
    monkeypatch.setattr(file_io, "create_bytes", lambda url, data: release.wait(20) and real(url, data))
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=0.01)
    writer.append("metrics", n=0)
    time.sleep(0.1)
    started = time.monotonic()
    for n in range(1, 1000):
        writer.append("metrics", n=n)
    assert not writer.flush(0.1)
    # Storage hangs for 20 s; a busy machine may take a few for the rest.
    assert time.monotonic() - started < 15.0
    release.set()
    assert writer.close(5)
    assert numbers(str(tmp_path)) == list(range(1000))


def test_lost_answer_is_not_another_writer(tmp_path: Path, storage: Storage) -> None:
    storage.lose_answer_next = 1
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER)
    writer.append("metrics", n=0)
    assert writer.flush(5)
    writer.append("metrics", n=1)
    assert writer.close(5)
    assert not writer.is_fenced
    assert numbers(str(tmp_path)) == [0, 1]


def test_a_full_queue_drops_the_oldest_metrics_first_and_counts_them(tmp_path: Path, storage: Storage) -> None:
    storage.fail_next = 1_000_000
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER, capacity=4)
    writer.append("incident", n=0)
    for n in range(1, 6):
        writer.append("metrics", n=n)
    writer.append("finished", n=6)
    storage.fail_next = 0
    assert writer.close(5)
    events, _ = read_events(str(tmp_path))
    assert [event.values.get("n") for event in events] == [None, 0, 4, 5, 6]
    assert events[0].kind == "journal_dropped"
    assert events[0].values == {"metrics": 3}


def test_a_full_queue_without_metrics_drops_the_oldest(tmp_path: Path, storage: Storage) -> None:
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER, capacity=2)
    for n in range(5):
        writer.append("incident", n=n)
    assert writer.close(5)
    assert numbers(str(tmp_path)) == [3, 4]
    assert read_events(str(tmp_path))[0][0].values == {"others": 3}


def test_segment_of_another_writer_fences(tmp_path: Path) -> None:
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER)
    writer.append("metrics", n=0)
    assert writer.flush(5)
    other = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER)
    other.append("metrics", n=1)
    assert other.close(5)
    writer.append("metrics", n=2)
    assert not writer.flush(5)
    assert writer.is_fenced
    writer.append("metrics", n=3)
    assert not writer.close(0.1)
    assert numbers(str(tmp_path)) == [0, 1]


def test_event_after_close_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = JournalWriter(str(tmp_path), 0)
    assert writer.close(5)
    writer.append("metrics", n=0)
    assert "after close" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b"not json\n", b'{"writer":"x","events":2}\n{}\n', b"\xff\n", b"[]\n"])
def test_damaged_segment_is_named_after_what_is_whole(tmp_path: Path, damage: bytes) -> None:
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER)
    writer.append("metrics", n=0)
    assert writer.close(5)
    file_io.create_bytes(str(tmp_path / "000000-000002.jsonl"), damage)
    events, cursor = read_events(str(tmp_path))
    assert (len(events), cursor) == (1, Cursor(0, 1))
    with pytest.raises(DamagedSegmentError, match=r"000000-000002\.jsonl") as caught:
        read_events(str(tmp_path), cursor)
    assert caught.value.cursor == Cursor(0, 2)


def test_segment_cut_at_a_line_end_is_damaged(tmp_path: Path) -> None:
    writer = JournalWriter(str(tmp_path), 0, flush_seconds=NEVER)
    writer.append("metrics", n=0)
    writer.append("metrics", n=1)
    assert writer.close(5)
    segment = tmp_path / "000000-000001.jsonl"
    segment.write_bytes(b"".join(segment.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(DamagedSegmentError, match="promises 2 events, 1 "):
        read_events(str(tmp_path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[str]]:
    yield (str(tmp_path_factory.mktemp("journal")) for _ in iter(int, 1))


@settings(max_examples=60)
@given(st.lists(st.sampled_from("afflrcn"), max_size=30))
def test_any_interleaving_gives_every_event_once_in_order(folders: Iterator[str], steps: list[str]) -> None:
    """a append, f flush, l flush whose answer is lost, r re-open the attempt, c crash, n next attempt."""
    folder, storage, patch = next(folders), Storage(), pytest.MonkeyPatch()
    patch.setattr(file_io, "create_bytes", storage.create_bytes)
    patch.setattr(journal, "_FLUSH_WAIT_SECONDS", 0.001)
    attempt, count, waiting = 0, 0, []
    stored: list[int] = []
    seen: list[object] = []
    cursor = None
    writer = JournalWriter(folder, attempt, flush_seconds=NEVER)
    try:
        for step in steps:
            if step == "a":
                writer.append("metrics", samples=count, n=count)
                waiting.append(count)
                count += 1
                continue
            if step == "c":
                # A killed process: what was not flushed is gone, nothing else is.
                writer._lines.clear()
                waiting = []
            storage.lose_answer_next = int(step == "l" and bool(waiting))
            assert writer.flush(5)
            stored, waiting = stored + waiting, []
            if step in "rcn":
                assert writer.close(5)
                attempt += step == "n"
                writer = JournalWriter(folder, attempt, flush_seconds=NEVER)
            events, cursor = read_events(folder, cursor)
            seen += [event.values["n"] for event in events]
            assert seen == stored == numbers(folder)
    finally:
        writer.close(5)
        patch.undo()


def test_worker_imports_neither_mlflow_nor_matplotlib_nor_torch() -> None:
    heavy = "{'mlflow', 'matplotlib', 'torch', 'ray'}"
    program = f"import sys, orchestrator.tracking.journal; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_object_store_works_as_well_as_a_folder() -> None:
    folder = "memory://journal-of-a-test"
    try:
        writer = JournalWriter(folder, 0, flush_seconds=NEVER)
        for n in range(20):
            writer.append("metrics", n=n)
            assert writer.flush(5)
        assert writer.close(5)
        assert numbers(folder) == list(range(20))
    finally:
        file_io.remove(folder)
