"""Glances at journals: the same figures as a whole reading gives, from few of its segments."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.fleet import glance as glances
from orchestrator.fleet.glance import Glance, glance
from orchestrator.storage import files
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event, encode
from orchestrator.tracking.journal import segment_name

SIZE = 1000  # samples of an epoch


def write(folder: Path, attempt: int, *segments: list[Event], first: int = 1) -> None:
    """Segments as a writer leaves them."""
    for number, events in enumerate(segments, first):
        lines = [f'{{"writer": "w", "events": {len(events)}}}', *map(encode, events), ""]
        files.write_bytes(str(folder / segment_name(attempt, number)), "\n".join(lines).encode())


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
    glances._segment.cache_clear()
    found: list[str] = []
    real = journal.segment

    def segment(folder: str, place: journal.Cursor) -> tuple[Event, ...]:
        found.append(segment_name(*place))
        return real(folder, place)

    monkeypatch.setattr(journal, "segment", segment)
    return found


def test_an_absent_journal_tells_nothing(tmp_path: Path) -> None:
    assert glance(str(tmp_path / "nowhere")) == Glance()


def test_a_short_journal_is_told_as_it_is(tmp_path: Path) -> None:
    incident = event("incident", 500, cause="worker lost")
    write(tmp_path, 1, [started(0)], [point(500), point(900)])
    write(tmp_path, 2, [incident], [started(500, workers=2)], [point(900), epoch(1), point(1200)])
    assert glance(str(tmp_path)) == Glance(
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
    assert glance(str(tmp_path)).epoch == epoch(5)
    assert len(set(reads)) < 80
    reads.clear()
    glance(str(tmp_path))
    assert reads == []  # segments never change


def test_an_epoch_that_an_earlier_attempt_ended_is_found_there(tmp_path: Path) -> None:
    write(tmp_path, 1, [started(0)], [point(900), epoch(1)], [point(1900), epoch(2)], [point(2500)])
    write(tmp_path, 2, [started(2200)], *[[point(2200 + number)] for number in range(60)])
    assert glance(str(tmp_path)).epoch == epoch(2)
    write(tmp_path, 3, [started(1500)], *[[point(1500 + number)] for number in range(60)])
    # It was rolled back, and only the first counts.
    assert glance(str(tmp_path)).epoch == epoch(1)


def test_without_the_size_of_an_epoch_there_are_no_figures_from_far_back(tmp_path: Path) -> None:
    write(tmp_path, 1, [event("started", 0)], [epoch(1)], *[[point(1000 + number)] for number in range(60)])
    found = glance(str(tmp_path))
    assert found.epoch is None
    assert found.last == point(1059)


def test_damaged_segments_tell_nothing_and_hide_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, [started(0)], [point(900), epoch(1)], [point(1100)])
    files.write_bytes(str(tmp_path / segment_name(1, 2)), b"cut off")
    files.write_bytes(str(tmp_path / segment_name(1, 4)), b"")
    found = glance(str(tmp_path))
    assert (found.epoch, found.last) == (None, point(1100))
