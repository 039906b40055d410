"""Where jobs print, and their errors as one line each with an exit status. Importable without ray or torch."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.config.output import PrintableConsole, prepare_output
from orchestrator.config.redaction import make_printable
from orchestrator.data.data_errors import DataError
from orchestrator.ray_backend.lease import LeaseHeldError
from orchestrator.storage import ranged_reads
from orchestrator.storage.commit import CommitError
from orchestrator.storage.file_io import StorageError

EXIT_USAGE_ERROR, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130
THREAD_JOIN_SECONDS = 5.0
# A log is no terminal and has no width of its own.
LOG_WIDTH = 120


def make_console() -> Console:
    """Where jobs print, all of it printable: the terminal, or a log of fixed width."""
    prepare_output()
    return PrintableConsole() if sys.stdout.isatty() else PrintableConsole(width=LOG_WIDTH, soft_wrap=True)


def run_command(prog: str, main: Callable[[], int]) -> int:
    """The exit status of a job: 0 done, 1 failed, 2 refused, 130 by Ctrl-C; what can be mended is no traceback.

    After Ctrl-C the process ends within seconds, also when a thread waits for a store that does not answer.
    """
    before = set(threading.enumerate())
    try:
        return main()
    except ConfigError as error:
        return print_errors(prog, [str(error)], EXIT_USAGE_ERROR)
    except (LeaseHeldError, DataError, CommitError, StorageError) as error:
        return print_errors(prog, [str(error)], EXIT_FAILURE)
    except UnicodeEncodeError as error:
        lacking = f"a name cannot be written in this locale's encoding, {error.encoding}: {error.object!r}"
        return print_errors(
            prog, [f"{lacking}; set PYTHONUTF8=1 or a UTF-8 locale such as LC_ALL=C.UTF-8"], EXIT_FAILURE
        )
    except KeyboardInterrupt:
        status = print_errors(prog, ["interrupted"], EXIT_INTERRUPTED)
        _join_threads_or_exit(before, status)
        return status


def _join_threads_or_exit(before: set[threading.Thread], status: int) -> None:
    """Wait a moment for threads started since; end the process when one stays, since Python would wait for it."""
    ranged_reads.close_all_readers()
    deadline = time.monotonic() + THREAD_JOIN_SECONDS
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)


class DisconnectTolerantStream:
    """A text stream that takes what is written after its terminal is closed, or its reader has ended, and drops it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it; its length."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._discard_output(error)
            return len(text)

    def flush(self) -> None:
        """Flush what is buffered, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._discard_output(error)

    def _discard_output(self, error: OSError) -> None:
        if error.errno not in (errno.EIO, errno.EPIPE):
            return  # a full disk, say, may have room for the next line
        # The stream still holds what it could not write, and Python tries again at its exit, which would then fail.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextmanager
def tolerate_closed_output() -> Iterator[None]:
    """Let a job go on, and save, when nobody can read any longer what it prints."""
    prepare_output()  # on the streams themselves: one that is wrapped cannot be set up
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = DisconnectTolerantStream(sys.stdout), DisconnectTolerantStream(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def print_errors(prog: str, problems: list[str], status: int) -> int:
    """Print problems, a line each, as errors of that program; the exit status that was given."""
    for problem in problems:
        sys.stderr.write(f"{prog}: error: {make_printable(' '.join(problem.split()))}\n")
    return status
