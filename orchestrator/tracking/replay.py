"""The driver's thread that replays journals into a tracker; it alone calls the tracker."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from orchestrator.tracking import journal
from orchestrator.tracking.events import Event, encode_event
from orchestrator.tracking.tracker import (
    SELF_EXPLANATORY_ERRORS,
    FinalStatus,
    MetricPoint,
    RetryState,
    TrackedRun,
    Tracker,
    TrackerUnreachableError,
    TrackingError,
)

_log = logging.getLogger(__name__)
TrackerRequest = Callable[[Tracker], None]

INCIDENTS_TAG = "orchestrator.incidents"
LOST_SEGMENTS_TAG = "orchestrator.journal_segments_lost"
INCIDENTS_FILE = "incidents.json"

_DRAIN_POLL_SECONDS = 0.5  # between rounds, while a thread waits in drain() or stop()
_DRAIN_SHARE = 0.8  # of the time of stop(), so that some is left to close the runs
_SEGMENTS_PER_READ = 200
_MAX_REQUEST_TRIES = 3  # of a request that fails by storage
_LOST = "segment_lost"  # kind of an event in place of a damaged segment's


class JournalReplayer:
    """Replays the journals of runs into a tracker while training runs, also through outages of the tracker.

    The thread opens the tracker, which takes seconds, while training starts. Repeated deliveries make no duplicates,
    because the tracker drops steps that it has.
    """

    def __init__(self, tracker_factory: Callable[[], Tracker], poll_seconds: float = 5.0) -> None:
        """tracker_factory: called in the thread, again after a failure. poll_seconds: between reads."""
        self._factory = tracker_factory
        self._poll_seconds = poll_seconds
        self._changed = threading.Condition()
        self._runs: dict[str, ReplayedRun] = {}
        self._tracker_retry = RetryState("tracker")
        self._requests: deque[tuple[TrackerRequest, Future[None], ReplayedRun | None]] = deque()
        self._request_tries: Counter[Future[None]] = Counter()  # that failed
        self._tracker: Tracker | None = None
        self._drain_waiters = 0
        self._stopping = False
        self._wake_requested = False
        self._clean_since = float("-inf")
        self._settled_since = float("-inf")
        self._failed_requests: list[str] = []
        self._thread = threading.Thread(target=self._run, name="replayer", daemon=True)
        self._thread.start()

    def follow(self, run: TrackedRun, journal_folder: str | None, parent_key: str | None = None) -> None:
        """Record a run and replay its journal (None: it has none).

        Following a key again changes nothing, except that it reopens a closed run.
        parent_key: key of a followed run to nest under, whose tracker id need not be known yet.
        Raises ValueError for a parent that is not followed.
        """
        with self._changed:
            if parent_key is not None and parent_key not in self._runs:
                raise ValueError(f"parent_key {parent_key!r} of {run.key!r} is not followed; follow it first")
            if run.key not in self._runs:
                parent = None if parent_key is None else self._runs[parent_key]
                self._runs[run.key] = ReplayedRun(run, journal_folder, parent)
            followed = self._runs[run.key]
            if followed.closed:  # resume it
                followed.run_id, followed.closed = None, False
            self._wake_thread()

    def submit(self, request: TrackerRequest, required_key: str | None = None) -> Future[None]:
        """Have the thread call request(tracker), in order of submission, after an outage if there is one.

        Another error than an outage, of storage the third, is logged, and fails the future. required_key: of the
        followed run that the request is about, which must be open first; meanwhile later requests pass this one.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled
        with self._changed:
            if self._stopping:
                raise RuntimeError("the replayer was stopped; submit before stop()")
            run = None if required_key is None else self._get_run(required_key)
            self._requests.append((request, future, run))
            self._wake_thread()
        return future

    def wait_for_run_id(self, key: str, timeout: float) -> str:
        """Return the tracker's id of a followed run. Raises TrackingError when not open in `timeout` seconds."""
        run = self._get_run(key)
        with self._changed:
            self._changed.wait_for(lambda: run.run_id is not None, timeout)
        if run.run_id is None:
            last = self._tracker_retry.last_error or run.retry.last_error or "still opening"
            raise TrackingError(f"run {key!r} is not in the tracker after {timeout:g} s: {last}")
        return run.run_id

    def wait_for_run_url(self, key: str, timeout: float) -> str:
        """Return what a person opens to see a followed run. Raises TrackingError when not open in `timeout` seconds."""
        run_id, retry = self.wait_for_run_id(key, timeout), self._get_run(key).retry
        if retry.is_permanent or self._tracker is None:
            raise TrackingError(retry.last_error or "the tracker is still opening")
        return self._tracker.get_run_url(run_id)

    def drain(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; return True when all that is in the journals by now is in the tracker.

        Returns False immediately when the tracker rejects what is left: waiting changes nothing.
        """
        called = time.monotonic()
        with self._changed:
            self._drain_waiters += 1
            self._wake_thread()
            self._changed.wait_for(lambda: self._stopping or self._settled_since >= called, timeout)
            self._drain_waiters -= 1
            return self._clean_since >= called

    def close(self, key: str, status: FinalStatus) -> Future[None]:
        """Have a run closed once all that its journal holds by then is in the tracker; the journal is then left alone.

        Raises ValueError for a key that is not followed.
        """
        return self.submit(partial(self._get_run(key).finish, status), key)

    def stop(self, statuses: Mapping[str, FinalStatus], timeout: float) -> bool:
        """Drain, close each run of `statuses` (by key) in that order, end the thread; return True if all is recorded.

        Runs without a status stay open. Raises ValueError for a key that is not followed.
        """
        runs = {key: self._get_run(key) for key in statuses}
        if self._stopping:
            return not statuses
        deadline = time.monotonic() + timeout
        drained = self.drain(timeout * _DRAIN_SHARE)
        closing = [self.submit(partial(runs[key].close, status), key) for key, status in statuses.items()]
        closed = self.drain(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._stopping = True
            self._wake_thread()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        closed = closed and all(future.done() and future.exception() is None for future in closing)
        return drained and closed and not self._failed_requests

    @property
    def first_error(self) -> str:
        """The first reason why something is not recorded; empty when all is."""
        with self._changed:
            errors = [self._tracker_retry.last_error, *(run.retry.last_error for run in self._runs.values())]
        return next(filter(None, [*errors, *self._failed_requests]), "")

    def _get_run(self, key: str) -> ReplayedRun:
        with self._changed:
            if key not in self._runs:
                raise ValueError(f"run key {key!r} is not followed; followed are {sorted(self._runs)}")
            return self._runs[key]

    def _wake_thread(self) -> None:
        """Start the next round now. The caller holds the lock."""
        self._wake_requested = True
        self._changed.notify_all()

    def _run(self) -> None:
        while not self._stopping:
            started = time.monotonic()
            clean, settled = self._run_round()
            with self._changed:
                if clean:
                    self._clean_since = started
                if settled:
                    self._settled_since = started
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wake_requested, self._get_pause_seconds())
                self._wake_requested = False
        for _, future, _ in self._requests:
            future.set_exception(TrackingError("the replayer was stopped before this request was served"))

    def _get_pause_seconds(self) -> float:
        """Return the seconds to the next round: none while there is a backlog that the tracker takes."""
        outage_seconds = self._tracker_retry.wait_seconds
        if not outage_seconds and any(run.pending and not run.retry.failures for run in self._runs.values()):
            return 0.0
        pause = outage_seconds or self._poll_seconds
        return min(pause, _DRAIN_POLL_SECONDS) if self._drain_waiters else pause

    def _run_round(self) -> tuple[bool, bool]:
        """Take every run a step further, then serve the requests.

        Returns whether nothing is left over and nothing failed; and whether another round would change nothing, since
        the tracker rejects what is left.
        """
        with self._changed:
            runs, hurried = list(self._runs.values()), self._drain_waiters > 0
        clean, settled = [], []
        try:
            if self._tracker is None:
                tracker = self._factory()
                tracker.check()
                self._tracker = tracker
            tracker = self._tracker
            for run in runs:
                # An outage is no error of this run: it ends the round.
                delivered = run.retry.attempt(partial(run.replay, tracker), hurried)
                clean.append(delivered)
                settled.append(delivered or run.is_rejected)
                with self._changed:
                    self._changed.notify_all()
            clean.append(self._serve_requests(tracker))
            with self._changed:
                settled.append(all(run is not None and run.is_rejected for _, _, run in self._requests))
        except Exception as error:
            # The thread must survive every error of a tracker.
            self._tracker_retry.record_failure(error)
            return False, self._tracker_retry.is_permanent
        self._tracker_retry.record_success()
        return all(clean), all(settled)

    def _serve_requests(self, tracker: Tracker) -> bool:
        """Serve in order; return True when the queue is empty."""
        for queued in list(self._requests):
            request, future, run = queued
            if run is not None and run.run_id is None:
                continue
            try:
                request(tracker)
            except TrackerUnreachableError:
                raise
            except Exception as error:
                self._request_tries[future] += 1
                if isinstance(error, OSError) and self._request_tries[future] < _MAX_REQUEST_TRIES:
                    return False
                # An error of the run was logged already.
                log = _log.info if run is not None and run.is_rejected else _log.error
                log("tracker request given up: %s", error, exc_info=not isinstance(error, SELF_EXPLANATORY_ERRORS))
                self._failed_requests.append(str(error))
                future.set_exception(error)
            else:
                future.set_result(None)
            with self._changed:
                self._requests.remove(queued)
                self._changed.notify_all()
        return not self._requests


class ReplayedRun:
    """A followed run. Only the replayer's thread calls its methods; other threads may read its plain attributes.

    run_id: the tracker's id once open. pending: events read and not yet delivered.
    """

    def __init__(self, run: TrackedRun, folder: str | None, parent: ReplayedRun | None) -> None:
        self.run = run
        self.run_id: str | None = None
        self.closed = False
        self.pending: list[Event] = []
        self.retry = RetryState(f"tracking of run {run.name}")
        self._parent = parent
        self._folder = folder
        self._cursor = journal.START
        self._incidents: list[Event] = []
        self._lost_segments = 0

    @property
    def is_rejected(self) -> bool:
        """True while the tracker takes nothing of this run, or of its parent, until a person fixes the cause."""
        parent = self._parent
        return self.retry.is_permanent or (parent is not None and parent.run_id is None and parent.is_rejected)

    def replay(self, tracker: Tracker) -> bool:
        """Open the run if necessary, deliver what was read, and read on; return True when nothing is left.

        Raises TrackingError, and then all events stay pending: the tracker's last-step rule makes the second delivery
        harmless. Skips damaged segments, and counts them in a tag. Storage errors pass through.
        """
        if self.closed:
            return True
        if self.run_id is None:
            if self._parent is not None and self._parent.run_id is None:
                return False
            parent_id = self._parent.run_id if self._parent is not None else self.run.parent_id
            self.run_id = tracker.open_run(replace(self.run, parent_id=parent_id))
        self._deliver_pending(tracker, self.run_id)
        if self._folder is not None:
            try:
                self.pending, self._cursor = journal.read_events(self._folder, self._cursor, _SEGMENTS_PER_READ)
            except journal.DamagedSegmentError as error:
                _log.error("run %s: segment given up, its events are lost: %s", self.run.name, error)
                self._cursor, self._lost_segments = error.cursor, self._lost_segments + 1
                self.pending = [Event(_LOST, time.time())]
        return not self.pending

    def finish(self, status: FinalStatus, tracker: Tracker) -> None:
        """Deliver all that the journal of an ended run holds, and close the run. Raises as `replay`."""
        while not self.replay(tracker):
            pass
        self.close(status, tracker)

    def close(self, status: FinalStatus, tracker: Tracker) -> None:
        """Close an open run. Raises TrackingError."""
        if self.run_id is not None:
            tracker.close_run(self.run_id, status)
            self.closed = True

    def _deliver_pending(self, tracker: Tracker, run_id: str) -> None:
        """Deliver the pending events; without any, a heartbeat."""
        points = [
            MetricPoint(name, float(value), event.samples, event.time)
            for event in self.pending
            if event.kind in ("metrics", "epoch") and event.samples is not None
            for name, value in event.values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        tracker.log_metrics(run_id, points)
        if new := [event for event in self.pending if event.kind in ("incident", "recovered")]:
            incidents = [*self._incidents, *new]
            records = [json.loads(encode_event(event)) for event in incidents]
            tracker.log_text(run_id, INCIDENTS_FILE, json.dumps(records, indent=1))
            count = sum(event.kind == "incident" for event in incidents)
            tracker.set_tags(run_id, {INCIDENTS_TAG: str(count)})
            self._incidents = incidents
        if any(event.kind == _LOST for event in self.pending):
            tracker.set_tags(run_id, {LOST_SEGMENTS_TAG: str(self._lost_segments)})
        self.pending = []
