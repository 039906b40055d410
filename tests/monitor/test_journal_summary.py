"""Glances at journals: the same figures as a whole reading gives, from few of its segments."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.monitor import journal_summary as glances
from orchestrator.monitor.journal_summary import JournalSummary, summarize_journal
from orchestrator.storage import file_io
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event, encode_event
from orchestrator.tracking.journal import make_segment_name

SIZE = 1000  # samples of an epoch


def write(folder: Path, attempt: int, *segments: list[Event], first: int = 1) -> None:
    """Segments as a writer leaves them."""
    for number, events in enumerate(segments, first):
        lines = [f'{{"writer": "w", "events": {len(events)}}}', *map(encode_event, events), ""]
        file_io.write_bytes(str(folder / make_segment_name(attempt, number)), "\n".join(lines).encode())


def event(kind: str, samples: int, **values: Any) -> Event:
    return Event(kind, float(samples), samples, values)


def started(samples: int, **values: Any) -> Event:
    return event("started", samples, samples_per_epoch=SIZE, **values)


def point(samples: int) -> Event:
    return event("metrics", samples, **{"train/step_loss": 1.0})


def epoch(number: int) -> Event:
    return event("epoch", number * SIZE, **{"train/epoch": float(number), "train/loss": 0.5})


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The segments that were read."""
    glances._read_segment.cache_clear()
    found: list[str] = []
    real = journal.read_segment

    def segment(folder: str, place: journal.Cursor) -> tuple[Event, ...]:
        found.append(make_segment_name(*place))
        return real(folder, place)

    monkeypatch.setattr(journal, "read_segment", segment)
    return found


def test_an_absent_journal_tells_nothing(tmp_path: Path) -> None:
    assert summarize_journal(str(tmp_path / "nowhere")) == JournalSummary()


def test_a_short_journal_is_read_whole(tmp_path: Path) -> None:
    incident = event("incident", 500, cause="worker lost")
    write(tmp_path, 1, [started(0)], [point(500), point(900)])
    write(tmp_path, 2, [incident], [started(500, workers=2)], [point(900), epoch(1), point(1200)])
    assert summarize_journal(str(tmp_path)) == JournalSummary(
        2, started(500, workers=2), (incident,), point(1200), epoch(1), (point(900), epoch(1), point(1200))
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reached", [5400, 5999, 6000, 6010])
def test_the_end_of_an_epoch_far_back_is_found_without_reading_all(
    tmp_path: Path, reads: list[str], reached: int, shared: bool
) -> None:
    segments: list[list[Event]] = [[started(0)]]
    for samples in range(10, reached + 1, 10):
        segments.append([point(samples)])
        if samples % SIZE == 0 and samples < 6000:  # the sixth is being validated
            if shared:
                segments[-1].append(epoch(samples // SIZE))
            else:
                segments.append([epoch(samples // SIZE)])
    write(tmp_path, 1, *segments)
    assert summarize_journal(str(tmp_path)).epoch == epoch(5)
    assert len(set(reads)) < 80
    reads.clear()
    summarize_journal(str(tmp_path))
    assert reads == []  # segments never change


def test_an_epoch_that_an_earlier_attempt_ended_is_found_there(tmp_path: Path) -> None:
    write(tmp_path, 1, [started(0)], [point(900), epoch(1)], [point(1900), epoch(2)], [point(2500)])
    write(tmp_path, 2, [started(2200)], *[[point(2200 + number)] for number in range(60)])
    assert summarize_journal(str(tmp_path)).epoch == epoch(2)
    write(tmp_path, 3, [started(1500)], *[[point(1500 + number)] for number in range(60)])
    # It was rolled back, and only the first counts.
    assert summarize_journal(str(tmp_path)).epoch == epoch(1)


def test_without_the_size_of_an_epoch_there_are_no_figures_from_far_back(tmp_path: Path) -> None:
    write(tmp_path, 1, [event("started", 0)], [epoch(1)], *[[point(1000 + number)] for number in range(60)])
    found = summarize_journal(str(tmp_path))
    assert found.epoch is None
    assert found.last == point(1059)


def test_damaged_segments_tell_nothing_and_hide_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, [started(0)], [point(900), epoch(1)], [point(1100)])
    file_io.write_bytes(str(tmp_path / make_segment_name(1, 2)), b"cut off")
    file_io.write_bytes(str(tmp_path / make_segment_name(1, 4)), b"")
    found = summarize_journal(str(tmp_path))
    assert (found.epoch, found.last) == (None, point(1100))
