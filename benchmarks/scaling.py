"""One, two and three workers on machines of half a core each: `make bench-scaling`; needs network namespaces.

Each worker is a process on a machine of its own, with a ration of half a core (the kernel's cpu controller) and a
cable of so many Mbit/s. Equal work: the same global batch, cut among them. In turn, each rank makes steps with the
exchange of gradients and steps of the same size without, so that the difference is what communication costs, whatever
the machine does meanwhile. The model of benchmarks/scaling_model.py foretells the steps with exchange from those
without, the bytes and the cable; the figures hold it against what was measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import frame
from benchmarks.frame import ROOT, Figure
from benchmarks.scaling_model import Link, ring_seconds, step_seconds
from tests.support import machines
from tests.support.machines import Machine

CORES = 0.5
WORKERS = (1, 2, 3)
MBITS = (1000, 100)
PORT = 29500
PATIENCE_SECONDS = 400.0
# What the model may be off by: its two ends are no exchange hidden and all of it that can be.
TOLERANCE = 0.10


@dataclass(frozen=True)
class Measured:
    """Seconds, medians over rounds; of the slowest rank."""

    step: float
    alone: float  # the same images, no exchange
    exchange: float  # of as many bytes by itself
    bytes: int


def figures(folder: str) -> Iterator[Figure]:
    """The figures of `make bench-scaling`."""
    if (reason := machines.trouble()) is not None:
        raise RuntimeError(f"no machines to scale over: {reason}")
    with tempfile.TemporaryDirectory(prefix="scaling-") as own, machines.network(Path(own), max(WORKERS)) as made:
        for machine in made:
            machine.ration(CORES)
            machine.boot(made)
        found: dict[tuple[int, int], Measured] = {}
        for mbit in MBITS:
            for machine in made:
                machine.narrow(mbit)
            for workers in WORKERS:
                found[mbit, workers] = measured(made[:workers], Path(folder))
                frame.progress(f"{workers} workers, {mbit} Mbit/s: {found[mbit, workers]}")
    for mbit in MBITS:
        one = found[mbit, 1]
        for workers in WORKERS[1:]:
            yield from _compared(mbit, workers, one, found[mbit, workers])


def _compared(mbit: int, workers: int, one: Measured, many: Measured) -> Iterator[Figure]:
    name = f"scaling.{mbit}_mbit.{workers}_workers"
    yield Figure(f"{name}.efficiency", one.step / (workers * many.step))
    yield Figure(f"{name}.communication_share", 1 - many.alone / many.step)
    yield Figure(f"{name}.step_s", many.step)
    yield Figure(f"{name}.exchange_alone_s", many.exchange)
    # The cable says how fast bytes can go; what processors add is measured where the cable is wide.
    link = Link(mbit * 1e6 / 8)
    cable = ring_seconds(workers, many.bytes, link)
    yield Figure(f"{name}.exchange/cable", many.exchange / cable)
    least = step_seconds(many.alone, max(cable, many.exchange), 0.0)
    most = many.alone + max(cable, many.exchange)
    yield Figure(f"{name}.model.least_s", least)
    yield Figure(f"{name}.model.most_s", most)
    off = max(0.0, least - many.step, many.step - most) / many.step
    yield Figure(f"{name}.model.off", off, at_most=TOLERANCE)


def measured(made: Sequence[Machine], folder: Path) -> Measured:
    """One group of workers, a rank on each machine."""
    logs = [folder / f"rank-{machine.number}.log" for machine in made]
    ranks = []
    for machine, log in zip(made, logs, strict=True):
        words = [str(machine.number), str(len(made)), f"tcp://{made[0].address}:{PORT}"]
        with open(log, "wb") as out:
            environment = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
            ranks.append(machine.exec([sys.executable, "-m", "benchmarks.scaling_rank", *words], out, environment))
    try:
        for rank in ranks:
            if rank.wait(PATIENCE_SECONDS):
                raise RuntimeError(f"a rank ended with status {rank.returncode}: {logs[0].read_text()[-1000:]}")
    finally:
        for rank in ranks:
            rank.kill()
    results: list[dict[str, Any]] = [json.loads(log.read_text().splitlines()[-1]) for log in logs]
    # A group is as slow as its slowest rank, round by round.
    rounds = {kind: [max(some) for some in zip(*(one[kind] for one in results), strict=True)] for kind in _KINDS}
    step, alone, exchange = (median(rounds[kind]) for kind in _KINDS)
    return Measured(step, alone, exchange, results[0]["bytes"])


_KINDS = ("step", "alone", "exchange")
