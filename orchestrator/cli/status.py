"""Show the state of runs from storage alone, as tables that fit 100 columns or as JSON. Needs no Ray, no MLflow."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.cli.config import StatusConfig
from orchestrator.cli.exit_status import EXIT_FAILURE, make_console
from orchestrator.config import redaction
from orchestrator.monitor.formatting import format_duration, format_metrics, format_number, make_progress_table
from orchestrator.monitor.run_status import (
    LIVE_STATES,
    PROBLEM_STATES,
    TERMINAL_STATES,
    RunSnapshot,
    inspect_run,
    inspect_sweep,
)
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend.run_lookup import RunEntry
from orchestrator.storage import file_io, storage_errors, urls
from orchestrator.storage.file_io import StorageError

_READERS = 8
_COLORS = {
    "running": "green",
    "finished": "cyan",
    "restarting": "yellow",
    "failed": "red",
    "lost": "red",
    "pruned": "cyan",
}


# Raised by damaged or unreadable records of a single run.
_SINGLE_RUN_ERRORS = (StorageError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class RunGroup:
    """Runs that belong together: an ensemble's members, a sweep's trials, or a single run."""

    name: str  # of the ensemble or sweep, empty for a single run
    rows: tuple[RunSnapshot, ...]
    sweep: bool = False
    owner: str = ""  # driver of the sweep
    brief: bool = False  # show only active and failed runs
    stage: str = ""  # scoring or reporting, of an ensemble whose models are trained

    @property
    def is_live(self) -> bool:
        """True when a later look may differ."""
        return bool(self.owner or self.stage) or any(row.state in LIVE_STATES for row in self.rows)

    @property
    def visible_rows(self) -> tuple[RunSnapshot, ...]:
        """The rows of its tables."""
        return tuple(row for row in self.rows if not self.brief or row.state in (*LIVE_STATES, *PROBLEM_STATES))

    @property
    def title(self) -> str:
        """The line above its rows."""
        done = sum(row.state == "finished" for row in self.rows)
        if not self.sweep:
            return f"{self.name}: {done} of {len(self.rows)} finished" + (f", {self.stage}" if self.stage else "")
        ended = sum(row.state in TERMINAL_STATES for row in self.rows)
        return f"{self.name}: {ended} of {len(self.rows)} ended"

    @property
    def state_counts(self) -> str:
        """The number of trials in each state."""
        counted = Counter(row.state for row in self.rows)
        counts = ", ".join(f"{number} {state}" for state, number in counted.most_common())
        return f"{self.name}: {counts or 'no trial yet'}"


def run_status(config: StatusConfig, console: Console | None = None) -> int:
    """Show runs, ensembles and sweeps; return the exit status: 0, or 1 when one failed or was lost.

    Of sweeps that are not named only active and failed trials are shown; JSON always has all. Raises ConfigError when
    a name is unknown.
    """
    console = console or make_console()

    def look() -> list[RunGroup]:
        names, storage = config.runs, config.storage
        entries = run_lookup.find_runs(names, storage) if names else run_lookup.list_all_runs(storage)
        return inspect_groups(entries, brief=not names)

    groups = look()
    if not groups and not config.json_lines:
        place = redaction.redact(run_lookup.resolve_storage(config.storage))
        console.print(f"no runs in {place}", highlight=False, soft_wrap=True)
        return 0
    if config.json_lines:
        groups = _watch_groups(groups, look, config.watch, lambda now: print_json(now, console))
    elif config.watch is not None and console.is_terminal:
        with Live(render_groups(groups), console=console, auto_refresh=False) as live:
            groups = _watch_groups(
                groups, look, config.watch, lambda now: live.update(render_groups(now), refresh=True)
            )
    else:
        groups = _watch_groups(
            groups, look, config.watch, lambda now: console.print(render_groups(now), soft_wrap=False)
        )
    return EXIT_FAILURE if any(row.state in PROBLEM_STATES for group in groups for row in group.rows) else 0


def inspect_groups(entries: Sequence[RunEntry], brief: bool = False) -> list[RunGroup]:
    """Return the state of each entry, members with their ensembles, trials with their sweeps.

    brief: of sweeps, show only active and failed trials. Raises StorageError when the storage does not answer.
    """
    with ThreadPoolExecutor(_READERS, "status") as pool:
        waiting: list[tuple[RunGroup, list[Future[RunSnapshot]]]] = []
        for entry in entries:
            try:
                group, calls = _prepare_group(entry, brief)
                folders = entry.members or (entry.folder,) * len(calls)
            except _SINGLE_RUN_ERRORS as error:
                group, calls = (
                    RunGroup(entry.name, ()),
                    [partial(_make_unreadable, entry.folder, _explain_error(error))],
                )
                folders = (entry.folder,)
            waiting.append((group, [pool.submit(_inspect_safely, *each) for each in zip(calls, folders, strict=True)]))
        looked = [replace(group, rows=tuple(each.result() for each in rows)) for group, rows in waiting]
        return list(pool.map(_add_stage, entries, looked))


def _add_stage(entry: RunEntry, group: RunGroup) -> RunGroup:
    """Return the group with the stage of its ensemble's driver, when all models are trained."""
    if not entry.members or entry.error or any(row.state in LIVE_STATES for row in group.rows):
        return group
    try:
        stage = _read_stage(entry.folder)
    except _SINGLE_RUN_ERRORS:
        return group  # the rows are what counts
    return replace(group, stage=stage, rows=tuple(replace(row, stage=stage) for row in group.rows))


