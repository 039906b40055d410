"""Ends a program that a test started, with all that it started itself, wherever a prefix led it."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from tests.support.launched import process_tree

POLL_SECONDS = 0.05


def end(process: "subprocess.Popen[bytes]", first: signal.Signals, patience: float) -> None:
    """Ask all of them by a signal, make those who are there after `patience` seconds; returns when all are gone.

    A prefix such as nsenter passes no signals on and may be gone before what it led to: so each gets its own.
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
    """Whether a process is there and not merely waiting to be reaped."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
