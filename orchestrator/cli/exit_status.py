"""The console, exit statuses and one-line errors of commands. Importable without ray or torch."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.config.output import PrintableConsole, prepare_output
from orchestrator.config.redaction import make_printable
from orchestrator.data.data_errors import DataError
from orchestrator.ray_backend.launch_errors import JobError
from orchestrator.storage import ranged_reads
from orchestrator.storage.commit import CommitError
from orchestrator.storage.file_io import StorageError

EXIT_USAGE_ERROR, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130
THREAD_JOIN_SECONDS = 5.0
LOG_WIDTH = 120  # a log has no width of its own
STOPPED_NOTICE = "stopped; rerun the same command to resume"


def make_console() -> Console:
    """Return the console that commands print on: the terminal, or a log of fixed width."""
    prepare_output()
    return PrintableConsole() if sys.stdout.isatty() else PrintableConsole(width=LOG_WIDTH, soft_wrap=True)


def run_command(program: str, main: Callable[[], int], finishes_unread: bool = False) -> int:
    """Run a command; return its exit status: 0 done, 1 failed, 2 wrong usage, 130 after Ctrl-C, 128 + N by signal N.

    Errors that the user can fix are printed as one line, without a traceback. After Ctrl-C the process ends within
    seconds, even when a thread waits for a store that does not answer. finishes_unread: the command completes its work
    when its terminal is closed.
    """
    before = set(threading.enumerate())
    with tolerate_closed_output() if finishes_unread else nullcontext():
        try:
            return main()
        except KeyboardInterrupt:
            print_errors(program, ["interrupted"], EXIT_INTERRUPTED)
            _join_threads_or_exit(before)
            return EXIT_INTERRUPTED
        except ConfigError as error:
            return print_errors(program, [str(error)], EXIT_USAGE_ERROR)
        except JobError as error:
            return print_errors(program, error.problems, EXIT_FAILURE)
        except (DataError, CommitError, StorageError) as error:
            return print_errors(program, [str(error)], EXIT_FAILURE)
        except UnicodeEncodeError as error:
            problem = f"a name cannot be written in this locale's encoding, {error.encoding}: {error.object!r}"
            fix = "set PYTHONUTF8=1 or a UTF-8 locale such as LC_ALL=C.UTF-8"
            return print_errors(program, [f"{problem}; {fix}"], EXIT_FAILURE)


def _join_threads_or_exit(before: set[threading.Thread]) -> None:
    """Wait a few seconds for the threads started since; end the process if one remains: Python would wait for it."""
    ranged_reads.close_all_readers()
    deadline = time.monotonic() + THREAD_JOIN_SECONDS
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(EXIT_INTERRUPTED)


class DisconnectTolerantStream:
    """A text stream that drops what is written after its terminal was closed or its reader ended."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it; return its length."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer, or drop it."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EPIPE):  # a full disk, for example, may have room for the next line
                # The stream still holds what it could not write; Python would retry at exit, and fail.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@contextmanager
def tolerate_closed_output() -> Iterator[None]:
    """Let a command continue and save when its output can no longer be written."""
    prepare_output()  # before wrapping: a wrapped stream cannot be reconfigured
    output, errors = DisconnectTolerantStream(sys.stdout), DisconnectTolerantStream(sys.stderr)
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            yield
        finally:
            output.flush()
            errors.flush()


def print_errors(prog: str, problems: Sequence[str], status: int) -> int:
    """Print each problem as a line of errors of that program; return `status`."""
    for problem in problems:
        sys.stderr.write(f"{prog}: error: {make_printable(' '.join(problem.split()))}\n")
    return status
