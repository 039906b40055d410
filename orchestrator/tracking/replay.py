"""The driver's thread that replays journals into a tracker, and is the only one to talk to it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from orchestrator.tracking.events import Event
from orchestrator.tracking.followed import FollowedRun
from orchestrator.tracking.tracker import (
    FinalStatus,
    TrackedRun,
    Tracker,
    TrackerUnreachable,
    TrackingError,
)
from orchestrator.tracking.trouble import Trouble, is_explained

_log = logging.getLogger(__name__)
Request = Callable[[Tracker], None]
# While somebody waits in drain() or stop(), a tracker that is down is asked again this often.
_HURRIED_SECONDS = 0.5
# A request that fails by a slip of ours is not the tracker's outage; it must not hold up the others.
_REQUEST_TRIES = 3
# Of the time given to stop(): what draining may take, so that some is left to close the runs.
_DRAIN_SHARE = 0.8


@dataclass(eq=False)
class _Queued:
    request: Request
    future: Future[None]
    needs: str | None
    about: str | None
    errors: list[Exception] = field(default_factory=list)


class Replayer:
    """Replays the journals of runs into a tracker while training goes on, whatever the tracker does.

    Opening the tracker (importing mlflow, migrating a database: seconds) happens in the thread, so training
    starts meanwhile. Nothing is lost in an outage: events leave the queue only once they are delivered, and a
    delivery that is repeated makes no duplicates because the tracker drops steps it already has.
    """

    def __init__(self, tracker_factory: Callable[[], Tracker], poll_seconds: float = 5.0) -> None:
        """tracker_factory: called in the thread, again after a failure. poll_seconds: between reads."""
        self._factory = tracker_factory
        self._poll_seconds = poll_seconds
        self._changed = threading.Condition()
        self._followed: dict[str, FollowedRun] = {}
        self._outage = Trouble("tracker")
        self._requests: deque[_Queued] = deque()
        self._tracker: Tracker | None = None
        self._hurried = 0
        self._stopping = False
        self._ended = False
        self._nudged = False
        self._clean_since = float("-inf")
        self._settled_since = float("-inf")
        self._given_up: list[str] = []
        self._thread = threading.Thread(target=self._run, name="replayer", daemon=True)
        self._thread.start()

    def follow(self, run: TrackedRun, journal_folder: str | None, parent_key: str | None = None) -> None:
        """Record a run and replay its journal (None: it has none).

        Following a key again changes nothing, but for a closed run, which is opened again.
        parent_key: key of a followed run to nest under, whose tracker id need not be known yet.
        Raises ValueError for a parent that is not followed.
        """
        with self._changed:
            if parent_key is not None and parent_key not in self._followed:
                raise ValueError(f"parent_key {parent_key!r} of {run.key!r} is not followed; follow it first")
            if run.key not in self._followed:
                parent = None if parent_key is None else self._followed[parent_key]
                self._followed[run.key] = FollowedRun(run, journal_folder, parent)
            self._followed[run.key].reopen()
            self._nudge()

    def submit(self, request: Request, needs: str | None = None, about: str | None = None) -> Future[None]:
        """Have the thread call request(tracker), in order of submission, after an outage if there is one.

        needs: key of a followed run that must be open before; the request waits for it, others pass it. about: key of
        the followed run that it is about, `needs` by default.
        A request that the tracker refuses is logged, and its future fails; one that fails otherwise than by an outage
        is tried three times before.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled
        with self._changed:
            if self._stopping:
                raise RuntimeError("the replayer was stopped; submit before stop()")
            self._requests.append(_Queued(request, future, needs, about or needs))
            self._nudge()
        return future

    def run_id(self, key: str, timeout: float) -> str:
        """The tracker's id of a followed run. Raises TrackingError when not open in `timeout` seconds."""
        followed = self._get(key)
        with self._changed:
            self._changed.wait_for(lambda: followed.run_id is not None, timeout)
        if followed.run_id is None:
            last = self._outage.last or followed.serving.last or "still opening"
            raise TrackingError(f"run {key!r} is not in the tracker after {timeout:g} s: {last}")
        return followed.run_id

    def run_url(self, key: str, timeout: float) -> str:
        """What a person opens to see a followed run. Raises TrackingError when not open in `timeout` seconds."""
        run_id, refused = self.run_id(key, timeout), self._get(key).serving
        if refused.is_final:
            raise TrackingError(str(refused.last))
        if self._tracker is None:
            raise TrackingError("the tracker is still opening")
        return self._tracker.run_url(run_id)

    def outcome(self, key: str) -> Event | None:
        """The last finished / stopped / failed event of a run that the tracker has been told of."""
        return self._get(key).outcome

    def behind(self) -> int:
        """Events and requests that wait for the tracker (of a long outage: those read so far)."""
        with self._changed:
            return sum(followed.waiting for followed in self._followed.values()) + len(self._requests)

    def drain(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds; True when all that is in the journals by now is in the tracker.

        False at once when the tracker refuses what is left: waiting changes nothing.
        """
        called = time.monotonic()
        with self._changed:
            self._hurried += 1
            self._nudge()
            self._changed.wait_for(lambda: self._ended or self._settled_since >= called, timeout)
            self._hurried -= 1
            return self._clean_since >= called

    def close(self, key: str, status: FinalStatus) -> Future[None]:
        """Have a run closed, once all that its journal has by then is in the tracker; its journal is not read again.

        Raises ValueError for a key that is not followed.
        """
        self._get(key)
        return self.submit(partial(self._finish, key, status), needs=key)

    def _finish(self, key: str, status: FinalStatus, tracker: Tracker) -> None:
        run = self._get(key)
        # A run that is over has a journal that ends.
        while not (run.read() and run.serve(tracker)):
            pass
        self._close(key, status, tracker)

    def stop(self, statuses: Mapping[str, FinalStatus], timeout: float) -> bool:
        """Drain, close each run of `statuses` (by key) in that order, end the thread; True when all is recorded.

        Runs without a status stay open. Raises ValueError for a key that is not followed.
        """
        for key in statuses:
            self._get(key)
        if self._stopping:
            return not statuses
        deadline = time.monotonic() + timeout
        drained = self.drain(timeout * _DRAIN_SHARE)
        futures = {key: self.submit(partial(self._close, key, status), about=key) for key, status in statuses.items()}
        with self._changed:
            self._hurried += 1
            self._nudge()
            left_seconds = max(0.0, deadline - time.monotonic())
            self._changed.wait_for(lambda: all(future.done() for future in futures.values()), left_seconds)
            self._stopping = True
            self._nudge()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        left = [key for key, future in futures.items() if not future.done() or future.exception() is not None]
        if not drained or left:
            _log.info("stopped with %d events not recorded, runs not closed: %s", self.behind(), left or "none")
        return drained and not left and not self._given_up

    @property
    def cause(self) -> str:
        """Why something is not recorded: the first trouble that there is; empty when there is none."""
        with self._changed:
            runs = list(self._followed.values())
        troubles = (self._outage.last, *(run.serving.last for run in runs), *(run.reading.last for run in runs))
        return next((text for text in (*troubles, *self._given_up) if text), "")

    def _get(self, key: str) -> FollowedRun:
        with self._changed:
            if key not in self._followed:
                raise ValueError(f"run key {key!r} is not followed; followed are {sorted(self._followed)}")
            return self._followed[key]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._nudged = False
            started = time.monotonic()
            clean, settled = self._round()
            with self._changed:
                if clean:
                    self._clean_since = started
                if settled:
                    self._settled_since = started
                self._changed.notify_all()
                if self._stopping:
                    break
                self._changed.wait_for(lambda: self._nudged, self._pause())

        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for queued in self._requests:
            queued.future.set_exception(TrackingError("the replayer was stopped before this request was served"))

    def _nudge(self) -> None:
        """Start the next round now. The caller holds the lock."""
        self._nudged = True
        self._changed.notify_all()

    def _pause(self) -> float:
        """Seconds to the next round: none while there is a backlog that the tracker takes."""
        if self._outage.failures:
            return _HURRIED_SECONDS if self._hurried else self._outage.wait_seconds
        if any(followed.waiting and not followed.serving.failures for followed in self._followed.values()):
            return 0.0
        return min(self._poll_seconds, _HURRIED_SECONDS) if self._hurried else self._poll_seconds

    def _round(self) -> tuple[bool, bool]:
        """Read every journal, then talk to the tracker.

        Returns whether nothing is left over and nothing failed; and whether another round would change nothing, since
        the tracker refuses what is left.
        """
        with self._changed:
            runs, hurried = list(self._followed.values()), self._hurried > 0
        # Reading comes first and for all, so that behind() is true in an outage.
        settled = [run.reading.attempt(run.read, hurried) for run in runs]
        clean = settled.copy()
        try:
            tracker = self._open()
            for run in runs:
                # An outage is no trouble of this run: it ends the round.
                clean.append(run.serving.attempt(partial(run.serve, tracker), hurried, TrackerUnreachable))
                settled.append(clean[-1] or run.is_refused)
                with self._changed:
                    self._changed.notify_all()
            clean.append(self._serve_requests(tracker))
            settled.append(clean[-1] or self._all_need_refused_runs())
        except Exception as error:
            # The thread must outlive whatever a tracker raises.
            self._outage.failed(error)
            return False, self._outage.is_final
        self._outage.worked()
        return all(clean), all(settled)

    def _open(self) -> Tracker:
        if self._tracker is None:
            tracker = self._factory()
            tracker.check()
            self._tracker = tracker
        return self._tracker

    def _serve_requests(self, tracker: Tracker) -> bool:
        """Serve in order; True when the queue is empty, False when one must be tried again."""
        waiting = False
        for queued in list(self._requests):
            if queued.needs is not None and self._get(queued.needs).run_id is None:
                waiting = True
                continue
            try:
                queued.request(tracker)
            except TrackerUnreachable:
                raise
            except Exception as error:
                queued.errors.append(error)
                if len(queued.errors) < _REQUEST_TRIES and not isinstance(error, TrackingError):
                    return False
                self._give_up(queued, error)
            else:
                queued.future.set_result(None)
            with self._changed:
                self._requests.remove(queued)
                self._changed.notify_all()
        return not waiting and not self._requests

    def _give_up(self, queued: _Queued, error: Exception) -> None:
        """Fail a request; what its run's trouble has said already is not said again."""
        known = queued.about is not None and self._get(queued.about).is_refused
        level = logging.INFO if known else logging.ERROR
        _log.log(level, "tracker request given up: %s", error, exc_info=None if is_explained(error) else error)
        self._given_up.append(str(error))
        queued.future.set_exception(error)

    def _all_need_refused_runs(self) -> bool:
        with self._changed:
            return all(
                queued.needs is not None and self._followed[queued.needs].is_refused for queued in self._requests
            )

    def _close(self, key: str, status: FinalStatus, tracker: Tracker) -> None:
        run = self._get(key)
        if run.run_id is None:
            raise TrackingError(f"run {key!r} was never opened in the tracker, so it cannot be closed")
        tracker.close_run(run.run_id, status)
        run.closed = True
