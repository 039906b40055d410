"""Where jobs print, and their errors as one line each with an exit status. Importable without ray or torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.config.output import PrintableConsole, prepare_output
from orchestrator.config.printable import printable
from orchestrator.data.errors import DataError
from orchestrator.launch.lease import LeaseHeldError
from orchestrator.storage.commit import CommitError
from orchestrator.storage.files import StorageError

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
# A log is no terminal and has no width of its own.
LOG_WIDTH = 120


def console() -> Console:
    """Where jobs print, all of it printable: the terminal, or a log of fixed width."""
    prepare_output()
    return PrintableConsole() if sys.stdout.isatty() else PrintableConsole(width=LOG_WIDTH, soft_wrap=True)


def guarded(prog: str, main: Callable[[], int]) -> int:
    """The exit status of a job: 0 done, 1 failed, 2 refused, 130 by Ctrl-C; what can be mended is no traceback."""
    try:
        return main()
    except ConfigError as error:
        return tell(prog, [str(error)], REFUSED)
    except (LeaseHeldError, DataError, CommitError, StorageError) as error:
        return tell(prog, [str(error)], FAILED)
    except UnicodeEncodeError as error:
        lacking = f"a name cannot be written in this locale's encoding, {error.encoding}: {error.object!r}"
        return tell(prog, [f"{lacking}; set PYTHONUTF8=1 or a UTF-8 locale such as LC_ALL=C.UTF-8"], FAILED)
    except KeyboardInterrupt:
        return tell(prog, ["interrupted"], INTERRUPTED)


def tell(prog: str, problems: list[str], status: int) -> int:
    """Print problems, a line each, as errors of that program; the exit status that was given."""
    for problem in problems:
        sys.stderr.write(f"{prog}: error: {printable(' '.join(problem.split()))}\n")
    return status
