"""Bounded retries with backoff for storage calls that may work a moment later."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tenacity

from orchestrator.storage import faults

T = TypeVar("T")


def retrying(call: Callable[[], T], attempts: int = 5, first_wait_seconds: float = 0.2) -> T:
    """The call's result; transient errors are retried with exponential backoff and jitter.

    Raises the last error when all attempts failed, and at once when a retry cannot help.
    """
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_random_exponential(multiplier=first_wait_seconds, max=5.0),
        # tenacity catches BaseException: Ctrl-C and SystemExit must pass.
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not faults.is_final(error)),
        reraise=True,
    )(call)
