"""Ray Tune's switches for sweeps. Importable without ray, which reads some of them when it is imported."""

from __future__ import annotations

import os

_SWITCHES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files: the journals have all of it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the session's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # epochs that are not validated have no score
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # of records that nobody reads
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the sweep tells them, a line each
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # trials that begin together; the sweep hands out no more than may begin
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints failures whatever its verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def switch() -> None:
    """Set what the user did not set."""
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