def _read_stage(folder: str) -> str:
    """Return what the driver of an ensemble does after training; empty when no driver runs."""
    if not lease.is_driver_alive(folder, lease.read_lease(folder)):
        return ""
    progress = file_io.read_json_or_empty(file_io.join(folder, run_lookup.SCORING_FILE))
    shards, done, left = (progress.get(name) for name in ("shards", "done", "seconds_left"))
    if not isinstance(shards, int) or not isinstance(done, int):
        return "preparing scores or the report"
    if done >= shards:
        return "scored, preparing the report"
    rest = f", about {format_duration(left)} left" if isinstance(left, int | float) else ""
    return f"scoring {done} of {shards} shards{rest}"


def _prepare_group(entry: RunEntry, brief: bool) -> tuple[RunGroup, Sequence[Callable[[], RunSnapshot]]]:
    if entry.is_sweep:
        owner, inspections = inspect_sweep(entry.folder)
        return RunGroup(entry.name, (), True, owner, brief), inspections
    return RunGroup(entry.name if entry.members is not None else "", ()), _list_inspections(entry)


def _list_inspections(entry: RunEntry) -> list[Callable[[], RunSnapshot]]:
    if entry.members is None:
        return [partial(inspect_run, entry.folder)]
    if entry.error:
        return [partial(_make_unreadable, entry.folder, entry.error)]
    recipes = file_io.read_json_or_empty(file_io.join(entry.folder, run_lookup.ENSEMBLE_FILE)).get("recipes")
    awaited = lease.is_driver_alive(entry.folder, lease.read_lease(entry.folder))
    models = [_get_recipe_name(recipes, urls.get_basename(folder)) for folder in entry.members]
    return [
        partial(inspect_run, each, entry.name, model, awaited)
        for each, model in zip(entry.members, models, strict=True)
    ]


def _get_recipe_name(recipes: object, run: str) -> str:
    recipe = recipes.get(run) if isinstance(recipes, dict) else None
    return str(recipe.get("name", "")) if isinstance(recipe, dict) else ""


def _make_unreadable(folder: str, why: str) -> RunSnapshot:
    return RunSnapshot(
        urls.get_basename(folder), redaction.redact(folder), "unreadable", why, urls.get_basename(folder)
    )


def _inspect_safely(call: Callable[[], RunSnapshot], folder: str) -> RunSnapshot:
    """Return the result of a call; the damaged records of one run must not hide the others."""
    try:
        return call()
    except _SINGLE_RUN_ERRORS as error:
        return _make_unreadable(folder, _explain_error(error))


