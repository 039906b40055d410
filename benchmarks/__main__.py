"""The benchmarks: `python -m benchmarks [NAME ...]`, all of them without a name.

Prints a line per figure, NAME VALUE GOAL PASS|SHORT, and INFO lines for the limits and peers measured beside them;
exit status 1 when a figure is short or a benchmark fails. Each runs in a process of its own.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile

from benchmarks import frame

NAMES = (
    "data",
    "large",
    "s3",
    "resume",
    "plan",
    "memory",
    "step",
    "survival",
    "overhead",
    "startup",
    "grid",
    "join",
    "fleet",
    "sweep",
    "asha",
    "scaling",
    "nodes",
)
SECONDS = 1800.0  # a benchmark that takes longer hangs


def main(words: list[str]) -> int:
    """Run the named benchmarks; the exit status."""
    if words[:1] == ["--in"]:
        figures = importlib.import_module(f"benchmarks.{words[2]}").figures
        return frame.report(figures(words[1]))
    if unknown := [name for name in words if name not in NAMES]:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    # Ended from outside, it still takes its benchmark and its photos along.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return max(_run(name, folder) for name in words or NAMES)


def _run(name: str, folder: str) -> int:
    """Run one benchmark over the shared folder of photos; 1 when it is short, fails or hangs."""
    frame.progress(name)
    # A session of its own, so that whatever it started can be ended with it.
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--in", folder, name], cwd=frame.ROOT, start_new_session=True
    )
    try:
        status: int | str = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        status = f"nothing after {SECONDS:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status != 0:
        frame.progress(f"{name}: {'short, or failed' if status == 1 else status}")
    return 0 if status == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
