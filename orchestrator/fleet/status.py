"""What runs are doing, told from storage alone: tables that fit 100 columns, or JSON. Needs no Ray, no MLflow."""

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

from orchestrator.fleet.figures import duration, shown
from orchestrator.fleet.standing import BAD, ENDED, LIVE, Standing, standing
from orchestrator.fleet.trials import trials
from orchestrator.launch import holder, named
from orchestrator.launch.named import Named
from orchestrator.launch.screen import FAILED
from orchestrator.storage import faults, files, urls
from orchestrator.storage.files import StorageError

_READERS = 8
_COLOURS = {
    "running": "green",
    "finished": "cyan",
    "restarting": "yellow",
    "failed": "red",
    "lost": "red",
    "pruned": "cyan",
}


# What reading one run's records may raise.
_OF_ONE_RUN = (StorageError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Family:
    """Runs that belong together: an ensemble's members, a sweep's trials, or one run alone."""

    name: str  # of the ensemble or sweep, empty for a run alone
    rows: tuple[Standing, ...]
    sweep: bool = False
    owner: str = ""  # who runs the sweep
    brief: bool = False  # show only what runs or went wrong
    stage: str = ""  # what the driver of an ensemble does now that its models are trained

    @property
    def live(self) -> bool:
        """Whether there may be more to see at a later look."""
        return bool(self.owner or self.stage) or any(row.state in LIVE for row in self.rows)

    @property
    def shown(self) -> tuple[Standing, ...]:
        """The rows of its tables."""
        return tuple(row for row in self.rows if not self.brief or row.state in (*LIVE, *BAD))

    @property
    def title(self) -> str:
        """The line above its rows."""
        done = sum(row.state == "finished" for row in self.rows)
        if not self.sweep:
            return f"{self.name}: {done} of {len(self.rows)} finished" + (f", {self.stage}" if self.stage else "")
        ended = sum(row.state in ENDED for row in self.rows)
        return f"{self.name}: {ended} of {len(self.rows)} ended"

    @property
    def counts(self) -> str:
        """How many runs of a sweep are in which state."""
        counted = Counter(row.state for row in self.rows)
        told = ", ".join(f"{number} {state}" for state, number in counted.most_common())
        return f"{self.name}: {told or 'no trial yet'}"


def run(names: Sequence[str], storage: str, as_json: bool, watch: float | None, screen: Console) -> int:
    """Show runs, ensembles and sweeps; the exit status: 0, or 1 when one failed or was lost.

    names: their names in `storage` (empty: the default one), or URLs of their folders; all there are when empty. Of
    sweeps that are not named only the trials that run or went wrong are shown; JSON always has all.
    as_json: one JSON list, a line for each look. watch: look again after so many seconds, until nobody runs any of
    them, or Ctrl-C. Raises ConfigError when one is unknown.
    """

    def look() -> list[Family]:
        found = named.find(names, storage) if names else named.everything(storage)
        return families(found, brief=not names)

    found = look()
    if not found and not as_json:
        screen.print(f"no runs in {urls.redact(named.storage_of(storage))}", highlight=False, soft_wrap=True)
        return 0
    if as_json:
        found = _followed(found, look, watch, lambda now: print_json(now, screen))
    elif watch is not None and screen.is_terminal:
        with Live(rendered(found), console=screen, auto_refresh=False) as live:
            found = _followed(found, look, watch, lambda now: live.update(rendered(now), refresh=True))
    else:
        found = _followed(found, look, watch, lambda now: screen.print(rendered(now), soft_wrap=False))
    return FAILED if any(row.state in BAD for family in found for row in family.rows) else 0


def families(found: Sequence[Named], brief: bool = False) -> list[Family]:
    """How all of these stand, members with their ensembles, trials with their sweeps. Storage errors pass through.

    brief: of sweeps, show only the trials that run or went wrong.
    """
    with ThreadPoolExecutor(_READERS, "status") as pool:
        waiting: list[tuple[Family, list[Future[Standing]]]] = []
        for one in found:
            try:
                family, calls = _family(one, brief)
                folders = one.members or (one.folder,) * len(calls)
            except _OF_ONE_RUN as error:
                family, calls = Family(one.name, ()), [partial(_unreadable, one.folder, _why(error))]
                folders = (one.folder,)
            waiting.append((family, [pool.submit(_shielded, *each) for each in zip(calls, folders, strict=True)]))
        looked = [replace(family, rows=tuple(each.result() for each in rows)) for family, rows in waiting]
        return list(pool.map(_staged, found, looked))


def _staged(one: Named, family: Family) -> Family:
    """Return the family with what its ensemble's driver does now, when no model is trained any more."""
    if not one.members or one.trouble or any(row.state in LIVE for row in family.rows):
        return family
    try:
        stage = _stage(one.folder)
    except _OF_ONE_RUN:
        return family  # the rows are what counts
    return replace(family, stage=stage, rows=tuple(replace(row, stage=stage) for row in family.rows))


def _stage(folder: str) -> str:
    """Return what the driver of an ensemble does besides training; empty when there is none."""
    if not holder.lives(folder, holder.look(folder)):
        return ""
    found = files.read_record(files.join(folder, named.SCORING))
    shards, done, left = (found.get(name) for name in ("shards", "done", "seconds_left"))
    if not isinstance(shards, int) or not isinstance(done, int):
        return "preparing scores or the report"
    if done >= shards:
        return "scored, preparing the report"
    rest = f", about {duration(left)} left" if isinstance(left, int | float) else ""
    return f"scoring {done} of {shards} shards{rest}"


def _family(one: Named, brief: bool) -> tuple[Family, Sequence[Callable[[], Standing]]]:
    if one.sweep:
        told = trials(one.folder)
        return Family(one.name, (), True, told.owner, brief), told.calls
    return Family(one.name if one.members is not None else "", ()), _calls(one)


def _calls(one: Named) -> list[Callable[[], Standing]]:
    if one.members is None:
        return [partial(standing, one.folder)]
    if one.trouble:
        return [partial(_unreadable, one.folder, one.trouble)]
    recipes = files.read_record(files.join(one.folder, named.SPEC)).get("recipes")
    awaited = holder.lives(one.folder, holder.look(one.folder))
    models = [_recipe_name(recipes, urls.name(folder)) for folder in one.members]
    return [partial(standing, each, one.name, model, awaited) for each, model in zip(one.members, models, strict=True)]


def _recipe_name(recipes: object, run: str) -> str:
    found = recipes.get(run) if isinstance(recipes, dict) else None
    return str(found.get("name", "")) if isinstance(found, dict) else ""


def _unreadable(folder: str, why: str) -> Standing:
    return Standing(urls.name(folder), urls.redact(folder), "unreadable", why, urls.name(folder))


def _shielded(call: Callable[[], Standing], folder: str) -> Standing:
    """What the call returns; what is wrong with the records of one run must not hide the others."""
    try:
        return call()
    except _OF_ONE_RUN as error:
        return _unreadable(folder, _why(error))


def _why(error: Exception) -> str:
    """Why a run cannot be shown. Raises the error again when it says that the storage as a whole does not answer."""
    if isinstance(error, StorageError) and not faults.is_of_one_object(error):
        raise error
    return str(error) if isinstance(error, StorageError) else f"a record is damaged: {type(error).__name__}: {error}"


def _followed(
    found: list[Family], look: Callable[[], list[Family]], watch: float | None, show: Callable[[list[Family]], None]
) -> list[Family]:
    """Show what was found, and what is found later, until nothing runs or Ctrl-C; the last that was found."""
    show(found)
    try:
        while watch is not None and any(family.live for family in found):
            time.sleep(watch)
            try:
                found = look()
            except StorageError:
                continue  # what cannot be seen now is seen at the next look
            show(found)
    except KeyboardInterrupt:
        pass  # the way to end a watch
    return found


def print_json(found: Sequence[Family], screen: Console) -> None:
    """A JSON list of runs on one line; what is not finite is null, since JSON has no word for it."""
    rows = [{key: _plain(value) for key, value in asdict(row).items()} for family in found for row in family.rows]
    screen.print(json.dumps(rows, allow_nan=False), highlight=False, soft_wrap=True, markup=False)


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rendered(found: Sequence[Family]) -> RenderableType:
    """The tables of progress and of what is kept, and what there is to say of single runs."""
    rows = [row for family in found for row in family.shown]
    parts: list[RenderableType] = [_progress(found)]
    if rows:
        parts += [Text(), _kept(rows)]
    notes = [Text(one.counts) for one in found if one.sweep]
    notes += [Text(note) for row in rows for note in _notes(row)]
    owners = dict.fromkeys([row.owner for row in rows if row.owner] + [one.owner for one in found if one.owner])
    notes += [Text(f"run by {owner}") for owner in owners]
    return Group(*parts, *([Text(), *notes] if notes else []))


def _progress(found: Sequence[Family]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("model", "state", "epoch", "loss", "top-1 %", "top-5 %", "images/s", "left"):
        # A model's name may be folded, a figure never cut.
        left = name in ("model", "state")
        fold = {"overflow": "fold", "no_wrap": False} if name == "model" else {"overflow": "ellipsis", "no_wrap": True}
        table.add_column(name, justify="left" if left else "right", **fold)  # type: ignore[arg-type]
    for family in found:
        if family.name:
            table.add_row(Text(family.title, style="bold"))
        for row in family.shown:
            table.add_row(*_cells(row, "  " if family.name else ""))
    return table


def _cells(row: Standing, indent: str) -> tuple[Text | str, ...]:
    epochs = "-" if row.epochs is None else str(row.epochs)
    whole = row.epoch is None or row.epoch == int(row.epoch)
    return (
        Text(indent + row.model),
        Text(row.state, style=_COLOURS.get(row.state, "")),
        f"{shown(row.epoch, '.0f' if whole else '.1f')}/{epochs}",
        shown(row.loss, ".3f"),
        shown(row.top1_error, ".2f"),
        shown(row.top5_error, ".2f"),
        shown(row.images_per_second, ".0f"),
        duration(row.seconds_left),
    )


def _kept(rows: Sequence[Standing]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("workers", "restarts", "goodput", "checkpoint"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        goodput = shown(None if row.goodput is None else 100 * row.goodput, ".1f") + " %" * (row.goodput is not None)
        table.add_row(Text(row.name), shown(row.workers, "d"), str(row.incidents), goodput, _checkpoint(row))
    return table


def _checkpoint(row: Standing) -> str:
    if row.checkpoint_samples is None:
        return "final weights" if row.state == "finished" else "-"
    age = row.checkpoint_seconds_ago
    return f"{row.checkpoint_samples} samples" + (f", {duration(age)} ago" if age is not None else "")


def _notes(row: Standing) -> list[str]:
    notes = [f"{row.name}: {row.state}: {row.message}"] if row.message else []
    if row.last_incident and row.state != "finished":
        notes.append(f"{row.name}: last restart: {row.last_incident}")
    return notes
