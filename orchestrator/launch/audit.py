"""Were runs trained on what was planned? The record kept with their weights against the plan, epoch by epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import weights
from orchestrator.config.errors import ConfigError
from orchestrator.data import audit, manifest, order
from orchestrator.data.audit import AuditRecord, Verdict
from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.order import EpochOrder
from orchestrator.launch import named
from orchestrator.launch.config import RunSpec, stored_spec
from orchestrator.launch.screen import FAILED
from orchestrator.storage import files, urls
from orchestrator.storage.commit import CommitError
from orchestrator.tracking import journal
from orchestrator.tracking.journal import Cursor, DamagedSegment, Event
from orchestrator.training.job import checkpoints_of, final_of, journal_of

SPLIT = "train"
MOST_NAMES = 20  # told of what there is: runs when one is unknown, bad samples of a run


@dataclass(frozen=True)
class Run:
    """A run to audit: where it lies, what it is, the dataset it was trained on."""

    folder: str
    spec: RunSpec
    dataset: Manifest


@dataclass(frozen=True)
class Held:
    """A run's record, the samples trained on according to the weights it lies with, and what these are."""

    record: AuditRecord
    samples: int
    where: str


def run(names: Sequence[str], storage: str, data: str, screen: Console) -> int:
    """Audit runs and print a table for each; the exit status, 1 when one was not trained on what was planned.

    names: runs in `storage` (empty: the default one) or URLs of their folders. data: URL of the dataset, when it is
    not where the run had it. Raises ConfigError when there is nothing to audit or its dataset is another one.
    """
    if not names:
        raise ConfigError("runs: give the name of at least one run, or the URL of its folder")
    found = [_run(name, storage, data) for name in names]
    # Not all(...) of a generator: every run is told, also after one that failed.
    clean = [_told(one, screen) for one in found]
    return 0 if all(clean) else FAILED


def _told(one: Run, screen: Console) -> bool:
    """Print what is to be said of a run; whether it is clean."""
    try:
        held = _held(one)
        with screen.status("computing the plan of each epoch again"):
            verdicts = verdicts_of(held, one)
    except (DataError, CommitError) as error:
        screen.print(f"{one.spec.name}: MISMATCH: {error}", highlight=False, soft_wrap=True)
        return False
    screen.print(_table(one.spec.name, held.where, verdicts))
    problems = [f"epoch {each.epoch + 1}: {problem}" for each in verdicts for problem in each.problems]
    problems += record_problems(held.record, len(verdicts))
    lines = [*(f"MISMATCH: {problem}" for problem in problems), *_bad(held.record), _history(one.folder)]
    for line in lines:
        screen.print(line, highlight=False, soft_wrap=True, markup=False)
    return not problems


def verdicts_of(held: Held, one: Run) -> list[Verdict]:
    """Each epoch that has begun, compared with its plan."""
    recipe = one.spec.recipe
    counts = tuple(shard.samples for shard in one.dataset.shards(SPLIT))
    steps_per_epoch = order.steps_per_epoch(sum(counts), recipe.batch_size)
    left = held.samples // recipe.batch_size
    found = []
    for epoch in range(recipe.epochs):
        steps = min(left, steps_per_epoch)
        if steps == 0:
            break
        plan = EpochOrder(counts, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window)
        found.append(audit.compared(held.record.of_epoch(epoch), plan, recipe.batch_size, steps))
        left -= steps
    return found


def record_problems(record: AuditRecord, epochs: int) -> list[str]:
    """What is wrong with a record as a whole, of a run that has begun so many epochs."""
    found = []
    if [one.epoch for one in record.epochs] != list(range(epochs)):
        told = ", ".join(str(one.epoch + 1) for one in record.epochs) or "none"
        found.append(f"the weights say that {epochs} epochs have begun, the record has: {told}")
    counted = {one for each in record.epochs for one in each.bad}
    named = Counter(one.id for one in record.bad)
    if counted != set(named) or any(times > 1 for times in named.values()):
        found.append(f"{len(counted)} samples are counted as bad, {len(record.bad)} are named")
    return found


