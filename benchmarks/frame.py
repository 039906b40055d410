"""Parts that benchmarks share: figures with their goals, CPU seconds of a process tree, pinning, paired repetitions.

A benchmark is a module with `figures(folder)`, which yields Figures as they are measured. Figures without a goal are
the limits and peers of those that have one, measured in the same run.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CHILD_SECONDS = 300.0  # a part in a process of its own that takes longer hangs
ROOT = Path(__file__).resolve().parent.parent
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Figure:
    """A measured value; at most one of the two goals."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def short(self) -> bool:
        """Return whether a goal is missed; NaN misses any."""
        reached = (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )
        return not reached

    def line(self) -> str:
        """NAME VALUE GOAL PASS|SHORT, with - for GOAL and INFO for the verdict where there is no goal."""
        if self.at_least is None and self.at_most is None:
            return f"{self.name} {self.value:.4g} - INFO"
        goal = f">={self.at_least:g}" if self.at_least is not None else f"<={self.at_most:g}"
        return f"{self.name} {self.value:.4g} {goal} {'SHORT' if self.short else 'PASS'}"


def report(figures: Iterable[Figure]) -> int:
    """Print a line per figure as it comes; the exit status, 1 when one is short."""
    found = []
    for figure in figures:
        print(figure.line(), flush=True)
        found.append(figure)
    return 1 if not found or any(figure.short for figure in found) else 0


def progress(text: str) -> None:
    """Tell a person what is going on; the figures alone go to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ cost
class Cost(NamedTuple):
    """Seconds and memory of a measured part."""

    cpu: float  # seconds, user and system, of this process and all below it
    wall: float  # seconds


def cpu_seconds() -> float:
    """CPU seconds, user and system, that this process and all its descendants, ended or alive, have taken so far.

    Ended children count once they were waited for; those alive are read from /proc, to a tick of 10 ms.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = sum(_ticks(process) for process in _descendants(os.getpid()))
    return time.process_time() + ended.ru_utime + ended.ru_stime + alive / _TICKS


def _descendants(process: int) -> Iterator[int]:
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            listed = [int(child) for child in children.read_text().split()]
        except OSError:
            continue  # the thread has ended since
        for child in listed:
            yield child
            yield from _descendants(child)


def _ticks(process: int) -> int:
    """Clock ticks of a process and of its children that have ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0  # ended since
    # The command's name stands in brackets and may hold anything; utime is the twelfth field after it.
    return sum(int(field) for field in text.rpartition(")")[2].split()[11:15])


def cost(part: Callable[[], object]) -> Cost:
    """Run a part and tell what it took."""
    gc.collect()
    cpu, wall = cpu_seconds(), time.perf_counter()
    part()
    wall = time.perf_counter() - wall
    return Cost(cpu_seconds() - cpu, wall)


def interleaved(parts: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Cost]]:
    """Costs of each part, run in turn (A B C, C B A, ...), so that a slow spell of the machine meets all of them."""
    found: dict[str, list[Cost]] = {name: [] for name in parts}
    for turn in range(rounds):
        for name in list(parts)[:: 1 if turn % 2 == 0 else -1]:
            taken = cost(parts[name])
            found[name].append(taken)
            progress(f"round {turn + 1} of {rounds}: {name}: {taken.cpu:.2f} s of CPU, {taken.wall:.2f} s")
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of paired values."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


# ------------------------------------------------------------------ the process
@contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """Hold all threads of this process, and what they start meanwhile, on these cores; afterwards as before."""
    before = os.sched_getaffinity(0)
    _pin(set(cores))
    try:
        yield
    finally:
        _pin(before)


def _pin(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:
            continue  # ended since


def cores(count: int) -> list[int]:
    """The first `count` cores this process may use. Raises RuntimeError when there are fewer."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < count:
        raise RuntimeError(f"{count} cores are needed, {len(mine)} can be used")
    return mine[:count]


def memory(kind: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at its peak (which, unlike getrusage's, starts anew at exec)."""
    for row in Path("/proc/self/status").read_text().splitlines():
        name, _, value = row.partition(":")
        if name == kind:
            return int(value.split()[0]) / 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def child(module: str, *words: object, environment: Mapping[str, str] | None = None) -> Any:
    """Return the last line that `python -m benchmarks.MODULE WORDS` prints, read as JSON: a part in a fresh process.

    Raises RuntimeError when it fails, subprocess.TimeoutExpired when it hangs (it is killed then).
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True,
        timeout=CHILD_SECONDS, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError(f"benchmarks.{module} {' '.join(map(str, words))} ended with status {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])
