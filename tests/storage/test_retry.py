"""Retries: transient errors are retried, permanent ones are raised immediately."""

from collections.abc import Callable

import pytest

from orchestrator.storage.storage_errors import call_with_retries


def failing(times: int, error: BaseException) -> tuple[Callable[[], str], list[int]]:
    """A call that fails so often before it succeeds, and how often it was made."""
    calls: list[int] = []

    def call() -> str:
        calls.append(len(calls))
        if len(calls) <= times:
            raise error
        return "done"

    return call, calls


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError(), ConnectionError(), RuntimeError("throttled")])
def test_transient_errors_are_retried(error: Exception) -> None:
    call, calls = failing(2, error)
    assert call_with_retries(call, attempts=3, first_wait_seconds=0.001) == "done"
    assert len(calls) == 3


def test_the_last_error_is_raised_when_every_attempt_failed() -> None:
    call, calls = failing(9, OSError("still down"))
    with pytest.raises(OSError, match="still down"):
        call_with_retries(call, attempts=3, first_wait_seconds=0.001)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(), FileExistsError(), PermissionError(), IsADirectoryError(), NotADirectoryError(),
        ValueError(), KeyboardInterrupt(), SystemExit(),
    ],
)  # fmt: skip
def test_permanent_errors_are_raised_immediately(error: BaseException) -> None:
    call, calls = failing(1, error)
    with pytest.raises(type(error)):
        call_with_retries(call, first_wait_seconds=0.001)
    assert len(calls) == 1
