"""Leases, by which only one driver at a time runs a run, with heartbeat, owner, and the flag that asks for a stop.

Lease number n is the file `n.json`, created conditionally, so that two drivers cannot both have it; the highest number
owns the run. The owner overwrites `n.beat`, its heartbeat, and writes `n.released` when it is done; `n.stop` asks it to
stop. A lease is stale when its heartbeat does not change for a while by the next driver's own clock (clocks of machines
differ), or immediately when its owner was a process of this machine that has ended.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from orchestrator.config import redaction
from orchestrator.config.errors import format_command
from orchestrator.config.json_text import parse_object
from orchestrator.ray_backend.launch_errors import JobError
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.storage import file_io

HEARTBEAT_SECONDS = 3.0
STALE_SECONDS = 15.0
# Clocks of machines differ by less: the owner of a heartbeat that is older by this machine's clock is dead.
MAX_CLOCK_SKEW_SECONDS = 600.0
_RECORD_NAME = re.compile(r"^(\d{6,})\.json$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseOwner:
    """The process that runs a run."""

    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    job: str  # submission id of a Ray job, empty for a process of its own
    since: Annotated[float, Field(ge=0, lt=4e9)]  # unix seconds; a later time is damage
    space: str = ""  # boot and process namespace that the pid is of: containers of one host share its name

    def __str__(self) -> str:
        if self == UNKNOWN_OWNER:
            return "an unknown process (its lease cannot be read)"
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {since}"

    @property
    def is_dead(self) -> bool:
        """True if it was a process of this very machine that has ended."""
        if self.host != socket.gethostname() or self.space not in ("", _read_pid_namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except OSError as error:  # another user's process may not be signalled
            return isinstance(error, ProcessLookupError)
        return False


# The owner of a lease whose record is damaged: only its heartbeat shows that there is one.
UNKNOWN_OWNER = LeaseOwner("", 0, "", 0.0)


def parse_owner(data: bytes) -> LeaseOwner:
    """Return the owner in a lease's record, perhaps of a newer version; UNKNOWN when the record cannot be read."""
    try:
        return TypeAdapter(LeaseOwner).validate_json(data, strict=True)
    except ValueError:
        return UNKNOWN_OWNER


class LeaseHeldError(JobError):
    """A run that another live driver runs; the message names it and says what can be done."""

    def __init__(self, folder: str, owner: LeaseOwner) -> None:
        job = shlex.quote(owner.job)
        attach = f"ray job logs --follow {job}" if owner.job else "look at its terminal"
        stop = f"ray job stop {job}" if owner.job else "Ctrl-C there"
        super().__init__(
            f"{folder} is being run by {owner}: attach ({attach}), or stop it ({stop}, or from anywhere: "
            f"{format_command('stop', [redaction.redact(folder)])}) and submit again"
        )


def get_current_owner() -> LeaseOwner:
    """This process as an owner; a submitted Ray job is named by its submission id."""
    return LeaseOwner(socket.gethostname(), os.getpid(), get_submission_id() or "", time.time(), _read_pid_namespace())


