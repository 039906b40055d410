"""Stop runs and ensembles from any machine that sees their storage, by the stop flags of their leases. Needs no Ray."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field

from rich.console import Console

from orchestrator.cli.config import StopConfig
from orchestrator.cli.exit_status import EXIT_FAILURE, make_console
from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend.lease import STALE_SECONDS, LeaseSnapshot
from orchestrator.ray_backend.run_lookup import RunEntry
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.run_dir import get_outcome_path

POLL_SECONDS = 0.5
STOP_WITHOUT_CHECKPOINT = json.dumps({"save": False}).encode()


@dataclass
class _PendingStop:
    """A lease whose release is waited for."""

    entry: RunEntry
    folder: str
    lease: LeaseSnapshot
    last_heartbeat: float = field(default_factory=time.monotonic)  # when its heartbeat was last seen to change

    def describe_end(self) -> str | None:
        """How it ended; None while its owner is at it. A failed query ends nothing."""
        try:
            now = lease.read_lease(self.folder)
        except OSError:
            self.last_heartbeat = time.monotonic()  # not to know is not to be dead
            return None
        if now is None or now.number != self.lease.number:
            return "another driver has taken it over since" if now else "its lease is gone"
        if now.released:
            return "ended"
        if now.heartbeat != self.lease.heartbeat:
            self.lease, self.last_heartbeat = now, time.monotonic()
        if now.is_owner_dead:
            return f"its driver died without releasing its lease ({now.owner})"
        if time.monotonic() - self.last_heartbeat > STALE_SECONDS:
            return f"its owner has not been heard of for {STALE_SECONDS:g} s and counts as gone ({now.owner})"
        return None


def run_stop(config: StopConfig, console: Console | None = None) -> int:
    """Stop runs and ensembles; return the exit status: 0 when all have ended, 1 when one still runs after `wait`.

    Raises ConfigError when a name is unknown.
    """
    if not config.runs:
        raise ConfigError("runs: give the name of at least one run or ensemble, or the URL of its folder")
    console, wait = console or make_console(), config.wait
    entries = run_lookup.find_runs(config.runs, config.storage)  # all of them, before one is stopped
    pending = {entry.name: _request_stop(entry, config.save, console) for entry in entries}
    deadline = time.monotonic() + wait
    if wait and any(pending.values()):
        with console.status("waiting for them to save and end" if config.save else "waiting for them to end"):
            _wait_until_ended(pending, deadline, console)
    for name, left in pending.items():
        if left and wait:
            _print_line(
                console,
                f"{name}: still run by {left[0].lease.owner} after {wait:g} s: it was asked and will stop when it can; "
                "wait longer with --wait, or end that process",
            )
        elif left:
            _print_line(console, f"{name}: asked to stop; not waited for")
    return EXIT_FAILURE if wait and any(pending.values()) else 0


def _request_stop(one: RunEntry, save: bool, screen: Console) -> list[_PendingStop]:
    """Ask all who run it to stop; whom to wait for."""
    asked = []
    # Members first: what is said to the ensemble is said again to them by its driver, and the first word counts.
    for folder in reversed(one.lease_folders):
        held = lease.read_lease(folder)
        if held is None or held.released:
            continue
        file_io.write_bytes(held.stop_flag, b"" if save else STOP_WITHOUT_CHECKPOINT)
        asked.append(_PendingStop(one, folder, held))
    if not asked:
        _print_line(screen, f"{one.name}: nobody runs it; {_describe_state(one)}")
        return []
    asked.reverse()
    held = asked[0].lease
    heard = "" if math.isnan(held.heartbeat_age) else f", last heard of {held.heartbeat_age:.0f} s ago"
    _print_line(screen, f"{one.name}: run by {held.owner}{heard}: asked to stop")
    return asked


def _wait_until_ended(awaited: dict[str, list[_PendingStop]], deadline: float, screen: Console) -> None:
    """Until all have ended, or the deadline (monotonic seconds); tells each end."""
    while True:
        for name, left in awaited.items():
            for each in list(left):
                if (how := each.describe_end()) is None:
                    continue
                left.remove(each)
                if not left:
                    _print_line(screen, f"{name}: {how}; {_describe_state(each.entry)}")
        if not any(awaited.values()) or time.monotonic() >= deadline:
            return
        time.sleep(POLL_SECONDS)


def _describe_state(one: RunEntry) -> str:
    """Where something stands that nobody runs."""
    if one.error:
        return f"whether its members run is not known: {one.error}"
    if one.members is not None:
        return "the same command goes on with it, if there is anything left to do"
    status = _read_status(one.folder)
    if status == "finished":
        return "it is finished"
    ended = f"its last attempt ended as {status!r}; " if status else ""
    return f"{ended}{_describe_checkpoint(one.folder)}the same command goes on with it"


def _describe_checkpoint(folder: str) -> str:
    newest = next(iter(attempts.list_valid_checkpoints(folder)), None)
    return f"its newest checkpoint is at {newest.samples} samples; " if newest is not None else ""


def _read_status(folder: str) -> str:
    return str(file_io.read_json_or_empty(get_outcome_path(folder)).get("status", ""))


def _print_line(screen: Console, text: str) -> None:
    screen.print(text, highlight=False, soft_wrap=True, markup=False)
