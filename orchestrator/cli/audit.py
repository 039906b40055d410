"""Were runs trained on what was planned? The record kept with their weights against the plan, epoch by epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import weights
from orchestrator.cli.config import AuditConfig
from orchestrator.cli.exit_status import EXIT_FAILURE, make_console
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest, sample_audit, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.sample_audit import AuditRecord, EpochVerdict
from orchestrator.data.sampler import EpochOrder
from orchestrator.ray_backend import run_lookup
from orchestrator.ray_backend.run_spec import RunSpec, load_run_spec
from orchestrator.storage import file_io, urls
from orchestrator.storage.commit import CommitError
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.tracking.journal import Cursor, DamagedSegmentError
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir, get_journal_dir

TRAIN_SPLIT = "train"
MAX_LISTED = 20  # told of what there is: runs when one is unknown, bad samples of a run


@dataclass(frozen=True)
class AuditedRun:
    """A run to audit: where it lies, what it is, the dataset it was trained on."""

    folder: str
    spec: RunSpec
    dataset: Manifest


@dataclass(frozen=True)
class DeliveryRecord:
    """A run's record, the samples trained on according to the weights it lies with, and what these are."""

    record: AuditRecord
    samples: int
    source: str


def run_audit(config: AuditConfig, console: Console | None = None) -> int:
    """Audit runs and print a table for each; return the exit status, 1 when one was not trained as planned.

    Raises ConfigError when there is nothing to audit, or when a run's dataset is missing or another one.
    """
    if not config.runs:
        raise ConfigError("runs: give the name of at least one run, or the URL of its folder")
    console = console or make_console()
    runs = [_load_run(name, config.storage, config.data) for name in config.runs]
    # Not all(...) of a generator: every run is reported, also after one that failed.
    clean = [_print_audit(run, console) for run in runs]
    return 0 if all(clean) else EXIT_FAILURE


def _print_audit(one: AuditedRun, screen: Console) -> bool:
    """Print what is to be said of a run; whether it is clean."""
    try:
        held = _load_record(one)
        with screen.status("computing the plan of each epoch again"):
            verdicts = compare_epochs(held, one)
    except (DataError, CommitError) as error:
        screen.print(f"{one.spec.name}: MISMATCH: {error}", highlight=False, soft_wrap=True)
        return False
    screen.print(_build_table(one.spec.name, held.source, verdicts))
    problems = [f"epoch {each.epoch + 1}: {problem}" for each in verdicts for problem in each.problems]
    problems += find_record_problems(held.record, len(verdicts))
    lines = [
        *(f"MISMATCH: {problem}" for problem in problems),
        *_format_bad_samples(held.record),
        _summarize_journal(one.folder),
    ]
    for line in lines:
        screen.print(line, highlight=False, soft_wrap=True, markup=False)
    return not problems


def compare_epochs(held: DeliveryRecord, one: AuditedRun) -> list[EpochVerdict]:
    """Each epoch that has begun, compared with its plan."""
    recipe = one.spec.recipe
    counts = tuple(shard.samples for shard in one.dataset.shards(TRAIN_SPLIT))
    steps_per_epoch = sampler.count_steps(sum(counts), recipe.batch_size)
    left = held.samples // recipe.batch_size
    found = []
    for epoch in range(recipe.epochs):
        steps = min(left, steps_per_epoch)
        if steps == 0:
            break
        plan = EpochOrder(counts, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window)
        found.append(sample_audit.compare_with_plan(held.record.get_epoch(epoch), plan, recipe.batch_size, steps))
        left -= steps
    return found


def find_record_problems(record: AuditRecord, epochs: int) -> list[str]:
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