def _read_pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """A lease that this process holds, with a heartbeat in the background, until it is released."""

    def __init__(self, folder: str, number: int, on_stop: Callable[[], None]) -> None:
        """folder: URL of the folder of leases. on_stop: called, from a thread, after a stop was requested."""
        self._folder, self.number, self._on_stop = folder, number, on_stop
        # URLs of the files that ask the holder and its workers to stop, and that exist once another driver took over.
        self.stop_flag, self.successor = _make_url(folder, number, "stop"), _make_url(folder, number + 1, "json")
        self._released = threading.Event()
        self._write_heartbeat()
        self._thread = threading.Thread(target=self._run_heartbeat, name="lease", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Ask what runs under this lease to save and stop; an earlier request, perhaps not to save, stays valid."""
        file_io.create_bytes(self.stop_flag, b"")

    def release(self) -> None:
        """Release the run for the next driver."""
        self._released.set()
        self._thread.join()
        file_io.write_bytes(_make_url(self._folder, self.number, "released"), b"")

    def _write_heartbeat(self) -> None:
        beat = json.dumps({"time": time.time()}).encode()
        file_io.write_bytes(_make_url(self._folder, self.number, "beat"), beat)

    def _run_heartbeat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                if file_io.exists(self.successor):
                    # Suspended for so long that another driver took over: this one must not write any more.
                    _log.error("lease: %s was taken over while this driver was suspended; stopping", self._folder)
                    self.request_stop()
                    self._on_stop()
                    return
                self._write_heartbeat()
                if file_io.exists(self.stop_flag):
                    self._on_stop()
            except OSError as error:
                _log.warning("lease: heartbeat not written, retrying in %g s: %s", HEARTBEAT_SECONDS, error)


@dataclass(frozen=True)
class LeaseSnapshot:
    """The last lease on a run, as it was at one moment."""

    stop_flag: str  # URL of the file that asks the holder, and its workers, to stop
    number: int
    owner: LeaseOwner
    heartbeat: bytes  # content of the heartbeat's file; empty when there is none
    released: bool
    stop_requested: bool

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat, or since the lease was taken, by this machine's clock; NaN when unknown."""
        try:
            return time.time() - float(parse_object(self.heartbeat)["time"])
        except (ValueError, KeyError, TypeError, OverflowError):
            # No heartbeat yet, or one that cannot be read: then only a change of it shows that the owner lives.
            return math.nan if self.heartbeat or self.owner == UNKNOWN_OWNER else time.time() - self.owner.since


def _make_url(leases: str, number: int, kind: str) -> str:
    return file_io.join(leases, f"{number:06d}.{kind}")


def read_lease(folder: str) -> LeaseSnapshot | None:
    """Return the last lease on the run in `folder`; None when it never had one. A damaged one has an unknown owner."""
    leases = file_io.join(folder, "lease")
    names = file_io.list_names(leases)
    number = max((int(match[1]) for name in names if (match := _RECORD_NAME.match(name))), default=0)
    if number == 0:
        return None
    owner = parse_owner(file_io.read_bytes(_make_url(leases, number, "json")))
    stem = f"{number:06d}"
    beat = file_io.read_bytes(_make_url(leases, number, "beat")) if f"{stem}.beat" in names else b""
    stop_flag = _make_url(leases, number, "stop")
    return LeaseSnapshot(stop_flag, number, owner, beat, f"{stem}.released" in names, f"{stem}.stop" in names)


def acquire_lease(
    folder: str, stale_seconds: float = STALE_SECONDS, on_stop: Callable[[], None] = lambda: None
) -> Lease:
    """Acquire the lease on a run's folder: immediately if it is free, after `stale_seconds` if its owner looks dead.

    A lease whose record cannot be read is treated like any other, as long as its heartbeat changes. on_stop: as of
    Lease. Raises LeaseHeldError when a live driver has it.
    """
    leases = file_io.join(folder, "lease")
    while True:
        last, number = read_lease(folder), 1
        if last is not None:
            number = last.number + 1
            if not (last.released or last.owner.is_dead) and _changes_within(folder, last, stale_seconds):
                raise LeaseHeldError(folder, (read_lease(folder) or last).owner)
        owner = json.dumps(asdict(get_current_owner())).encode()
        if file_io.create_bytes(_make_url(leases, number, "json"), owner):
            return Lease(leases, number, on_stop)


def is_driver_alive(folder: str, last: LeaseSnapshot | None, patience: float = 2.5 * HEARTBEAT_SECONDS) -> bool:
    """Return whether a live driver runs the run in `folder`, given its lease as read just now.

    A fresh heartbeat is trusted. One that is old by this machine's clock, ahead of it, or unreadable is watched for
    `patience` seconds, since clocks of machines differ, unless it differs by more than clocks do.
    """
    if last is None or last.released or last.owner.is_dead:
        return False
    if abs(last.heartbeat_age) <= STALE_SECONDS:
        return True
    return not abs(last.heartbeat_age) > MAX_CLOCK_SKEW_SECONDS and _changes_within(folder, last, patience)


def _changes_within(folder: str, last: LeaseSnapshot, seconds: float) -> bool:
    """Return whether a lease's heartbeat or holder changes within so many seconds; False when it is released."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, seconds / 4))
        now = read_lease(folder)
        if now is None or now.released:
            return False
        if (now.number, now.heartbeat) != (last.number, last.heartbeat):
            return True
    return False
