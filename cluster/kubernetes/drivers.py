"""Asks the drivers of jobs in this pod to save and end, and waits until they have: the head's preStop.

Workers need none of this: Ray itself drains a node that is asked to end, and what trains there is saved. A driver on
the head would die with it, and all of its models would lose what came after their last checkpoint. It is sent what
`ray job stop` sends; its job then counts as failed, so that a RayJob tries again, and resumes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Drivers:
    """Have the drivers of jobs in this pod save and end."""

    seconds: float = 60.0
    """how long to wait for them"""


def main() -> int:
    """The exit status: 1 when a driver is still there."""
    asked = list(ask())
    deadline = time.monotonic() + tyro.cli(Drivers, description=__doc__).seconds
    while any(map(alive, asked)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return 1 if any(map(alive, asked)) else 0


def ask() -> Iterator[int]:
    """Send SIGTERM to each driver; their pids."""
    for entry in Path("/proc").iterdir():
        # What is gone by now, or another user's, is no driver of ours.
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                words = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
                if drives(words):
                    os.kill(int(entry.name), signal.SIGTERM)
                    print(f"drivers.py: asked {' '.join(words[1:3])} to save and end", flush=True)
                    yield int(entry.name)


def drives(words: list[str]) -> bool:
    """Return whether a command line is that of a driver of this project's jobs."""
    if len(words) < 2 or not Path(words[0]).name.startswith("python"):
        return False
    script = Path(words[1])
    return script.name == "orchestrator" or (script.suffix == ".py" and script.parent.name == "jobs")


def alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


if __name__ == "__main__":
    raise SystemExit(main())
