"""Metrics in a journal's events, and a summary of a journal that reads its starts and its end, not what is between.

A long run's journal is tens of thousands of objects. Segments never change, so a process reads each of them once.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

from orchestrator.tracking import journal
from orchestrator.tracking.events import Event, JournalError
from orchestrator.tracking.journal import Cursor

TAIL_SEGMENTS = 24  # segments read from the end
_HEAD_SEGMENTS = 3  # segments of an attempt within which its steps begin
_READ_BATCH = 8  # segments read at the same time


@dataclass(frozen=True)
class EpochMetrics:
    """Metrics of an epoch; errors in percent, those of the averaged weights as soon as there are any."""

    epoch: int
    loss: float | None
    images_per_second: float | None
    top1_error: float | None
    top5_error: float | None
    goodput: float | None = None  # share of the run's time whose work counts


NO_METRICS = EpochMetrics(0, None, None, None, None)


def parse_epoch_metrics(event: Event) -> EpochMetrics:
    """Parse the metrics of an "epoch" event."""
    values = event.values
    kind = "averaged" if "validation/averaged_top1_error" in values else "raw"
    return EpochMetrics(
        parse_int(values.get("train/epoch")) or 0,
        parse_float(values.get("train/loss")),
        parse_float(values.get("train/images_per_second")),
        parse_float(values.get(f"validation/{kind}_top1_error")),
        parse_float(values.get(f"validation/{kind}_top5_error")),
        parse_float(values.get("train/goodput")),
    )


def parse_loss(event: Event) -> float | None:
    """Parse the loss of an event: of the last steps, or as earlier versions name it."""
    return parse_float(event.values.get("train/step_loss", event.values.get("train/loss")))


def parse_float(value: object) -> float | None:
    """Return the value if it is a number."""
    return float(value) if isinstance(value, int | float) else None


def parse_int(value: object) -> int | None:
    """Return the value as a whole number if it is a finite number."""
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class JournalSummary:
    """The state of a run as its journal records it."""

    attempt: int = 0  # the last one that wrote to it
    started: Event | None = None  # the start of that attempt's steps
    incidents: tuple[Event, ...] = ()
    last: Event | None = None
    epoch: Event | None = None  # the last one that ended
    points: tuple[Event, ...] = ()  # of the loss curve, of the last attempt, as far as the end was read


def summarize_journal(folder: str) -> JournalSummary:
    """Summarize the journal in `folder`; damaged segments are left out. Storage errors pass through."""
    cursors = journal.list_segments(folder)
    if not cursors:
        return JournalSummary()
    by_attempt: dict[int, list[Cursor]] = {}
    for cursor in cursors:
        by_attempt.setdefault(cursor.attempt, []).append(cursor)
    with ThreadPoolExecutor(_READ_BATCH, "journal-summary") as pool:
        heads = dict(zip(by_attempt, pool.map(partial(_read_head, folder), by_attempt.values()), strict=True))
        tail = _read_tail(folder, cursors, pool)
    starts = {attempt: event for attempt, head in heads.items() for event in head if event.kind == "started"}
    newest = max(by_attempt)
    epochs = [event for _, event in tail if event.kind == "epoch"]
    points = [event for cursor, event in tail if cursor.attempt == newest and parse_loss(event) is not None]
    return JournalSummary(
        newest,
        starts.get(newest),
        tuple(event for head in heads.values() for event in head if event.kind == "incident"),
        tail[-1][1] if tail else None,
        epochs[-1] if epochs else _find_last_epoch(folder, by_attempt, starts),
        tuple(points),
    )


def _read_head(folder: str, cursors: Sequence[Cursor]) -> tuple[Event, ...]:
    """Read the events of an attempt up to the start of its steps."""
    events: list[Event] = []
    for cursor in cursors[:_HEAD_SEGMENTS]:
        events += _read_segment(folder, cursor)
        if any(event.kind == "started" for event in events):
            break
    return tuple(events)


def _read_tail(folder: str, cursors: Sequence[Cursor], pool: ThreadPoolExecutor) -> list[tuple[Cursor, Event]]:
    """Read the last events, back to the end of an epoch if it is near."""
    tail: list[tuple[Cursor, Event]] = []
    for end in range(len(cursors), max(0, len(cursors) - TAIL_SEGMENTS), -_READ_BATCH):
        batch = cursors[max(0, end - _READ_BATCH) : end]
        segments = pool.map(partial(_read_segment, folder), batch)
        tail[:0] = [(cursor, event) for cursor, events in zip(batch, segments, strict=True) for event in events]
        if any(event.kind == "epoch" for _, event in tail):
            break
    return tail


def _find_last_epoch(folder: str, by_attempt: dict[int, list[Cursor]], starts: dict[int, Event]) -> Event | None:
    """Find the end of the last epoch by bisection: within an attempt samples only grow."""

    def count_samples(cursor: Cursor) -> int:
        return max((event.samples or 0 for event in _read_segment(folder, cursor)), default=0)

    limit = math.inf  # what a later attempt began with: the rest was rolled back
    for attempt in sorted(starts, reverse=True):
        cursors, start = by_attempt[attempt], starts[attempt].samples or 0
        size = parse_int(starts[attempt].values.get("samples_per_epoch")) or 0
        last = int(min(limit, count_samples(cursors[-1]))) // max(1, size) * size
        # The last one may have no event: its validation is running, or died.
        for end in (last, last - size):
            first = bisect_left(cursors, end, key=count_samples) if end > 0 and end >= start else len(cursors)
            for cursor in cursors[first:]:
                for event in _read_segment(folder, cursor):
                    if event.kind == "epoch" and event.samples == end:
                        return event
                if count_samples(cursor) > end:
                    break
        limit = min(limit, start)
    return None


@lru_cache(maxsize=2048)
def _read_segment(folder: str, cursor: Cursor) -> tuple[Event, ...]:
    try:
        return journal.read_segment(folder, cursor)
    except (JournalError, FileNotFoundError):
        return ()
