"""Faults of a run, each injected once and followed by its owner's reaction: none, or the same command again."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.storage import commit
from tests.drills.stage import PATIENCE_SECONDS, Run, Stuck, send
from tests.support import launched

LOOK_SECONDS = 0.0005
CATCH_TRIES = 50


@dataclass(frozen=True)
class Hit:
    """A fault that was injected."""

    fault: str
    time: float  # unix seconds
    incidents: int = 1  # that the journal must have of it
    caught: str = ""  # the checkpoint that was being written


Fault = Callable[[Run, random.Random], Hit]


def kill_worker(run: Run, dice: random.Random) -> Hit:
    """Kill one rank (SIGKILL); Ray restarts the group."""
    while not send(dice.choice(_workers(run)), signal.SIGKILL):
        continue  # gone between the look and the shot
    return Hit("worker", time.time())


def kill_driver(run: Run, _dice: random.Random) -> Hit:
    """Kill the driver (SIGKILL), then submit the same command again."""
    run.driver.kill()
    hit = Hit("driver", time.time())
    run.driver.wait()
    run.submit()
    return hit


def kill_in_checkpoint(run: Run, _dice: random.Random) -> Hit:
    """Kill all ranks (SIGKILL) while a checkpoint is half-written.

    They are suspended as soon as a checkpoint without DONE is seen, and resumed if it is complete by then.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    for _ in range(CATCH_TRIES):
        workers, known = _workers(run), {place.url for place in run.uncommitted()}
        while not (new_urls := [place.url for place in run.uncommitted() if place.url not in known]):
            if time.monotonic() > deadline:
                raise Stuck("no checkpoint was begun")
            time.sleep(LOOK_SECONDS)
        for pid in workers:
            send(pid, signal.SIGSTOP)
        _settled(workers)
        half = not commit.is_complete(new_urls[0])
        for pid in workers:
            send(pid, signal.SIGKILL if half else signal.SIGCONT)
        if half:
            return Hit("mid-checkpoint", time.time(), caught=new_urls[0])
    raise Stuck(f"{CATCH_TRIES} checkpoints were complete before their writer could be stopped")


def suspend_worker(run: Run, dice: random.Random) -> Hit:
    """Suspend one rank (SIGSTOP): the watchdogs of the others must end the attempt."""
    send(dice.choice(_workers(run)), signal.SIGSTOP)
    return Hit("suspended-worker", time.time())


def stop_and_submit(run: Run, _dice: random.Random) -> Hit:
    """Run jobs/stop.py, then submit the same command again: no incident."""
    hit = Hit("stop", time.time(), incidents=0)
    stopping = launched.job("stop.py", run.folder.name, runs=run.storage, seconds=PATIENCE_SECONDS)
    if stopping.status != 0:
        raise Stuck(f"stop.py ended with {stopping.status}: {stopping.out[-300:]}{stopping.err[-300:]}")
    ended = run.ended()
    if ended.status != 128 + signal.SIGTERM:
        raise Stuck(f"the stopped driver ended with {ended.status}: {ended.out[-300:]}")
    run.submit()
    return hit


def _workers(run: Run) -> list[int]:
    pids: list[int] = []

    def there() -> bool:
        pids[:] = run.workers()
        return bool(pids)

    run.wait(there, "a worker")
    return pids


def _settled(pids: list[int]) -> None:
    """Wait until these processes are stopped or gone: until then they may still write."""
    deadline = time.monotonic() + 5
    while any(_state(pid) not in "TtZX" for pid in pids):
        if time.monotonic() > deadline:
            raise Stuck("a worker kept running in spite of SIGSTOP")
        time.sleep(LOOK_SECONDS)


def _state(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "X"


FAULTS: dict[str, Fault] = {
    "worker": kill_worker,
    "driver": kill_driver,
    "mid-checkpoint": kill_in_checkpoint,
    "suspended-worker": suspend_worker,
    "stop": stop_and_submit,
}
