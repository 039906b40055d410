"""The end of a program that a test started, and of all its descendants, also behind a prefix such as nsenter."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.support.launched import process_tree

POLL_SECONDS = 0.05


def end(process: "subprocess.Popen[bytes]", first: signal.Signals, patience: float) -> None:
    """Signal all of them, kill those that remain after `patience` seconds; return when all are gone.

    A prefix such as nsenter passes no signals on and may end before its command: so each process gets its own.
    """
    tree = process_tree(process.pid)
    for number in (first, signal.SIGKILL):
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while (tree := [pid for pid in tree if _alive(pid)]) and time.monotonic() < deadline:
            process.poll()  # reaps it
            time.sleep(POLL_SECONDS)
        if not tree:
            break
    process.wait(patience)


def _alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
