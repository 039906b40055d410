"""Who holds a run's lease, seen from any machine that sees its storage. Importable without ray or torch."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from orchestrator.config.json_text import parse_object
from orchestrator.launch.lease import BEAT_SECONDS, STALE_SECONDS, UNKNOWN, Owner, gone, newest, parse_owner
from orchestrator.storage import files

# Clocks of machines differ by less: a heartbeat that is older by our clock is one of a dead owner.
CLOCKS_SECONDS = 600.0


@dataclass(frozen=True)
class Holder:
    """The last lease on a run, as it was at one moment."""

    leases: str  # URL of the folder of leases
    number: int
    owner: Owner
    beat: bytes  # what the heartbeat said; empty when there is none
    released: bool
    asked_to_stop: bool

    @property
    def stop_flag(self) -> str:
        """URL of the file that asks the holder, and its workers, to stop."""
        return files.join(self.leases, f"{self.number:06d}.stop")

    @property
    def gone(self) -> bool:
        """Whether the owner was a process of this machine that is no more."""
        return gone(self.owner)

    @property
    def age(self) -> float:
        """Seconds since the last heartbeat, or since the lease was taken, by this machine's clock; NaN when unknown."""
        try:
            return time.time() - float(parse_object(self.beat)["time"])
        except (ValueError, KeyError, TypeError, OverflowError):
            # No heartbeat yet, or one that cannot be read: then only whether it changes says something.
            return math.nan if self.beat or self.owner == UNKNOWN else time.time() - self.owner.since


def look(folder: str) -> Holder | None:
    """The last lease on the run in `folder`; None when it never had one. Its owner is UNKNOWN when damaged."""
    leases = files.join(folder, "lease")
    names = files.list_names(leases)
    number = newest(names)
    stem = f"{number:06d}"
    try:
        owner = parse_owner(files.read_bytes(files.join(leases, stem + ".json")))
    except FileNotFoundError:
        return None
    beat = b""
    if f"{stem}.beat" in names:
        beat = files.read_bytes(files.join(leases, stem + ".beat"))
    return Holder(leases, number, owner, beat, f"{stem}.released" in names, f"{stem}.stop" in names)


def lives(folder: str, holder: Holder | None, patience: float = 2.5 * BEAT_SECONDS) -> bool:
    """Whether somebody runs the run in `folder`, whose holder was just seen.

    A fresh heartbeat is believed. One that is old by our clock, or ahead of it, is looked at again for `patience`
    seconds, since clocks of machines differ; unless the difference is beyond what clocks have. So is one that cannot be
    read.
    """
    if holder is None or holder.released or holder.gone:
        return False
    if abs(holder.age) <= STALE_SECONDS:
        return True
    deadline = time.monotonic() + (0.0 if abs(holder.age) > CLOCKS_SECONDS else patience)
    while time.monotonic() < deadline:
        time.sleep(min(0.5, patience / 4))
        now = look(folder)
        if now is not None and (now.number, now.beat) != (holder.number, holder.beat):
            return not now.released
    return False
