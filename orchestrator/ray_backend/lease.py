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
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.config import redaction
from orchestrator.config.errors import format_command
from orchestrator.config.json_text import parse_object
from orchestrator.ray_backend.launch_errors import JobError
from orchestrator.ray_backend.ray_env import get_submission_id
from orchestrator.storage import file_io

HEARTBEAT_SECONDS = 3.0
STALE_SECONDS = 15.0
_MAX_UNIX_SECONDS = 4e9  # a later time in a record, in unix seconds, is damage
_RECORD_NAME = re.compile(r"^(\d{6,})\.json$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseOwner:
    """The process that runs a run."""

    host: str
    pid: int
    job: str  # submission id of a Ray job, empty for a process of its own
    since: float  # unix seconds
    space: str = ""  # boot and process namespace that the pid is of: containers of one host share its name

    def __str__(self) -> str:
        if self == UNKNOWN_OWNER:
            return "an unknown process (its lease cannot be read)"
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {since}"


# The owner of a lease whose record is damaged: only its heartbeat shows that there is one.
UNKNOWN_OWNER = LeaseOwner("", 0, "", 0.0)


def parse_owner(data: bytes) -> LeaseOwner:
    """Return the owner in a lease's record, perhaps of a newer version; UNKNOWN when the record cannot be read."""
    try:
        record = parse_object(data)
        host, pid, since = record["host"], record["pid"], float(record["since"])
        job, space = record.get("job", ""), record.get("space", "")
        if not all(isinstance(text, str) for text in (host, job, space)) or type(pid) is not int:
            return UNKNOWN_OWNER
        if not (0 < pid < 2**31 and 0 <= since < _MAX_UNIX_SECONDS):
            return UNKNOWN_OWNER
    except (ValueError, KeyError, TypeError, OverflowError):
        return UNKNOWN_OWNER
    return LeaseOwner(host, pid, job, since, space)


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


def is_owner_dead(owner: LeaseOwner) -> bool:
    """Return whether the owner was a process of this very machine that has ended."""
    return (
        owner.host == socket.gethostname()
        and owner.space in ("", _read_pid_namespace())
        and not is_process_alive(owner.pid)
    )


def _read_pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """A lease that this process holds, with a heartbeat in the background, until it is released; a context manager."""

    def __init__(self, folder: str, number: int) -> None:
        self._folder, self.number = folder, number
        self._successor = file_io.join(folder, f"{number + 1:06d}.json")
        self._released = threading.Event()
        self._write_heartbeat()
        self._thread = threading.Thread(target=self._run_heartbeat, name="lease", daemon=True)
        self._thread.start()

    @property
    def stop_flag(self) -> str:
        """URL of the file that asks this lease's holder, and its workers, to save and stop."""
        return self._make_url("stop")

    @property
    def successor(self) -> str:
        """URL of the file that exists once another driver has taken over the run."""
        return self._successor

    def request_stop(self) -> None:
        """Ask what runs under this lease to save and stop; an earlier request, perhaps not to save, stays valid."""
        file_io.create_bytes(self.stop_flag, b"")

    def is_stop_requested(self) -> bool:
        """Return whether a stop was requested."""
        return file_io.exists(self.stop_flag)

    def release(self) -> None:
        """Release the run for the next driver."""
        self._released.set()
        self._thread.join()
        file_io.write_bytes(self._make_url("released"), b"")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _make_url(self, kind: str) -> str:
        return file_io.join(self._folder, f"{self.number:06d}.{kind}")

    def _write_heartbeat(self) -> None:
        file_io.write_bytes(self._make_url("beat"), json.dumps({"time": time.time()}).encode())

    def _run_heartbeat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            try:
                if file_io.exists(self._successor):
                    # Suspended for so long that another driver took over: this one must not write any more.
                    _log.error("lease: %s was taken over while this driver was suspended; stopping", self._folder)
                    self.request_stop()
                    return
                self._write_heartbeat()
            except OSError as error:
                _log.warning("lease: heartbeat not written, retrying in %g s: %s", HEARTBEAT_SECONDS, error)


def acquire_lease(folder: str, stale_seconds: float = STALE_SECONDS) -> Lease:
    """Acquire the lease on a run's folder: immediately if it is free, after `stale_seconds` if its owner looks dead.

    Raises LeaseHeldError when a live driver has it.
    """
    leases = file_io.join(folder, "lease")
    while True:
        if last := find_latest_number(file_io.list_names(leases)):
            _wait_until_free(folder, leases, last, stale_seconds)
        owner = json.dumps(asdict(get_current_owner())).encode()
        if file_io.create_bytes(file_io.join(leases, f"{last + 1:06d}.json"), owner):
            return Lease(leases, last + 1)


def find_latest_number(names: Iterable[str]) -> int:
    """Return the highest number of the leases among these names; 0 when there is none."""
    return max((int(match[1]) for name in names if (match := _RECORD_NAME.match(name))), default=0)


def _wait_until_free(folder: str, leases: str, number: int, stale_seconds: float) -> None:
    """Return when lease `number` is released or its owner dead; raise LeaseHeldError when it lives.

    A lease whose record cannot be read is treated like any other, as long as its heartbeat changes.
    """
    stem = file_io.join(leases, f"{number:06d}")
    if file_io.exists(stem + ".released"):
        return
    owner = parse_owner(file_io.read_bytes(stem + ".json"))
    if is_owner_dead(owner):
        return
    first = _read_heartbeat(stem)
    deadline = time.monotonic() + stale_seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, stale_seconds / 4))
        if file_io.exists(stem + ".released"):
            return
        if _read_heartbeat(stem) != first:
            raise LeaseHeldError(folder, owner)


