"""State of an operation that is retried: failures in a row, growing pauses, one log line for each outage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from orchestrator.tracking.tracker import TrackerUnreachableError, TrackingError

_log = logging.getLogger(__name__)
_MIN_RETRY_SECONDS = 1.0
_MAX_RETRY_SECONDS = 60.0


class RetryState:
    """Failures in a row of one operation, with growing pauses between its retries.

    name: the operation, for the log. first_seconds, longest_seconds: bounds of the pause. failures: in a row so far.
    last_error: text of the latest error, None when well. is_permanent: whether it recurs until a person fixes it.
    """

    def __init__(self, name: str, first_seconds: float | None = None, longest_seconds: float | None = None) -> None:
        self._name = name
        self._first_seconds = first_seconds or _MIN_RETRY_SECONDS
        self._longest_seconds = longest_seconds or _MAX_RETRY_SECONDS
        self._retry_at = float("-inf")
        self.failures = 0
        self.last_error: str | None = None
        self.is_permanent = False

    @property
    def wait_seconds(self) -> float:
        """The pause after the latest failure; 0 when well."""
        if not self.failures:
            return 0.0
        return float(min(self._longest_seconds, self._first_seconds * 2 ** min(self.failures - 1, 10)))

    def attempt(
        self, operation: Callable[[], bool], skip_pause: bool, reraised: tuple[type[Exception], ...] = ()
    ) -> bool:
        """Return the operation's result; False when it fails, or its pause is not over.

        reraised: errors that do not belong to this operation.
        """
        if self.failures and not skip_pause and time.monotonic() < self._retry_at:
            return False
        try:
            result = operation()
        except reraised:
            raise
        except Exception as error:
            self.record_failure(error)
            return False
        self.record_success()
        return result

    def record_failure(self, error: Exception) -> None:
        """Count a failure; log the first one, with a traceback where its text may not explain it."""
        self.is_permanent = isinstance(error, TrackingError) and not isinstance(error, TrackerUnreachableError)
        text = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        if not self.failures:
            ending = "" if self.is_permanent else "; trying again"
            _log.warning("%s: %s%s", self._name, text, ending, exc_info=not is_self_explanatory(error))
        self.failures += 1
        self.last_error = text
        self._retry_at = time.monotonic() + self.wait_seconds

    def record_success(self) -> None:
        """Reset the failures; log the end of a row of them."""
        if self.failures:
            _log.warning("%s: works again after %d failures", self._name, self.failures)
        self.failures = 0
        self.last_error = None
        self.is_permanent = False


def is_self_explanatory(error: Exception) -> bool:
    """Return whether the text of an error explains it, so that a traceback adds nothing."""
    return isinstance(error, RuntimeError | OSError | ValueError)
