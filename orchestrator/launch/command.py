"""Around every job: errors as one line each and an exit status, never a traceback for what a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.data.errors import DataError
from orchestrator.launch.cluster import ClusterError
from orchestrator.launch.lease import LeaseHeldError
from orchestrator.launch.pool import TaskError
from orchestrator.launch.preflight import PreflightError
from orchestrator.storage.commit import CommitError
from orchestrator.storage.files import StorageError

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
# A log is no terminal and has no width of its own.
LOG_WIDTH = 120


def console() -> Console:
    """Where jobs print: the terminal, or a log of fixed width."""
    return Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH, soft_wrap=True)


def guarded(prog: str, main: Callable[[], int]) -> int:
    """The exit status of a job: 0 done, 1 failed, 2 refused, 128 + n stopped by signal n."""
    try:
        return main()
    except ConfigError as error:
        return _tell(prog, [str(error)], REFUSED)
    except PreflightError as error:
        return _tell(prog, list(error.problems), FAILED)
    except (ClusterError, LeaseHeldError, TaskError, DataError, CommitError, StorageError) as error:
        return _tell(prog, [str(error)], FAILED)
    except KeyboardInterrupt:
        return _tell(prog, ["interrupted"], INTERRUPTED)


def _tell(prog: str, problems: list[str], status: int) -> int:
    for problem in problems:
        sys.stderr.write(f"{prog}: error: {' '.join(problem.split())}\n")
    return status
