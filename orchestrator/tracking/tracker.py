"""Interface of experiment trackers, their errors, and the state of retried calls."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from orchestrator.storage import file_io

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]

_MIN_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 30.0
SELF_EXPLANATORY_ERRORS = (RuntimeError, OSError, ValueError)  # a traceback adds nothing to their text
_log = logging.getLogger(__name__)


class TrackingError(RuntimeError):
    """A rejected call, or a tracker that cannot be used as configured; the message states the fix."""


class TrackerUnreachableError(TrackingError):
    """A tracker that does not answer, or answers that it is failing: the same call may succeed later."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as the tracker shows it.

    key: permanent identity, such as the run's fingerprint; the same key finds the same run again.
    name: for people. parent_id: the tracker's id of the run it is nested under.
    params: immutable configuration. tags: facts that may change.
    """

    key: str
    name: str
    parent_id: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricPoint:
    """One value of a curve. step: samples seen. time: unix seconds."""

    name: str
    value: float
    step: int
    time: float


class Tracker(Protocol):
    """An experiment tracker; used from one thread at a time.

    Every method raises TrackingError, or TrackerUnreachableError where a later try may succeed. A tracker of one's own
    takes `uri` (--tracking), `experiment` and its own arguments, and derives from this class: methods that it does not
    define do nothing.
    """

    def check(self) -> None:
        """Prove within about 10 seconds that runs can be recorded."""

    def check_readable(self) -> None:
        """Do the part of `check` that writes nothing, for a store that exists."""

    def open_run(self, run: TrackedRun) -> str:
        """Return the id of the run with this key, new or set back to RUNNING."""

    def log_metrics(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Add points, dropping those at or below the last recorded step of their name; none: a heartbeat."""

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""

    def log_text(self, run_id: str, path: str, text: str) -> None:
        """Store a text as an artifact, replacing one at the same path."""

    def log_file(self, run_id: str, local_path: str, artifact_folder: str = "") -> None:
        """Store a local file as an artifact below the folder."""

    def log_table(self, run_id: str, path: str, columns: Mapping[str, Sequence[object]]) -> None:
        """Store columns of equal length (JSON scalars) as a table, replacing an older one at that path."""

    def close_run(self, run_id: str, status: FinalStatus) -> None:
        """End a run."""

    def get_run_url(self, run_id: str) -> str:
        """Return what a person opens to see the run, or the command that shows it."""

    def close_stale_runs(self, stale_seconds: float) -> list[str]:
        """Close as KILLED the RUNNING runs whose heartbeat is this old and unchanged since a call; return their ids."""
        return []


def log_run_folder(tracker: Tracker, run_id: str, folder: str, texts: Iterable[str]) -> None:
    """Store the named text files of a run's folder, and every picture in it, as artifacts of the run."""
    for name in texts:
        tracker.log_text(run_id, name, file_io.read_bytes(file_io.join(folder, name)).decode())
    with tempfile.TemporaryDirectory() as scratch:
        for name in sorted(name for name in file_io.list_names(folder) if name.endswith(".png")):
            path = Path(scratch, name)
            path.write_bytes(file_io.read_bytes(file_io.join(folder, name)))
            tracker.log_file(run_id, str(path))


class RetryState:
    """Failures in a row of one operation: growing pauses between its retries, one log line for each outage.

    failures: in a row so far. last_error: text of the latest error, None when well. is_permanent: whether it recurs
    until a person fixes it.
    """

    def __init__(self, name: str) -> None:
        """name: the operation, for the log."""
        self._name = name
        self._retry_at = float("-inf")
        self.failures = 0
        self.last_error: str | None = None
        self.is_permanent = False

    @property
    def wait_seconds(self) -> float:
        """The pause after the latest failure; 0 when well."""
        return min(_MAX_RETRY_SECONDS, _MIN_RETRY_SECONDS * 2.0 ** min(self.failures - 1, 10)) if self.failures else 0.0

    def attempt(self, operation: Callable[[], bool], skip_pause: bool) -> bool:
        """Return the operation's result; False when it fails, or its pause is not over.

        Raises TrackerUnreachableError, which does not belong to one operation.
        """
        if self.failures and not skip_pause and time.monotonic() < self._retry_at:
            return False
        try:
            result = operation()
        except TrackerUnreachableError:
            raise
        except Exception as error:
            self.record_failure(error)
            return False
        self.record_success()
        return result

    def record_failure(self, error: Exception) -> None:
        """Count a failure; log the first one, with a traceback where its text may not explain it."""
        self.is_permanent = isinstance(error, TrackingError) and not isinstance(error, TrackerUnreachableError)
        self.last_error = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        if not self.failures:
            ending = "" if self.is_permanent else "; trying again"
            traceback = not isinstance(error, SELF_EXPLANATORY_ERRORS)
            _log.warning("%s: %s%s", self._name, self.last_error, ending, exc_info=traceback)
        self.failures += 1
        self._retry_at = time.monotonic() + self.wait_seconds

    def record_success(self) -> None:
        """Reset the failures; log the end of a row of them."""
        if self.failures:
            _log.warning("%s: works again after %d failures", self._name, self.failures)
        self.failures = 0
        self.last_error = None
        self.is_permanent = False