def _run(name: str, storage: str, data: str) -> Run:
    """The run of that name or at that URL. Raises ConfigError."""
    folder = named.folder_of(name, storage)
    try:
        spec = stored_spec(folder)
    except FileNotFoundError:
        raise ConfigError(f"runs: {urls.redact(name)!r}: no run at {urls.redact(folder)}{_others(folder)}") from None
    except ValueError as error:
        raise ConfigError(f"runs: {urls.redact(name)!r}: its spec.json cannot be used: {error}") from None
    place = _absolute(data, "data") if data else named.dataset_of(spec.to_dict(), folder)
    try:
        dataset = manifest.load(place, allow_elsewhere=True)  # its counts and digest are compared, no tar is read
    except DataError as error:
        raise ConfigError(f"{error}; say with --data where the dataset of {spec.name} lies") from None
    if dataset.digest() != spec.dataset_digest:
        raise ConfigError(
            f"data: {urls.redact(place)}: its digest is {dataset.digest()}, {spec.name} was trained on "
            f"{spec.dataset_digest}; give that dataset with --data"
        )
    return Run(folder, spec, dataset)


def _others(folder: str) -> str:
    there = files.list_names(folder.rpartition("/")[0])
    return f"; beside it: {', '.join(there[:MOST_NAMES])}" if there else ""


def _absolute(url: str, field: str) -> str:
    try:
        return urls.absolute(url, field)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _held(one: Run) -> Held:
    """The record of the final weights, else of the newest checkpoint. Raises DataError, CommitError, ConfigError."""
    recipe, final = one.spec.recipe, final_of(one.folder)
    try:
        record = audit.record_of(weights.audit_of(final), urls.redact(final))
    except FileNotFoundError:
        found = checkpoint_format.newest(checkpoints_of(one.folder))
        if found.place is None:
            told = "; ".join(found.passed_over) or "it may not have come so far"
            raise ConfigError(f"runs: {one.spec.name}: no checkpoint to audit: {told}") from None
        record = audit.record_of(found.state.get("audit"), urls.redact(found.place.url))
        return Held(record, int(found.state.get("samples", 0)), f"checkpoint at {found.place.samples} samples")
    samples = one.dataset.samples(SPLIT)
    whole = recipe.epochs * order.steps_per_epoch(samples, recipe.batch_size) * recipe.batch_size
    return Held(record, whole, "final weights")


def _table(name: str, where: str, verdicts: Sequence[Verdict]) -> Table:
    table = Table(title=f"{name}: {where}", title_justify="left")
    for column in ("epoch", "planned", "delivered", "once", "left out by plan", "bad", "verdict"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    for one in verdicts:
        numbers = (one.epoch + 1, one.planned, one.delivered, one.once, one.left_out, one.bad)
        table.add_row(*map(str, numbers), "MISMATCH" if one.problems else "as planned")
    return table


def _bad(record: AuditRecord) -> list[str]:
    lines = [f"bad: {one.key} at byte {one.offset} of {one.source}: {one.reason}" for one in record.bad[:MOST_NAMES]]
    left = len(record.bad) - len(lines)
    return [*lines, f"bad: {left} more"] if left else lines


def _history(folder: str) -> str:
    """What the journal says of failures: their samples were delivered, and rolled back with the weights."""
    events, damaged = _events(folder)
    attempts = sum(event.kind == "started" for event in events)
    incidents = [event for event in events if event.kind == "incident"]
    again = sum(each for event in incidents if isinstance(each := event.values.get("samples_replayed"), int))
    told = f"attempts: {attempts}, incidents: {len(incidents)}"
    if incidents:
        # The journal knows of what was written to it: a killed worker's last seconds are not in it.
        told += f"; at least {again} samples were delivered, rolled back and delivered again"
    return told + (f"; {damaged} parts of the journal cannot be read" if damaged else "")


def _events(folder: str) -> tuple[list[Event], int]:
    """All events that can be read, and how many segments of the journal cannot."""
    found: list[Event] = []
    cursor: Cursor | None = None
    damaged = 0
    while True:
        try:
            events, reached = journal.read(journal_of(folder), cursor)
        except DamagedSegment as error:
            cursor, damaged = error.cursor, damaged + 1
            continue
        found += events
        if reached == cursor or not events:
            return found, damaged
        cursor = reached
