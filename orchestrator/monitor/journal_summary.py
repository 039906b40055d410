"""What a journal tells at a glance: the beginnings of its attempts and its end, not the hours between.

A long run's journal is tens of thousands of objects. Segments never change, so each is read once by a process.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

from orchestrator.monitor.formatting import parse_int, parse_loss
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event, JournalError
from orchestrator.tracking.journal import Cursor

TAIL_SEGMENTS = 24  # segments read from the end
_HEAD_SEGMENTS = 3  # segments of an attempt within which its steps begin
_READ_BATCH = 8  # segments read at once


@dataclass(frozen=True)
class JournalSummary:
    """What a journal tells."""

    attempt: int = 0  # the last one that wrote to it
    started: Event | None = None  # when that one's steps began
    incidents: tuple[Event, ...] = ()
    last: Event | None = None
    epoch: Event | None = None  # the last one that ended
    points: tuple[Event, ...] = ()  # of the loss curve, of the last attempt, as far as the end was read


def summarize_journal(folder: str) -> JournalSummary:
    """What the journal in `folder` tells; damaged segments tell nothing. Storage errors pass through."""
    places = journal.list_segments(folder)
    if not places:
        return JournalSummary()
    attempts = sorted({place.attempt for place in places})
    by_attempt = {one: [place for place in places if place.attempt == one] for one in attempts}
    heads: dict[int, tuple[Event, ...]] = {}
    with ThreadPoolExecutor(_READ_BATCH, "glance") as pool:
        for one, head in zip(attempts, pool.map(partial(_read_head, folder), by_attempt.values()), strict=True):
            heads[one] = head
        tail = _read_tail(folder, places, pool)
    starts = {one: event for one, head in heads.items() for event in head if event.kind == "started"}
    newest = attempts[-1]
    ended = [event for _, event in tail if event.kind == "epoch"]
    points = [event for place, event in tail if place.attempt == newest and parse_loss(event) is not None]
    return JournalSummary(
        newest,
        starts.get(newest),
        tuple(event for head in heads.values() for event in head if event.kind == "incident"),
        tail[-1][1] if tail else None,
        ended[-1] if ended else _find_last_epoch(folder, by_attempt, starts, tail),
        tuple(points),
    )


def _read_head(folder: str, places: Sequence[Cursor]) -> tuple[Event, ...]:
    """The events of an attempt up to the beginning of its steps."""
    found: list[Event] = []
    for place in places[:_HEAD_SEGMENTS]:
        found += _read_segment(folder, place)
        if any(event.kind == "started" for event in found):
            break
    return tuple(found)


def _read_tail(folder: str, places: Sequence[Cursor], pool: ThreadPoolExecutor) -> list[tuple[Cursor, Event]]:
    """The last events, back to the end of an epoch if it is near."""
    found: list[tuple[Cursor, Event]] = []
    for end in range(len(places), max(0, len(places) - TAIL_SEGMENTS), -_READ_BATCH):
        group = places[max(0, end - _READ_BATCH) : end]
        read = pool.map(partial(_read_segment, folder), group)
        found[:0] = [(place, event) for place, events in zip(group, read, strict=True) for event in events]
        if any(event.kind == "epoch" for _, event in found):
            break
    return found


def _find_last_epoch(
    folder: str,
    by_attempt: dict[int, list[Cursor]],
    starts: dict[int, Event],
    tail: Sequence[tuple[Cursor, Event]],
) -> Event | None:
    """The end of the last epoch, found by bisection: within an attempt samples only grow."""
    sizes = [parse_int(event.values.get("samples_per_epoch")) for event in starts.values()]
    size = next((one for one in reversed(sizes) if one), 0)
    samples = max((event.samples or 0 for _, event in tail), default=0)
    if not size or samples < size:
        return None
    # The last one may have no event: its validation is under way, or died.
    for boundary in (samples // size * size, samples // size * size - size):
        for attempt in sorted(by_attempt, reverse=True):
            start = starts.get(attempt)
            if start is None or (start.samples or 0) > boundary:
                continue
            if (found := _find_epoch_event(folder, by_attempt[attempt], boundary)) is not None:
                return found
    return None


def _find_epoch_event(folder: str, places: Sequence[Cursor], samples: int) -> Event | None:
    """The "epoch" event at that many samples among the segments of an attempt."""
    position = bisect_right(places, samples, key=lambda place: _get_last_sample(folder, place))
    # It shares a segment with what comes after it, or is the last thing before.
    for place in places[position::-1] if position < len(places) else places[::-1]:
        events = _read_segment(folder, place)
        for event in events:
            if event.kind == "epoch" and event.samples == samples:
                return event
        if events and _get_last_sample(folder, place) < samples:
            return None
    return None


def _get_last_sample(folder: str, place: Cursor) -> int:
    return max((event.samples or 0 for event in _read_segment(folder, place)), default=0)


@lru_cache(maxsize=2048)
def _read_segment(folder: str, place: Cursor) -> tuple[Event, ...]:
    try:
        return journal.read_segment(folder, place)
    except (JournalError, FileNotFoundError):
        return ()
