"""The append-only event journal of a run: numbered immutable segments in its storage.

Object stores cannot append, so a segment is an object of its own, written once by conditional create: a header line
(writer, number of events), then one event a line. This is the only module of the room that a training worker imports.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from orchestrator.config.json_text import parse_object
from orchestrator.storage import file_io
from orchestrator.tracking.events import Event, JournalError, decode_event, encode_event
from orchestrator.tracking.tracker import RetryState

_log = logging.getLogger(__name__)
_SEGMENT_PATTERN = re.compile(r"(\d{6,})-(\d{6,})\.jsonl")
# While a thread waits in flush() or close(), failed uploads are retried this often.
_FLUSH_WAIT_SECONDS = 0.2
_MAX_READER_THREADS = 8


class Cursor(NamedTuple):
    """Position of the last segment read. json.dumps(cursor) and Cursor(*json.loads(text)) are inverses."""

    attempt: int
    number: int


START = Cursor(0, 0)  # before all segments, which count from 1


class DamagedSegmentError(JournalError):
    """A segment that cannot be parsed. cursor: the position after which reading can continue."""

    def __init__(self, message: str, cursor: Cursor) -> None:
        super().__init__(message)
        self.cursor = cursor


class JournalWriter:
    """Appends the events of one attempt of a run; storage errors never reach the caller.

    A background thread uploads pending events. While storage fails, up to `capacity` events wait in memory; beyond that
    the oldest metrics are dropped, then the oldest of the rest, and a "journal_dropped" event counts them.
    """

    def __init__(self, folder: str, attempt: int, flush_seconds: float = 2.0, capacity: int = 20_000) -> None:
        """folder: URL of the journal. attempt: from 0. flush_seconds: pause between uploads."""
        self._folder = folder
        self._attempt = attempt
        self._flush_seconds = flush_seconds
        self._capacity = capacity
        self._token = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._lines: list[tuple[int, str, str]] = []  # number, group (metrics or others), text
        self._next_number = 0
        self._dropped: Counter[str] = Counter()
        self._sealed: tuple[int, bytes] | None = None  # number of the oldest event, bytes of the next segment
        self._retry = RetryState(f"journal {folder}")
        self._segment_number: int | None = None
        self._flush_waiters = 0
        self._closed = False  # to append
        self._stop_requested = False  # of the thread
        self.is_fenced = False  # another writer of this attempt was found; events are dropped from then on
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def append(self, kind: str, /, samples: int | None = None, **values: object) -> None:
        """Append an event that happens now. Raises JournalError only for values that JSON cannot hold."""
        line = encode_event(Event(kind, time.time(), samples, values))
        with self._changed:
            if self.is_fenced:
                return
            if self._closed:
                _log.warning("journal %s: event %r came after close and is lost", self._folder, kind)
                return
            self._lines.append((self._next_number, "metrics" if kind == "metrics" else "others", line))
            self._next_number += 1
            if len(self._lines) > self._capacity:
                place = next((place for place, (_, group, _) in enumerate(self._lines) if group == "metrics"), 0)
                self._dropped[self._lines.pop(place)[1]] += 1

    def flush(self, timeout: float) -> bool:
        """Wait `timeout` seconds at most; return True when all events appended by now and not dropped are stored."""
        with self._changed:
            target = self._next_number
            self._flush_waiters += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.is_fenced or self._get_oldest_unsaved() >= target, timeout)
            self._flush_waiters -= 1
            return not self.is_fenced and self._get_oldest_unsaved() >= target

    def close(self, timeout: float) -> bool:
        """Flush and end the thread within `timeout` seconds; return True when every event is in storage."""
        with self._changed:
            self._closed = True
        saved = self.flush(timeout)
        with self._changed:
            self._stop_requested = True
            self._changed.notify_all()
        if saved:
            self._thread.join(timeout)
        else:
            _log.error("journal %s: closed with events that are not in storage", self._folder)
        return saved

    def _get_oldest_unsaved(self) -> int:
        if self._sealed is not None:
            return self._sealed[0]
        return self._lines[0][0] if self._lines else self._next_number

    def _run(self) -> None:
        while not self.is_fenced:
            with self._changed:
                if self._retry.failures:
                    self._changed.wait_for(lambda: self._stop_requested, _FLUSH_WAIT_SECONDS)
                self._changed.wait_for(
                    lambda: self._stop_requested or (self._flush_waiters > 0 and bool(self._lines or self._sealed)),
                    self._retry.wait_seconds or self._flush_seconds,
                )
                if self._stop_requested:
                    return
                pending = self._lines or self._sealed
            if pending:
                # Every error of storage is recorded there: this thread must survive it.
                self._retry.attempt(self._upload_segment, skip_pause=True)

    def _upload_segment(self) -> bool:
        """Try once to store a segment; return False when another writer's segment is in its place."""
        if self._segment_number is None:
            numbers = (place.number for place in list_segments(self._folder) if place.attempt == self._attempt)
            self._segment_number = max(numbers, default=0) + 1
        data = self._seal_segment()
        url = file_io.join(self._folder, make_segment_name(self._attempt, self._segment_number))
        if not file_io.create_bytes(url, data) and file_io.read_bytes(url) != data:
            with self._changed:
                self.is_fenced, lost = True, len(self._lines)
                self._changed.notify_all()
            _log.error(
                "journal: another writer wrote %s: this attempt is fenced, its last segment and %d pending events are "
                "lost",
                url,
                lost,
            )
            return False
        with self._changed:
            self._segment_number += 1
            self._sealed = None
            self._changed.notify_all()
        return True

    def _seal_segment(self) -> bytes:
        """Return the bytes of the next segment, the same ones until they are stored.

        A create whose answer was lost may have succeeded. Because a retry carries the same bytes, with this writer's
        token, it can be distinguished from another writer's segment.
        """
        with self._changed:
            if self._sealed is None:
                lines = [text for _, _, text in self._lines]
                if self._dropped:
                    _log.warning("journal %s: dropped while storage failed: %s", self._folder, dict(self._dropped))
                    lines.insert(0, encode_event(Event("journal_dropped", time.time(), None, dict(self._dropped))))
                header = json.dumps({"writer": self._token, "events": len(lines)})
                self._sealed = self._lines[0][0], "\n".join([header, *lines, ""]).encode()
                self._lines.clear()
                self._dropped.clear()
            return self._sealed[1]


