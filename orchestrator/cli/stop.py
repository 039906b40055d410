"""Stop runs and ensembles from any machine that sees their storage, by the stop flags of their leases."""

from __future__ import annotations

import json
import math
import time
from typing import NamedTuple

from rich.console import Console

from orchestrator.cli.config import StopConfig
from orchestrator.cli.exit_status import EXIT_FAILURE
from orchestrator.config.errors import ConfigError
from orchestrator.monitor.formatting import print_line
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend.lease import LeaseSnapshot
from orchestrator.ray_backend.run_lookup import RunEntry
from orchestrator.storage import file_io
from orchestrator.training import attempts
from orchestrator.training.run_dir import get_outcome_path

POLL_SECONDS = 0.5
STOP_WITHOUT_CHECKPOINT = json.dumps({"save": False}).encode()


class _PendingStop(NamedTuple):
    """A lease whose release is awaited."""

    entry: RunEntry
    folder: str
    lease: LeaseSnapshot

    def describe_end(self) -> str | None:
        """Return how it ended; None while its owner is active. A failed query ends nothing."""
        try:
            current = lease.read_lease(self.folder)
            if current is None or current.number != self.lease.number:
                return "another driver has taken it over"
            if current.released:
                return "ended"
            if lease.is_driver_alive(self.folder, current):
                return None
        except OSError:
            return None
        return f"its driver died without releasing its lease ({current.owner})"


def run_stop(config: StopConfig, console: Console) -> int:
    """Stop runs and ensembles; return the exit status: 0 when all have ended, 1 when one still runs after `wait`.

    Raises ConfigError when a name is unknown.
    """
    if not config.runs:
        raise ConfigError("runs: give the name of at least one run or ensemble, or the URL of its folder")
    wait = config.wait
    entries = run_lookup.find_runs(config.runs, config.storage)  # all of them, before one is stopped
    pending = {entry.name: _request_stop(entry, config.save, console) for entry in entries}
    if wait and any(pending.values()):
        with console.status("waiting for them to save and end" if config.save else "waiting for them to end"):
            _wait_until_ended(pending, time.monotonic() + wait, console)
    for name, (first, *_) in ((name, left) for name, left in pending.items() if left):
        text = f"still run by {first.lease.owner} after {wait:g} s: wait longer with --wait, or end that process"
        print_line(console, f"{name}: {text if wait else 'asked to stop; not waited for'}")
    return EXIT_FAILURE if wait and any(pending.values()) else 0


def _request_stop(entry: RunEntry, save: bool, console: Console) -> list[_PendingStop]:
    pending: list[_PendingStop] = []
    # Members first: the driver of an ensemble repeats to them what it is asked, and the first request counts.
    for folder in reversed((entry.folder, *(entry.members or ()))):
        current = lease.read_lease(folder)
        if current is not None and not current.released:
            file_io.write_bytes(current.stop_flag, b"" if save else STOP_WITHOUT_CHECKPOINT)
            pending.insert(0, _PendingStop(entry, folder, current))
    if not pending:
        print_line(console, f"{entry.name}: not running; {_describe_state(entry)}")
        return []
    owned = pending[0].lease
    age = "" if math.isnan(owned.heartbeat_age) else f", last heartbeat {owned.heartbeat_age:.0f} s ago"
    print_line(console, f"{entry.name}: run by {owned.owner}{age}: asked to stop")
    return pending


def _wait_until_ended(pending: dict[str, list[_PendingStop]], deadline: float, console: Console) -> None:
    """Wait until all have ended, or the deadline (monotonic seconds); print each end."""
    while True:
        for name, left in pending.items():
            for stop in list(left):
                if (end := stop.describe_end()) is not None:
                    left.remove(stop)
                    if not left:
                        print_line(console, f"{name}: {end}; {_describe_state(stop.entry)}")
        if not any(pending.values()) or time.monotonic() >= deadline:
            return
        time.sleep(POLL_SECONDS)


def _describe_state(entry: RunEntry) -> str:
    if entry.error:
        return f"it is unknown whether its members run: {entry.error}"
    if entry.members is not None:
        return "rerun the command that started it to resume it"
    status = file_io.read_json_or_empty(get_outcome_path(entry.folder)).get("status", "")
    if status == "finished":
        return "it is finished"
    parts = [f"its last attempt ended as {status!r}"] if status else []
    for newest in attempts.list_valid_checkpoints(entry.folder)[:1]:
        parts.append(f"its newest checkpoint is at {newest.samples} samples")
    return "; ".join([*parts, "rerun the command that started it to resume it"])
