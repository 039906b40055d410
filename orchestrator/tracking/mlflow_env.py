"""Defaults of MLflow's environment variables: quiet, without telemetry, short time-outs. The user's values stay."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_DEFAULTS = {
    # Two names: the second is for the libraries under it.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "DO_NOT_TRACK": "true",
    # INFO chatter and links stay off the terminal; warnings and errors do not.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # mlflow's own are 120 s and 7 retries: a dead server would block a call for a quarter of an hour, and the replayer
    # retries anyway. In 30 s a server can pass an artifact on to its object store.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
# While a person waits: 4 s, a short pause, 4 s.
_SHORT_TIMEOUTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
_variables_set_by_user = frozenset(os.environ)


class _RetryMessageFilter(logging.Filter):
    """Filter of urllib3's line per retried MLflow request, of which an outage has hundreds.

    No error is lost: the last one is raised, and the replayer logs it once.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep the record."""
        message = record.getMessage()
        return not (message.startswith("Retrying") and "/mlflow" in message)


_retry_message_filter = _RetryMessageFilter()


def configure_mlflow() -> None:
    """Set the defaults and quiet urllib3. Call before importing mlflow, which reads some of them only then."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").addFilter(_retry_message_filter)


@contextmanager
def use_short_timeouts() -> Iterator[None]:
    """Use short time-outs for the calls inside, where the user has set none."""
    before = {name: os.environ.get(name) for name in _SHORT_TIMEOUTS if name not in _variables_set_by_user}
    os.environ.update({name: _SHORT_TIMEOUTS[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