def _explain_error(error: Exception) -> str:
    """Return why a run cannot be shown. Raises the error again when the storage as a whole does not answer."""
    if isinstance(error, StorageError) and not storage_errors.is_object_specific(error):
        raise error
    return str(error) if isinstance(error, StorageError) else f"a record is damaged: {type(error).__name__}: {error}"


def _watch_groups(
    groups: list[RunGroup],
    look: Callable[[], list[RunGroup]],
    watch: float | None,
    show: Callable[[list[RunGroup]], None],
) -> list[RunGroup]:
    """Show the groups, again after each look, until nothing runs or Ctrl-C; return the last ones."""
    show(groups)
    try:
        while watch is not None and any(group.is_live for group in groups):
            time.sleep(watch)
            try:
                groups = look()
            except StorageError:
                continue  # the next look may succeed
            show(groups)
    except KeyboardInterrupt:
        pass  # the usual way to end a watch
    return groups


def print_json(groups: Sequence[RunGroup], console: Console) -> None:
    """Print a JSON list of runs on one line; NaN and infinity are null, which JSON lacks."""
    rows = [
        {key: _replace_nonfinite(value) for key, value in asdict(row).items()} for group in groups for row in group.rows
    ]
    console.print(json.dumps(rows, allow_nan=False), highlight=False, soft_wrap=True, markup=False)


def _replace_nonfinite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_groups(groups: Sequence[RunGroup]) -> RenderableType:
    """Return the tables of progress and of checkpoints, and notes on single runs."""
    rows = [row for group in groups for row in group.visible_rows]
    parts: list[RenderableType] = [_build_progress_table(groups)]
    if rows:
        parts += [Text(), _build_storage_table(rows)]
    notes = [Text(group.state_counts) for group in groups if group.sweep]
    notes += [Text(note) for row in rows for note in _format_notes(row)]
    owners = dict.fromkeys([row.owner for row in rows if row.owner] + [group.owner for group in groups if group.owner])
    notes += [Text(f"run by {owner}") for owner in owners]
    return Group(*parts, *([Text(), *notes] if notes else []))


def _build_progress_table(groups: Sequence[RunGroup]) -> Table:
    table = make_progress_table("left")
    for group in groups:
        if group.name:
            table.add_row(Text(group.title, style="bold"))
        for row in group.visible_rows:
            table.add_row(*_format_cells(row, "  " if group.name else ""))
    return table


def _format_cells(row: RunSnapshot, indent: str) -> tuple[Text | str, ...]:
    epochs = "-" if row.epochs is None else str(row.epochs)
    whole = row.epoch is None or row.epoch == int(row.epoch)
    return (
        Text(indent + row.model),
        Text(row.state, style=_COLORS.get(row.state, "")),
        f"{format_number(row.epoch, '.0f' if whole else '.1f')}/{epochs}",
        *format_metrics(row),
        format_duration(row.seconds_left),
    )


def _build_storage_table(rows: Sequence[RunSnapshot]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("workers", "restarts", "goodput", "checkpoint"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        goodput = format_number(None if row.goodput is None else 100 * row.goodput, ".1f") + " %" * (
            row.goodput is not None
        )
        table.add_row(
            Text(row.name), format_number(row.workers, "d"), str(row.incidents), goodput, _format_checkpoint(row)
        )
    return table


def _format_checkpoint(row: RunSnapshot) -> str:
    if row.checkpoint_samples is None:
        return "final weights" if row.state == "finished" else "-"
    age = row.checkpoint_seconds_ago
    return f"{row.checkpoint_samples} samples" + (f", {format_duration(age)} ago" if age is not None else "")


def _format_notes(row: RunSnapshot) -> list[str]:
    notes = [f"{row.name}: {row.state}: {row.message}"] if row.message else []
    if row.last_incident and row.state != "finished":
        notes.append(f"{row.name}: last restart: {row.last_incident}")
    return notes