def _read_heartbeat(stem: str) -> bytes:
    try:
        return file_io.read_bytes(stem + ".beat")
    except FileNotFoundError:
        return b""


def is_process_alive(pid: int) -> bool:
    """Return whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Clocks of machines differ by less: the owner of a heartbeat that is older by this machine's clock is dead.
MAX_CLOCK_SKEW_SECONDS = 600.0


@dataclass(frozen=True)
class LeaseSnapshot:
    """The last lease on a run, as it was at one moment."""

    lease_folder: str  # URL of the folder of leases
    number: int
    owner: LeaseOwner
    heartbeat: bytes  # content of the heartbeat's file; empty when there is none
    released: bool
    stop_requested: bool

    @property
    def stop_flag(self) -> str:
        """URL of the file that asks the holder, and its workers, to stop."""
        return file_io.join(self.lease_folder, f"{self.number:06d}.stop")

    @property
    def is_owner_dead(self) -> bool:
        """Return whether the owner was a process of this machine that has ended."""
        return is_owner_dead(self.owner)

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat, or since the lease was taken, by this machine's clock; NaN when unknown."""
        try:
            return time.time() - float(parse_object(self.heartbeat)["time"])
        except (ValueError, KeyError, TypeError, OverflowError):
            # No heartbeat yet, or one that cannot be read: then only a change of it shows that the owner lives.
            return math.nan if self.heartbeat or self.owner == UNKNOWN_OWNER else time.time() - self.owner.since


def read_lease(folder: str) -> LeaseSnapshot | None:
    """Return the last lease on the run in `folder`; None when it never had one. A damaged one has an unknown owner."""
    leases = file_io.join(folder, "lease")
    names = file_io.list_names(leases)
    number = find_latest_number(names)
    stem = f"{number:06d}"
    try:
        owner = parse_owner(file_io.read_bytes(file_io.join(leases, stem + ".json")))
    except FileNotFoundError:
        return None
    beat = b""
    if f"{stem}.beat" in names:
        beat = file_io.read_bytes(file_io.join(leases, stem + ".beat"))
    return LeaseSnapshot(leases, number, owner, beat, f"{stem}.released" in names, f"{stem}.stop" in names)


def is_driver_alive(folder: str, last: LeaseSnapshot | None, patience: float = 2.5 * HEARTBEAT_SECONDS) -> bool:
    """Return whether a live driver runs the run in `folder`, given its lease as read just now.

    A fresh heartbeat is trusted. One that is old by this machine's clock, ahead of it, or unreadable is watched for
    `patience` seconds, since clocks of machines differ, unless it differs by more than clocks do.
    """
    if last is None or last.released or last.is_owner_dead:
        return False
    if abs(last.heartbeat_age) <= STALE_SECONDS:
        return True
    deadline = time.monotonic() + (0.0 if abs(last.heartbeat_age) > MAX_CLOCK_SKEW_SECONDS else patience)
    while time.monotonic() < deadline:
        time.sleep(min(0.5, patience / 4))
        now = read_lease(folder)
        if now is not None and (now.number, now.heartbeat) != (last.number, last.heartbeat):
            return not now.released
    return False
