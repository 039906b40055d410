"""Repeated failure of one thing: said when it starts and when it ends, with growing pauses between tries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from orchestrator.tracking.tracker import TrackerUnreachable, TrackingError

_log = logging.getLogger(__name__)
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0


class Trouble:
    """Counts failures in a row.

    name: what fails, for the log. failures: in a row so far. last: the latest error's text, None when well.
    is_final: whether the latest error is one that the tracker will give again until a person mends its cause.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._retry_at = float("-inf")
        self.failures = 0
        self.last: str | None = None
        self.is_final = False

    @property
    def wait_seconds(self) -> float:
        """The pause after the latest failure; 0 when well."""
        if not self.failures:
            return 0.0
        return float(min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2 ** min(self.failures - 1, 10)))

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
            self.failed(error)
            return False
        self.worked()
        return answer

    def failed(self, error: Exception) -> None:
        """Note a failure; the first one is logged, with a traceback where its text may not explain it."""
        self.is_final = isinstance(error, TrackingError) and not isinstance(error, TrackerUnreachable)
        text = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        if not self.failures:
            ending = "" if self.is_final else "; trying again"
            _log.warning("%s: %s%s", self._name, text, ending, exc_info=not is_explained(error))
        self.failures += 1
        self.last = text
        self._retry_at = time.monotonic() + self.wait_seconds

    def worked(self) -> None:
        """Note that it works; the end of a row of failures is logged."""
        if self.failures:
            _log.warning("%s: works again after %d failures", self._name, self.failures)
        self.failures = 0
        self.last = None
        self.is_final = False


def is_explained(error: Exception) -> bool:
    """Return whether the text of an error says what is wrong, so that a traceback adds nothing."""
    return isinstance(error, RuntimeError | OSError | ValueError)
