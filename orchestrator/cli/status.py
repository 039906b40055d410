"""Show the state of runs from storage alone, as tables that fit 100 columns or as JSON. Needs no Ray, no MLflow."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.cli.config import StatusConfig
from orchestrator.cli.exit_status import EXIT_FAILURE
from orchestrator.config import redaction
from orchestrator.monitor import formatting
from orchestrator.monitor.run_status import (
    LIVE_STATES,
    PROBLEM_STATES,
    TERMINAL_STATES,
    RunSnapshot,
    get_field,
    inspect_run,
    inspect_sweep,
)
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend.run_lookup import RunEntry
from orchestrator.storage import file_io, storage_errors, urls
from orchestrator.storage.file_io import StorageError

_READERS = 8
_COLORS = dict.fromkeys(PROBLEM_STATES, "red") | {"running": "green", "restarting": "yellow", "finished": "cyan"}
# Raised by damaged or unreadable records of a single run.
_SINGLE_RUN_ERRORS = (StorageError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class RunGroup:
    """Runs that belong together: an ensemble's members, a sweep's trials, or a single run."""

    name: str  # of the ensemble or sweep, empty for a single run
    rows: tuple[RunSnapshot, ...] = ()
    sweep: bool = False
    owner: str = ""  # driver of the sweep
    brief: bool = False  # show only active and failed runs
    stage: str = ""  # scoring or reporting, of an ensemble whose models are trained

    @property
    def is_live(self) -> bool:
        """True when a later look may differ."""
        return bool(self.owner or self.stage) or any(row.state in LIVE_STATES for row in self.rows)

    @property
    def visible_rows(self) -> list[RunSnapshot]:
        """The rows of its tables."""
        return [row for row in self.rows if not self.brief or row.state in (*LIVE_STATES, *PROBLEM_STATES)]

    @property
    def title(self) -> str:
        """The line above its rows."""
        counted, kind = (TERMINAL_STATES, "ended") if self.sweep else (("finished",), "finished")
        done = sum(row.state in counted for row in self.rows)
        return f"{self.name}: {done} of {len(self.rows)} {kind}" + (f", {self.stage}" if self.stage else "")

    @property
    def state_counts(self) -> str:
        """The number of trials in each state."""
        counts = Counter(row.state for row in self.rows).most_common()
        return f"{self.name}: {', '.join(f'{number} {state}' for state, number in counts) or 'no trial yet'}"


def run_status(config: StatusConfig, console: Console) -> int:
    """Show runs, ensembles and sweeps; return the exit status: 0, or 1 when one failed or was lost.

    Of sweeps that are not named only active and failed trials are shown; JSON always has all. Raises ConfigError when
    a name is unknown.
    """

    def look() -> list[RunGroup]:
        names, storage = config.runs, config.storage
        entries = run_lookup.find_runs(names, storage) if names else run_lookup.list_all_runs(storage)
        return inspect_groups(entries, brief=not names)

    groups = look()
    if not groups and not config.json_lines:
        formatting.print_line(console, f"no runs in {redaction.redact(run_lookup.resolve_storage(config.storage))}")
        return 0

    def show(groups: list[RunGroup]) -> None:
        if config.json_lines:
            print_json(groups, console)
            return
        if config.watch is not None:
            console.clear()  # where it is a terminal
        console.print(render_groups(groups), soft_wrap=False)

    show(groups)
    with suppress(KeyboardInterrupt):  # the usual way to end a watch
        while config.watch is not None and any(group.is_live for group in groups):
            time.sleep(config.watch)
            with suppress(StorageError):  # the next look may succeed
                groups = look()
                show(groups)
    return EXIT_FAILURE if any(row.state in PROBLEM_STATES for group in groups for row in group.rows) else 0


def inspect_groups(entries: Sequence[RunEntry], brief: bool = False) -> list[RunGroup]:
    """Return the state of each entry, members with their ensembles, trials with their sweeps.

    brief: of sweeps, show only active and failed trials. Raises StorageError when the storage does not answer.
    """
    with ThreadPoolExecutor(_READERS, "status") as pool:
        waiting: list[tuple[RunGroup, list[Future[RunSnapshot]]]] = []
        for entry in entries:
            group, calls = _prepare_group(entry, brief)
            waiting.append((group, [pool.submit(_inspect_safely, *call) for call in calls]))
        groups = [replace(group, rows=tuple(row.result() for row in rows)) for group, rows in waiting]
        return list(pool.map(_add_stage, entries, groups))


def _prepare_group(entry: RunEntry, brief: bool) -> tuple[RunGroup, list[tuple[str, Callable[[], RunSnapshot]]]]:
    """Return the group of an entry without its rows, and the folder and the inspection of each row."""
    folder, group = entry.folder, RunGroup(entry.name if entry.members is not None or entry.is_sweep else "")
    if entry.error:
        return group, [(folder, partial(_make_unreadable, folder, entry.error))]
    try:
        if entry.is_sweep:
            owner, calls = inspect_sweep(folder)
            return replace(group, sweep=True, owner=owner, brief=brief), [(folder, call) for call in calls]
        if entry.members is None:
            return group, [(folder, partial(inspect_run, folder))]
        record = file_io.read_json_or_empty(file_io.join(folder, run_lookup.ENSEMBLE_FILE))
        awaited = lease.is_driver_alive(folder, lease.read_lease(folder))
    except _SINGLE_RUN_ERRORS as error:
        return group, [(folder, partial(_make_unreadable, folder, error))]
    models = [str(get_field(record, "recipes", urls.get_basename(each), "name") or "") for each in entry.members]
    return group, [
        (each, partial(inspect_run, each, entry.name, model, awaited))
        for each, model in zip(entry.members, models, strict=True)
    ]


def _inspect_safely(folder: str, call: Callable[[], RunSnapshot]) -> RunSnapshot:
    """Return the result of a call; the damaged records of one run must not hide the others."""
    try:
        return call()
    except _SINGLE_RUN_ERRORS as error:
        return _make_unreadable(folder, error)


def _make_unreadable(folder: str, error: Exception | str) -> RunSnapshot:
    """Return the status of a run that cannot be shown. Raises a StorageError that is not about this run alone."""
    why = str(error)
    if isinstance(error, StorageError):
        if not storage_errors.is_object_specific(error):
            raise error
    elif isinstance(error, Exception):
        why = f"a record is damaged: {type(error).__name__}: {error}"
    name = urls.get_basename(folder)
    return RunSnapshot(name, redaction.redact(folder), "unreadable", why, name)


def _add_stage(entry: RunEntry, group: RunGroup) -> RunGroup:
    """Return the group with what the driver of its ensemble does, when all models are trained."""
    if not entry.members or entry.error or any(row.state in LIVE_STATES for row in group.rows):
        return group
    try:
        if not lease.is_driver_alive(entry.folder, lease.read_lease(entry.folder)):
            return group
        progress = file_io.read_json_or_empty(file_io.join(entry.folder, run_lookup.SCORING_FILE))
    except _SINGLE_RUN_ERRORS:
        return group  # the rows are what counts
    shards, done, left = (progress.get(name) for name in ("shards", "done", "seconds_left"))
    if not isinstance(shards, int) or not isinstance(done, int):
        stage = "preparing scores or the report"
    elif done >= shards:
        stage = "scored, preparing the report"
    else:
        rest = f", about {formatting.format_duration(left)} left" if isinstance(left, int | float) else ""
        stage = f"scoring {done} of {shards} shards{rest}"
    return replace(group, stage=stage, rows=tuple(replace(row, stage=stage) for row in group.rows))


def print_json(groups: Sequence[RunGroup], console: Console) -> None:
    """Print a JSON list of runs on one line; NaN and infinity are null, which JSON lacks."""
    rows = [asdict(row) for group in groups for row in group.rows]
    finite = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]
    formatting.print_line(console, json.dumps(finite, allow_nan=False))


def render_groups(groups: Sequence[RunGroup]) -> RenderableType:
    """Return the tables of progress and of checkpoints, and notes on single runs."""
    rows = [row for group in groups for row in group.visible_rows]
    progress, storage = formatting.make_progress_table("left"), Table(box=None, pad_edge=False)
    for group in groups:
        if group.name:
            progress.add_row(Text(group.title, style="bold"))
        for row in group.visible_rows:
            progress.add_row(*_format_progress(row, "  " if group.name else ""))
    storage.add_column("run", overflow="fold")
    for name in ("workers", "restarts", "goodput", "checkpoint"):
        storage.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        storage.add_row(*_format_storage(row))
    notes = [group.state_counts for group in groups if group.sweep]
    for row in rows:
        if row.message:
            notes.append(f"{row.name}: {row.state}: {row.message}")
        if row.last_incident and row.state != "finished":
            notes.append(f"{row.name}: last restart: {row.last_incident}")
    owners = dict.fromkeys([row.owner for row in rows] + [group.owner for group in groups])
    notes += [f"run by {owner}" for owner in owners if owner]
    parts: list[RenderableType] = [progress]
    parts += [Text(), storage] if rows else []
    parts += [Text(), *map(Text, notes)] if notes else []
    return Group(*parts)


def _format_progress(row: RunSnapshot, indent: str) -> tuple[Text | str, ...]:
    whole = row.epoch is None or row.epoch == int(row.epoch)
    return (
        Text(indent + row.model),
        Text(row.state, style=_COLORS.get(row.state, "")),
        f"{formatting.format_number(row.epoch, '.0f' if whole else '.1f')}/{formatting.format_number(row.epochs, 'd')}",
        *formatting.format_metrics(row),
        formatting.format_duration(row.seconds_left),
    )


def _format_storage(row: RunSnapshot) -> tuple[Text | str, ...]:
    checkpoint = "final weights" if row.state == "finished" else "-"
    if row.checkpoint_samples is not None:
        checkpoint = f"{row.checkpoint_samples} samples"
        if row.checkpoint_seconds_ago is not None:
            checkpoint += f", {formatting.format_duration(row.checkpoint_seconds_ago)} ago"
    goodput = "-" if row.goodput is None else f"{100 * row.goodput:.1f} %"
    return Text(row.name), formatting.format_number(row.workers, "d"), str(row.incidents), goodput, checkpoint
