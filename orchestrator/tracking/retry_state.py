"""Repeated failure of one thing: said when it starts and when it ends, with growing pauses between tries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from orchestrator.tracking.tracker import TrackerUnreachableError, TrackingError

_log = logging.getLogger(__name__)
_MIN_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 60.0


class RetryState:
    """Counts failures in a row.

    name: what fails, for the log. failures: in a row so far. last: the latest error's text, None when well.
    is_final: whether the latest error is one that the tracker will give again until a person mends its cause.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._retry_at = float("-inf")
        self.failures = 0
        self.last_error: str | None = None
        self.is_permanent = False

    @property
    def wait_seconds(self) -> float:
        """The pause after the latest failure; 0 when well."""
        if not self.failures:
            return 0.0
        return float(min(_MAX_RETRY_SECONDS, _MIN_RETRY_SECONDS * 2 ** min(self.failures - 1, 10)))

    def attempt(self, act: Callable[[], bool], hurried: bool, passing: type[Exception] | None = None) -> bool:
        """act()'s answer; False where it fails, or is not tried because the pause is not over.

        hurried: skip the pause. passing: errors that are somebody else's trouble and go through.
        """
        if self.failures and not hurried and time.monotonic() < self._retry_at:
            return False
        try:
            answer = act()
        except Exception as error:
            if passing is not None and isinstance(error, passing):
                raise
            self.record_failure(error)
            return False
        self.record_success()
        return answer

    def record_failure(self, error: Exception) -> None:
        """Note a failure; the first one is logged, with a traceback where its text may not explain it."""
        self.is_permanent = isinstance(error, TrackingError) and not isinstance(error, TrackerUnreachableError)
        text = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        if not self.failures:
            ending = "" if self.is_permanent else "; trying again"
            _log.warning("%s: %s%s", self._name, text, ending, exc_info=not is_self_explanatory(error))
        self.failures += 1
        self.last_error = text
        self._retry_at = time.monotonic() + self.wait_seconds

    def record_success(self) -> None:
        """Note that it works; the end of a row of failures is logged."""
        if self.failures:
            _log.warning("%s: works again after %d failures", self._name, self.failures)
        self.failures = 0
        self.last_error = None
        self.is_permanent = False


def is_self_explanatory(error: Exception) -> bool:
    """Return whether the text of an error says what is wrong, so that a traceback adds nothing."""
    return isinstance(error, RuntimeError | OSError | ValueError)
