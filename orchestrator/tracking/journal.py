"""The append-only event journal of a run: numbered immutable segments in its storage.

Object stores cannot append, so a segment is an object of its own, written once by conditional create. A
segment is a header line (writer, number of events) and one event a line. This file is all of the room that
a training worker imports.
"""

from __future__ import annotations

import heapq
import json
import logging
import re
import threading
import time
import uuid
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from orchestrator.config.json_text import parse_object
from orchestrator.storage import file_io
from orchestrator.tracking.events import Event, JournalError, decode_event, encode_event

__all__ = ["Cursor", "DamagedSegmentError", "JournalWriter", "read_events"]

_log = logging.getLogger(__name__)
_SEGMENT_PATTERN = re.compile(r"(\d{6,})-(\d{6,})\.jsonl")
_FIRST_WAIT_SECONDS = 0.5
_MAX_WAIT_SECONDS = 30.0
# While somebody waits in flush() or close(), storage is asked again this often.
_FLUSH_WAIT_SECONDS = 0.2
_MAX_READER_THREADS = 8


class Cursor(NamedTuple):
    """The last segment read. json.dumps(cursor) and Cursor(*json.loads(text)) are each other's reverse."""

    attempt: int
    number: int


# Segments count from 1, so this is before them all.
_START = Cursor(0, 0)


class DamagedSegmentError(JournalError):
    """A segment that cannot be parsed. cursor: the place after which reading can go on."""

    def __init__(self, message: str, cursor: Cursor) -> None:
        super().__init__(message)
        self.cursor = cursor