def _load_run(name: str, storage: str, data: str) -> AuditedRun:
    """The run of that name or at that URL. Raises ConfigError."""
    folder = run_lookup.resolve_run_folder(name, storage)
    try:
        spec = load_run_spec(folder)
    except FileNotFoundError:
        raise ConfigError(
            f"runs: {redaction.redact(name)!r}: no run at {redaction.redact(folder)}{_list_neighbors(folder)}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"runs: {redaction.redact(name)!r}: its spec.json cannot be used: {error}") from None
    place = _make_absolute(data, "data") if data else run_lookup.resolve_dataset_url(spec.to_dict(), folder)
    try:
        dataset = manifest.load(place, allow_elsewhere=True)  # its counts and digest are compared, no tar is read
    except DataError as error:
        raise ConfigError(f"{error}; say with --data where the dataset of {spec.name} lies") from None
    if dataset.digest() != spec.dataset_digest:
        raise ConfigError(
            f"data: {redaction.redact(place)}: its digest is {dataset.digest()}, {spec.name} was trained on "
            f"{spec.dataset_digest}; give that dataset with --data"
        )
    return AuditedRun(folder, spec, dataset)


def _list_neighbors(folder: str) -> str:
    there = file_io.list_names(folder.rpartition("/")[0])
    return f"; beside it: {', '.join(there[:MAX_LISTED])}" if there else ""


def _make_absolute(url: str, field: str) -> str:
    try:
        return urls.require_absolute(url, field)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _load_record(one: AuditedRun) -> DeliveryRecord:
    """The record of the final weights, else of the newest checkpoint. Raises DataError, CommitError, ConfigError."""
    recipe, final = one.spec.recipe, get_final_weights_dir(one.folder)
    try:
        record = sample_audit.parse_record(weights.load_audit(final), redaction.redact(final))
    except FileNotFoundError:
        found = checkpoint_format.load_newest(get_checkpoints_dir(one.folder))
        if found.checkpoint is None:
            told = "; ".join(found.skipped) or "it may not have come so far"
            raise ConfigError(f"runs: {one.spec.name}: no checkpoint to audit: {told}") from None
        record = sample_audit.parse_record(found.state.get("audit"), redaction.redact(found.checkpoint.url))
        return DeliveryRecord(
            record, int(found.state.get("samples", 0)), f"checkpoint at {found.checkpoint.samples} samples"
        )
    samples = one.dataset.count_samples(TRAIN_SPLIT)
    whole = recipe.epochs * sampler.count_steps(samples, recipe.batch_size) * recipe.batch_size
    return DeliveryRecord(record, whole, "final weights")


def _build_table(name: str, where: str, verdicts: Sequence[EpochVerdict]) -> Table:
    table = Table(title=f"{name}: {where}", title_justify="left")
    for column in ("epoch", "planned", "delivered", "once", "left out by plan", "bad", "verdict"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    for one in verdicts:
        numbers = (one.epoch + 1, one.planned, one.delivered, one.exactly_once, one.left_out, one.bad)
        table.add_row(*map(str, numbers), "MISMATCH" if one.problems else "as planned")
    return table


def _format_bad_samples(record: AuditRecord) -> list[str]:
    lines = [f"bad: {one.key} at byte {one.offset} of {one.source}: {one.reason}" for one in record.bad[:MAX_LISTED]]
    left = len(record.bad) - len(lines)
    return [*lines, f"bad: {left} more"] if left else lines


def _summarize_journal(folder: str) -> str:
    """What the journal says of failures: their samples were delivered, and rolled back with the weights."""
    events, damaged = _read_events(folder)
    attempts = sum(event.kind == "started" for event in events)
    incidents = [event for event in events if event.kind == "incident"]
    again = sum(each for event in incidents if isinstance(each := event.values.get("samples_replayed"), int))
    told = f"attempts: {attempts}, incidents: {len(incidents)}"
    if incidents:
        # The journal knows of what was written to it: a killed worker's last seconds are not in it.
        told += f"; at least {again} samples were delivered, rolled back and delivered again"
    return told + (f"; {damaged} parts of the journal cannot be read" if damaged else "")


def _read_events(folder: str) -> tuple[list[Event], int]:
    """All events that can be read, and how many segments of the journal cannot."""
    found: list[Event] = []
    cursor: Cursor | None = None
    damaged = 0
    while True:
        try:
            events, reached = journal.read_events(get_journal_dir(folder), cursor)
        except DamagedSegmentError as error:
            cursor, damaged = error.cursor, damaged + 1
            continue
        found += events
        if reached == cursor or not events:
            return found, damaged
        cursor = reached
