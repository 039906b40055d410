"""One run whose journal is replayed into a tracker: what was read, what the tracker has, what went wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace

from orchestrator.tracking import journal
from orchestrator.tracking.events import Event, encode
from orchestrator.tracking.tracker import Point, TrackedRun, Tracker
from orchestrator.tracking.trouble import Trouble

_log = logging.getLogger(__name__)
_CURVES = frozenset({"metrics", "epoch"})
_INCIDENTS = frozenset({"incident", "recovered"})  # what happened, and what it had cost in the end
_OUTCOMES = frozenset({"finished", "stopped", "failed"})
_SEGMENTS_PER_READ = 200
_EVENTS_PER_DELIVERY = 2000
# While the tracker is down, reading goes on to here; the rest stays in the journal.
_MOST_WAITING = 20_000
# A damaged segment is asked for this often before it is given up: a store may be behind with itself.
_PATIENCE = 5

INCIDENTS_TAG = "orchestrator.incidents"
LOST_TAG = "orchestrator.journal_segments_lost"
INCIDENTS_FILE = "incidents.json"


class FollowedRun:
    """Used by the replayer's thread alone, but for the plain attributes, which others may look at.

    run_id: the tracker's id once open. outcome: the last finished / stopped / failed event delivered.
    reading, serving: trouble with the journal's storage, and of the tracker with this run.
    """

    def __init__(self, run: TrackedRun, folder: str | None, parent: FollowedRun | None) -> None:
        self.run = run
        self.run_id: str | None = None
        self.closed = False
        self.outcome: Event | None = None
        self.reading = Trouble(f"journal of run {run.name}")
        self.serving = Trouble(f"tracking of run {run.name}")
        self._parent = parent
        self._folder = folder
        self._cursor: journal.Cursor | None = None
        self._waiting: list[Event] = []
        self._incidents: list[Event] = []
        self._damaged_reads = 0
        self._lost = 0
        self._lost_told = 0

    @property
    def waiting(self) -> int:
        """Events read and not yet delivered."""
        return len(self._waiting)

    @property
    def is_refused(self) -> bool:
        """Whether the tracker takes nothing of this run, or of the one above it, until a person mends the cause."""
        above = self._parent
        return self.serving.is_final or (above is not None and above.run_id is None and above.is_refused)

    def reopen(self) -> None:
        """Go on with a run that was closed; nothing for any other."""
        if self.closed:
            self.run_id, self.closed = None, False

    def read(self) -> bool:
        """Take in the next part of the journal; True when there was nothing new.

        Raises JournalError for a damaged segment, and after some tries skips it; storage errors pass through.
        """
        if self._folder is None or self.closed:
            return True
        if len(self._waiting) >= _MOST_WAITING:
            return False
        try:
            events, self._cursor = journal.read(self._folder, self._cursor, _SEGMENTS_PER_READ)
        except journal.DamagedSegment as error:
            self._damaged_reads += 1
            if self._damaged_reads < _PATIENCE:
                raise
            _log.error("run %s: segment given up, its events are lost: %s", self.run.name, error)
            self._cursor, self._damaged_reads, self._lost = error.cursor, 0, self._lost + 1
            return False
        self._damaged_reads = 0
        self._waiting.extend(events)
        return not events

    def serve(self, tracker: Tracker) -> bool:
        """Open the run if need be and pass on what waits; True when nothing is left. Raises TrackingError."""
        if self.closed:
            return True
        if self.run_id is None:
            run = self.run
            if self._parent is not None:
                if self._parent.run_id is None:
                    return False
                run = replace(run, parent_id=self._parent.run_id)
            self.run_id = tracker.open_run(run)
        self._deliver(tracker, self.run_id)
        return not self._waiting

    def _deliver(self, tracker: Tracker, run_id: str) -> None:
        """Pass on a bounded number of events; with none, a heartbeat.

        Raises TrackingError; then everything still waits, and the tracker's last-step rule makes the second
        delivery harmless.
        """
        events = self._waiting[:_EVENTS_PER_DELIVERY]
        tracker.log(run_id, points(events))
        new = [event for event in events if event.kind in _INCIDENTS]
        if new:
            incidents = [*self._incidents, *new]
            tracker.log_text(run_id, INCIDENTS_FILE, incidents_text(incidents))
            count = sum(event.kind == "incident" for event in incidents)
            tracker.set_tags(run_id, {INCIDENTS_TAG: str(count)})
            self._incidents = incidents
        if self._lost > self._lost_told:
            tracker.set_tags(run_id, {LOST_TAG: str(self._lost)})
            self._lost_told = self._lost
        self.outcome = next((event for event in reversed(events) if event.kind in _OUTCOMES), self.outcome)
        del self._waiting[: len(events)]


def points(events: Iterable[Event]) -> list[Point]:
    """The numeric values of metrics and epoch events that have a clock, in order; step is samples seen."""
    return [
        Point(name, float(value), event.samples, event.time)
        for event in events
        if event.kind in _CURVES and event.samples is not None
        for name, value in event.values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def incidents_text(incidents: Iterable[Event]) -> str:
    """The incidents as a JSON list for people and programs, in the journal's own form of an event."""
    return json.dumps([json.loads(encode(event)) for event in incidents], indent=1)
