"""A lease: one driver at a time may run a run; with heartbeat, owner, and the flag that asks for a stop.

Lease number n is the file `n.json`, taken by conditional create, so two takers cannot both have it; the highest
number owns the run. `n.beat` is overwritten by a heartbeat, `n.released` says that the owner is done, `n.stop`
asks it to stop. An owner is dead when its heartbeat does not change for a while by the taker's own clock (clocks
of machines differ), or at once when it was a process of this machine that is gone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.config.json_text import parse_object
from orchestrator.launch.config import job_command
from orchestrator.launch.environment import submission_id
from orchestrator.storage import files, urls

BEAT_SECONDS = 3.0
STALE_SECONDS = 15.0
_LATEST = 4e9  # a later time in a record, in unix seconds, is damage
_RECORD = re.compile(r"^(\d{6,})\.json$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who runs a run."""

    host: str
    pid: int
    job: str  # submission id of a Ray job, empty for a process of its own
    since: float  # unix seconds
    space: str = ""  # boot and process namespace that the pid is of: containers of one host share its name

    def __str__(self) -> str:
        if self == UNKNOWN:
            return "an unknown process (its lease cannot be read)"
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {since}"


# Who holds a lease whose record is damaged: that somebody does is said by its heartbeat alone.
UNKNOWN = Owner("", 0, "", 0.0)


def parse_owner(data: bytes) -> Owner:
    """Return the owner in a lease's record, perhaps of a newer version; UNKNOWN when the record cannot be read."""
    try:
        record = parse_object(data)
        host, pid, since = record["host"], record["pid"], float(record["since"])
        job, space = record.get("job", ""), record.get("space", "")
        if not all(isinstance(text, str) for text in (host, job, space)) or type(pid) is not int:
            return UNKNOWN
        if not (0 < pid < 2**31 and 0 <= since < _LATEST):
            return UNKNOWN
    except (ValueError, KeyError, TypeError, OverflowError):
        return UNKNOWN
    return Owner(host, pid, job, since, space)


class LeaseHeldError(RuntimeError):
    """Another live driver runs this run; the message names it and says what can be done."""

    def __init__(self, folder: str, owner: Owner) -> None:
        job = shlex.quote(owner.job)
        attach = f"ray job logs --follow {job}" if owner.job else "look at its terminal"
        stop = f"ray job stop {job}" if owner.job else "Ctrl-C there"
        super().__init__(
            f"{folder} is being run by {owner}: attach ({attach}), or stop it ({stop}, or from anywhere: "
            f"{job_command('stop.py', [urls.redact(folder)])}) and submit again"
        )


def this_owner() -> Owner:
    """This process as an owner; a submitted Ray job is named by its submission id."""
    return Owner(socket.gethostname(), os.getpid(), submission_id() or "", time.time(), _space())


def gone(owner: Owner) -> bool:
    """Whether the owner was a process of this very machine, and is no more."""
    return owner.host == socket.gethostname() and owner.space in ("", _space()) and not alive(owner.pid)


def _space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


class Lease:
    """A lease that is held: beats in the background until it is released."""

    def __init__(self, folder: str, number: int) -> None:
        self._folder, self.number = folder, number
        self._next = files.join(folder, f"{number + 1:06d}.json")
        self._released = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    @property
    def stop_flag(self) -> str:
        """URL of the file that asks this lease's holder, and its workers, to save and stop."""
        return self._url("stop")

    @property
    def successor(self) -> str:
        """URL of the file that exists once another driver has taken this lease's run over."""
        return self._next

    def request_stop(self) -> None:
        """Ask whoever works under this lease to save and stop; who asked before, perhaps for no checkpoint, wins."""
        files.create_bytes(self.stop_flag, b"")

    def stop_requested(self) -> bool:
        """Whether somebody asked."""
        return files.exists(self.stop_flag)

    def release(self) -> None:
        """Give the run free for the next driver."""
        self._released.set()
        self._thread.join()
        files.write_bytes(self._url("released"), b"")

    def _url(self, kind: str) -> str:
        return files.join(self._folder, f"{self.number:06d}.{kind}")

    def _beat(self) -> None:
        files.write_bytes(self._url("beat"), json.dumps({"time": time.time()}).encode())

    def _run(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                if files.exists(self._next):
                    # Suspended for so long that another driver took over: this one must not write any more.
                    _log.error("lease: %s was taken over while this driver was not heard of; stopping", self._folder)
                    self.request_stop()
                    return
                self._beat()
            except OSError as error:
                _log.warning("lease: heartbeat not written, tried again in %g s: %s", BEAT_SECONDS, error)


def take(folder: str, stale_seconds: float = STALE_SECONDS) -> Lease:
    """The lease on the run folder `folder`, at once if it is free, after `stale_seconds` if its owner looks dead.

    Raises LeaseHeldError when a live driver has it.
    """
    leases = files.join(folder, "lease")
    while True:
        if last := newest(files.list_names(leases)):
            _check_free(folder, leases, last, stale_seconds)
        owner = json.dumps(asdict(this_owner())).encode()
        if files.create_bytes(files.join(leases, f"{last + 1:06d}.json"), owner):
            return Lease(leases, last + 1)


def newest(names: Iterable[str]) -> int:
    """Return the highest number of the leases among these names; 0 when there is none."""
    return max((int(match[1]) for name in names if (match := _RECORD.match(name))), default=0)


def _check_free(folder: str, leases: str, number: int, stale_seconds: float) -> None:
    """Return when lease `number` is released or its owner dead; raise LeaseHeldError when it lives.

    A lease whose record cannot be read is held like any other for as long as its heartbeat changes.
    """
    stem = files.join(leases, f"{number:06d}")
    if files.exists(stem + ".released"):
        return
    owner = parse_owner(files.read_bytes(stem + ".json"))
    if gone(owner):
        return
    first = _beat_of(stem)
    deadline = time.monotonic() + stale_seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, stale_seconds / 4))
        if files.exists(stem + ".released"):
            return
        if _beat_of(stem) != first:
            raise LeaseHeldError(folder, owner)


def _beat_of(stem: str) -> bytes:
    try:
        return files.read_bytes(stem + ".beat")
    except FileNotFoundError:
        return b""


def alive(pid: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
