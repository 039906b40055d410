"""Repeated failure of one thing: said when it starts and when it ends, with growing pauses between tries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 60.0


class Trouble:
    """Counts failures in a row.

    name: what fails, for the log. failures: in a row so far. last: the latest error's text, None when well.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._retry_at = float("-inf")
        self.failures = 0
        self.last: str | None = None

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
        if not self.failures:
            explained = isinstance(error, RuntimeError | OSError | ValueError)
            _log.warning("%s: %s: %s; trying again", self._name, type(error).__name__, error, exc_info=not explained)
        self.failures += 1
        self.last = f"{type(error).__name__}: {error}"
        self._retry_at = time.monotonic() + self.wait_seconds

    def worked(self) -> None:
        """Note that it works; the end of a row of failures is logged."""
        if self.failures:
            _log.warning("%s: works again after %d failures", self._name, self.failures)
        self.failures = 0
        self.last = None