def read_events(folder: str, cursor: Cursor | None = None, limit: int | None = None) -> tuple[list[Event], Cursor]:
    """Return the events after the cursor in order of (attempt, number), and the cursor to continue from.

    folder: URL of the journal; an absent one is empty. limit: segments read at most. Names are listed once.
    Raises DamagedSegmentError when the first new segment cannot be parsed; what comes before a damaged one is returned
    first. Storage errors pass through.
    """
    events: list[Event] = []
    start = last = cursor or START
    positions = [position for position in list_segments(folder) if position > start][:limit]
    # A restarted driver reads the whole journal: thousands of objects, a round trip each.
    with ThreadPoolExecutor(min(_MAX_READER_THREADS, len(positions) or 1), "journal-read") as pool:
        segments = pool.map(partial(read_segment, folder), positions)
        try:
            for position, segment in zip(positions, segments, strict=True):
                events.extend(segment)
                last = position
        except DamagedSegmentError:
            if last == start:
                raise
    return events, last


def read_last_event(folder: str) -> tuple[int, Event] | None:
    """Return the last readable event, with its attempt; None for an empty journal. Storage errors pass through."""
    for position in reversed(list_segments(folder)):
        try:
            events = read_segment(folder, position)
        except DamagedSegmentError:
            continue  # a damaged segment must not keep the next attempt from starting
        if events:
            return position.attempt, events[-1]
    return None


def read_segment(folder: str, position: Cursor) -> tuple[Event, ...]:
    """Return the events of one segment, which never changes. Raises DamagedSegmentError; storage errors pass."""
    url = file_io.join(folder, make_segment_name(*position))
    data = file_io.read_bytes(url)
    try:
        header, *lines = data.decode().removesuffix("\n").split("\n")
        promised = parse_object(header).get("events")
        if len(lines) != promised or not data.endswith(b"\n"):
            raise ValueError(f"its header promises {promised} events, {len(lines)} lines follow")
        return tuple(map(decode_event, lines))
    except ValueError as error:
        raise DamagedSegmentError(f"{url}: damaged journal segment: {error}", position) from error


def make_segment_name(attempt: int, number: int) -> str:
    """Return the object name of a segment."""
    return f"{attempt:06d}-{number:06d}.jsonl"


def list_segments(folder: str) -> list[Cursor]:
    """Return the segments in order. Other names (a store's temporary files) are ignored."""
    matches = (_SEGMENT_PATTERN.fullmatch(name) for name in file_io.list_names(folder))
    return sorted(Cursor(int(match[1]), int(match[2])) for match in matches if match)