class JournalWriter:
    """Appends the events of one attempt of a run; storage trouble never reaches the caller.

    A background thread uploads what waits every flush_seconds. While storage fails, up to `capacity` events
    wait in memory; beyond that the oldest metrics are dropped, and a "journal_dropped" event says how many.
    """

    def __init__(self, folder: str, attempt: int, flush_seconds: float = 2.0, capacity: int = 20_000) -> None:
        """folder: URL of the journal. attempt: from 0. flush_seconds: pause between uploads.

        Raises ValueError for a negative attempt, a pause that is not positive, or a capacity below 1.
        """
        if attempt < 0 or flush_seconds <= 0:
            raise ValueError(f"attempt {attempt} must be >= 0 and flush_seconds {flush_seconds} must be > 0")
        self._folder = folder
        self._attempt = attempt
        self._flush_seconds = flush_seconds
        self._token = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._queue = BoundedEventQueue(capacity)
        self._sealed: bytes | None = None
        self._sealed_oldest = 0
        self._number: int | None = None
        self._flush_waiters = 0
        self._closed = False  # to append
        self._stop_requested = False  # the thread
        self._fenced = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def is_fenced(self) -> bool:
        """Whether another writer of this attempt was found; from then on events are thrown away."""
        return self._fenced

    def append(self, kind: str, /, samples: int | None = None, **values: object) -> None:
        """Note an event that happens now. Raises JournalError only for values that JSON cannot hold."""
        line = encode_event(Event(kind, time.time(), samples, values))
        with self._changed:
            if self._fenced:
                return
            if self._closed:
                _log.warning("journal %s: event %r came after close and is lost", self._folder, kind)
                return
            self._queue.put(kind, line)

    def flush(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; True when every event appended before the call is in storage.

        Events dropped from a full spool do not count; the journal says how many they were.
        """
        with self._changed:
            target = self._queue.next_number
            self._flush_waiters += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fenced or self._get_oldest_unsaved() >= target, timeout)
            self._flush_waiters -= 1
            return not self._fenced and self._get_oldest_unsaved() >= target

    def close(self, timeout: float) -> bool:
        """Flush and end the thread within `timeout` seconds; True when every event is in storage."""
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
        return self._queue.oldest_number if self._sealed is None else self._sealed_oldest

    def _has_pending(self) -> bool:
        return self._sealed is not None or len(self._queue) > 0

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._failures:
                    self._changed.wait_for(lambda: self._stop_requested, _FLUSH_WAIT_SECONDS)
                self._changed.wait_for(
                    lambda: self._stop_requested or (self._flush_waiters > 0 and self._has_pending()),
                    self._get_wait_seconds(),
                )
                if self._stop_requested:
                    return
                if not self._has_pending():
                    continue
            if not self._upload_segment():
                return

    def _get_wait_seconds(self) -> float:
        if not self._failures:
            return self._flush_seconds
        return float(min(_MAX_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** min(self._failures, 10)))

    def _upload_segment(self) -> bool:
        """One try to store a segment; False when fenced. Whatever storage raises is caught and logged:
        this thread must outlive it.
        """
        try:
            if self._number is None:
                self._number = _find_last_number(self._folder, self._attempt) + 1
            number = self._number
            data = self._seal_segment()
            url = file_io.join(self._folder, make_segment_name(self._attempt, number))
            mine = file_io.create_bytes(url, data) or file_io.read_bytes(url) == data
        except Exception as error:
            if not self._failures:
                _log.warning("journal %s: %s: %s; events wait", self._folder, type(error).__name__, error)
            self._failures += 1
            return True
        if not mine:
            self._fence_writer(url)
            return False
        if self._failures:
            _log.warning("journal %s: storage works again after %d failures", self._folder, self._failures)
        with self._changed:
            self._failures = 0
            self._number = number + 1
            self._sealed = None
            self._changed.notify_all()
        return True

    def _seal_segment(self) -> bytes:
        """The bytes of the next segment, the same ones until they are stored.

        A create whose answer was lost may have worked; only because a retry carries the same bytes, with
        this writer's token, can it be told from another writer's segment.
        """
        with self._changed:
            if self._sealed is None:
                oldest = self._queue.oldest_number
                lines, dropped = self._queue.pop_all()
                if dropped:
                    _log.warning("journal %s: dropped while storage failed: %s", self._folder, dropped)
                    lines.insert(0, encode_event(Event("journal_dropped", time.time(), None, dropped)))
                header = json.dumps({"writer": self._token, "events": len(lines)})
                self._sealed = "\n".join([header, *lines, ""]).encode()
                self._sealed_oldest = oldest
            return self._sealed

    def _fence_writer(self, url: str) -> None:
        with self._changed:
            self._fenced = True
            lost, _ = self._queue.pop_all()
            self._changed.notify_all()
        _log.error(
            "journal: %s was written by someone else: this attempt is fenced, its last segment and %d waiting"
            " events are thrown away",
            url,
            len(lost),
        )


def read_events(folder: str, cursor: Cursor | None = None, limit: int | None = None) -> tuple[list[Event], Cursor]:
    """Events after the cursor in order of (attempt, number), and the cursor to go on from.

    folder: URL of the journal; an absent one is empty. limit: segments read at most. Names are listed once.
    Raises DamagedSegment when the first new segment cannot be parsed; what comes before a damaged one is
    returned first. Storage errors pass through.
    """
    events: list[Event] = []
    last = cursor or _START
    places = [place for place in list_segments(folder) if place > last][:limit]
    urls = [file_io.join(folder, make_segment_name(*place)) for place in places]
    for done, (place, url, data) in enumerate(zip(places, urls, _read_segments(urls), strict=True)):
        try:
            events.extend(_parse_segment(data))
        except ValueError as error:
            if done:
                break
            raise DamagedSegmentError(f"{url}: damaged journal segment: {error}", place) from error
        last = place
    return events, last


def read_last_event(folder: str) -> tuple[int, Event] | None:
    """The last event that can be read, with its attempt; None for an empty journal. Storage errors pass through."""
    for place in reversed(list_segments(folder)):
        try:
            events = _parse_segment(file_io.read_bytes(file_io.join(folder, make_segment_name(*place))))
        except ValueError:
            continue  # a damaged segment must not keep the next attempt from starting
        if events:
            return place.attempt, events[-1]
    return None


def read_segment(folder: str, place: Cursor) -> tuple[Event, ...]:
    """The events of one segment, which never changes. Raises DamagedSegment; storage errors pass through."""
    url = file_io.join(folder, make_segment_name(*place))
    try:
        return tuple(_parse_segment(file_io.read_bytes(url)))
    except ValueError as error:
        raise DamagedSegmentError(f"{url}: damaged journal segment: {error}", place) from error


def _read_segments(urls: list[str]) -> list[bytes]:
    if len(urls) <= 1:
        return [file_io.read_bytes(url) for url in urls]
    # A driver that starts again reads the whole journal: thousands of objects, a round trip each.
    with ThreadPoolExecutor(min(_MAX_READER_THREADS, len(urls)), "journal-read") as pool:
        return list(pool.map(file_io.read_bytes, urls))


def make_segment_name(attempt: int, number: int) -> str:
    """The object name of a segment."""
    return f"{attempt:06d}-{number:06d}.jsonl"


def _parse_segment(data: bytes) -> list[Event]:
    header, *lines = data.decode().removesuffix("\n").split("\n")
    promised = parse_object(header).get("events")
    if len(lines) != promised or not data.endswith(b"\n"):
        raise ValueError(f"its header promises {promised} events, {len(lines)} lines follow")
    return [decode_event(line) for line in lines]


def list_segments(folder: str) -> list[Cursor]:
    """Segments in order. Other names are not ours (a store's own temp files) and are left alone."""
    matches = (_SEGMENT_PATTERN.fullmatch(name) for name in file_io.list_names(folder))
    return sorted(Cursor(int(match[1]), int(match[2])) for match in matches if match)


def _find_last_number(folder: str, attempt: int) -> int:
    return max((place.number for place in list_segments(folder) if place.attempt == attempt), default=0)


# Kinds whose loss costs a point of a curve; anything else (incidents, epochs, outcomes) is kept longer.
_DROPPABLE_KIND = "metrics"


class BoundedEventQueue:
    """Numbered lines waiting for upload; when full, the oldest metrics go first, then the oldest of the rest.

    Not thread-safe: the journal holds its lock around every call.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: lines held at most. Raises ValueError when it is below 1."""
        if capacity < 1:
            raise ValueError(f"capacity: {capacity} lines; give at least 1")
        self._capacity = capacity
        self._metrics: deque[tuple[int, str]] = deque()
        self._others: deque[tuple[int, str]] = deque()
        self._next = 0
        self._dropped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._metrics) + len(self._others)

    @property
    def next_number(self) -> int:
        """The number that the next line will get."""
        return self._next

    @property
    def oldest_number(self) -> int:
        """The number of the oldest waiting line, or next_number when none waits."""
        return min((queue[0][0] for queue in (self._metrics, self._others) if queue), default=self._next)

    def put(self, kind: str, line: str) -> None:
        """Add a line, making room for it where there is none."""
        (self._metrics if kind == _DROPPABLE_KIND else self._others).append((self._next, line))
        self._next += 1
        if len(self) > self._capacity:
            queue, name = (self._metrics, "metrics") if self._metrics else (self._others, "others")
            queue.popleft()
            self._dropped[name] += 1

    def pop_all(self) -> tuple[list[str], dict[str, int]]:
        """All waiting lines in order of arrival, and how many were dropped since the last call, by class."""
        lines = [line for _, line in heapq.merge(self._metrics, self._others)]
        dropped = dict(self._dropped)
        self._metrics.clear()
        self._others.clear()
        self._dropped.clear()
        return lines, dropped
