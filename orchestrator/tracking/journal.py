"""The append-only event journal of a run: numbered immutable segments in its storage.

Object stores cannot append, so a segment is an object of its own, written once by conditional create. A
segment is a header line (writer, number of events) and one event a line. This file is all of the room that
a training worker imports.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from orchestrator.config.json_text import parse_object
from orchestrator.storage import files
from orchestrator.tracking.events import Event, JournalError, decode, encode
from orchestrator.tracking.spool import Spool

__all__ = ["Cursor", "DamagedSegment", "Event", "JournalError", "JournalWriter", "read"]

_log = logging.getLogger(__name__)
_SEGMENT = re.compile(r"(\d{6,})-(\d{6,})\.jsonl")
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
# While somebody waits in flush() or close(), storage is asked again this often.
_HURRIED_WAIT_SECONDS = 0.2
_READERS = 8


class Cursor(NamedTuple):
    """The last segment read. json.dumps(cursor) and Cursor(*json.loads(text)) are each other's reverse."""

    attempt: int
    number: int


# Segments count from 1, so this is before them all.
_ORIGIN = Cursor(0, 0)


class DamagedSegment(JournalError):
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
        self._spool = Spool(capacity)
        self._sealed: bytes | None = None
        self._sealed_oldest = 0
        self._number: int | None = None
        self._hurried = 0
        self._closed = False  # to append
        self._ending = False  # the thread
        self._fenced = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def fenced(self) -> bool:
        """Whether another writer of this attempt was found; from then on events are thrown away."""
        return self._fenced

    def append(self, kind: str, /, samples: int | None = None, **values: object) -> None:
        """Note an event that happens now. Raises JournalError only for values that JSON cannot hold."""
        line = encode(Event(kind, time.time(), samples, values))
        with self._changed:
            if self._fenced:
                return
            if self._closed:
                _log.warning("journal %s: event %r came after close and is lost", self._folder, kind)
                return
            self._spool.put(kind, line)

    def flush(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; True when every event appended before the call is in storage.

        Events dropped from a full spool do not count; the journal says how many they were.
        """
        with self._changed:
            target = self._spool.next_number
            self._hurried += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._fenced or self._oldest_unsaved() >= target, timeout)
            self._hurried -= 1
            return not self._fenced and self._oldest_unsaved() >= target

    def close(self, timeout: float) -> bool:
        """Flush and end the thread within `timeout` seconds; True when every event is in storage."""
        with self._changed:
            self._closed = True
        saved = self.flush(timeout)
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if saved:
            self._thread.join(timeout)
        else:
            _log.error("journal %s: closed with events that are not in storage", self._folder)
        return saved

    def _oldest_unsaved(self) -> int:
        return self._spool.oldest if self._sealed is None else self._sealed_oldest

    def _waiting(self) -> bool:
        return self._sealed is not None or len(self._spool) > 0

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._failures:
                    self._changed.wait_for(lambda: self._ending, _HURRIED_WAIT_SECONDS)
                self._changed.wait_for(lambda: self._ending or (self._hurried > 0 and self._waiting()), self._pause())
                if self._ending:
                    return
                if not self._waiting():
                    continue
            if not self._upload():
                return

    def _pause(self) -> float:
        if not self._failures:
            return self._flush_seconds
        return float(min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** min(self._failures, 10)))

    def _upload(self) -> bool:
        """One try to store a segment; False when fenced. Whatever storage raises is caught and logged:
        this thread must outlive it.
        """
        try:
            if self._number is None:
                self._number = _highest(self._folder, self._attempt) + 1
            number = self._number
            data = self._seal()
            url = files.join(self._folder, segment_name(self._attempt, number))
            mine = files.create_bytes(url, data) or files.read_bytes(url) == data
        except Exception as error:
            if not self._failures:
                _log.warning("journal %s: %s: %s; events wait", self._folder, type(error).__name__, error)
            self._failures += 1
            return True
        if not mine:
            self._fence(url)
            return False
        if self._failures:
            _log.warning("journal %s: storage works again after %d failures", self._folder, self._failures)
        with self._changed:
            self._failures = 0
            self._number = number + 1
            self._sealed = None
            self._changed.notify_all()
        return True

    def _seal(self) -> bytes:
        """The bytes of the next segment, the same ones until they are stored.

        A create whose answer was lost may have worked; only because a retry carries the same bytes, with
        this writer's token, can it be told from another writer's segment.
        """
        with self._changed:
            if self._sealed is None:
                oldest = self._spool.oldest
                lines, dropped = self._spool.take()
                if dropped:
                    _log.warning("journal %s: dropped while storage failed: %s", self._folder, dropped)
                    lines.insert(0, encode(Event("journal_dropped", time.time(), None, dropped)))
                header = json.dumps({"writer": self._token, "events": len(lines)})
                self._sealed = "\n".join([header, *lines, ""]).encode()
                self._sealed_oldest = oldest
            return self._sealed

    def _fence(self, url: str) -> None:
        with self._changed:
            self._fenced = True
            lost, _ = self._spool.take()
            self._changed.notify_all()
        _log.error(
            "journal: %s was written by someone else: this attempt is fenced, its last segment and %d waiting"
            " events are thrown away",
            url,
            len(lost),
        )


def read(folder: str, cursor: Cursor | None = None, limit: int | None = None) -> tuple[list[Event], Cursor]:
    """Events after the cursor in order of (attempt, number), and the cursor to go on from.

    folder: URL of the journal; an absent one is empty. limit: segments read at most. Names are listed once.
    Raises DamagedSegment when the first new segment cannot be parsed; what comes before a damaged one is
    returned first. Storage errors pass through.
    """
    events: list[Event] = []
    last = cursor or _ORIGIN
    places = [place for place in places_of(folder) if place > last][:limit]
    urls = [files.join(folder, segment_name(*place)) for place in places]
    for done, (place, url, data) in enumerate(zip(places, urls, _read_all(urls), strict=True)):
        try:
            events.extend(_parse(data))
        except ValueError as error:
            if done:
                break
            raise DamagedSegment(f"{url}: damaged journal segment: {error}", place) from error
        last = place
    return events, last


def last(folder: str) -> tuple[int, Event] | None:
    """The last event that can be read, with its attempt; None for an empty journal. Storage errors pass through."""
    for place in reversed(places_of(folder)):
        try:
            events = _parse(files.read_bytes(files.join(folder, segment_name(*place))))
        except ValueError:
            continue  # a damaged segment must not keep the next attempt from starting
        if events:
            return place.attempt, events[-1]
    return None


def segment(folder: str, place: Cursor) -> tuple[Event, ...]:
    """The events of one segment, which never changes. Raises DamagedSegment; storage errors pass through."""
    url = files.join(folder, segment_name(*place))
    try:
        return tuple(_parse(files.read_bytes(url)))
    except ValueError as error:
        raise DamagedSegment(f"{url}: damaged journal segment: {error}", place) from error


def _read_all(urls: list[str]) -> list[bytes]:
    if len(urls) <= 1:
        return [files.read_bytes(url) for url in urls]
    # A driver that starts again reads the whole journal: thousands of objects, a round trip each.
    with ThreadPoolExecutor(min(_READERS, len(urls)), "journal-read") as pool:
        return list(pool.map(files.read_bytes, urls))


def segment_name(attempt: int, number: int) -> str:
    """The object name of a segment."""
    return f"{attempt:06d}-{number:06d}.jsonl"


def _parse(data: bytes) -> list[Event]:
    header, *lines = data.decode().removesuffix("\n").split("\n")
    promised = parse_object(header).get("events")
    if len(lines) != promised or not data.endswith(b"\n"):
        raise ValueError(f"its header promises {promised} events, {len(lines)} lines follow")
    return [decode(line) for line in lines]


def places_of(folder: str) -> list[Cursor]:
    """Segments in order. Other names are not ours (a store's own temp files) and are left alone."""
    matches = (_SEGMENT.fullmatch(name) for name in files.list_names(folder))
    return sorted(Cursor(int(match[1]), int(match[2])) for match in matches if match)


def _highest(folder: str, attempt: int) -> int:
    return max((place.number for place in places_of(folder) if place.attempt == attempt), default=0)
