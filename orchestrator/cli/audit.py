"""Compare the samples that runs were trained on, by the record kept with their weights, with their plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.cli.config import AuditConfig
from orchestrator.cli.exit_status import EXIT_FAILURE
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest, sample_audit, sampler
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.sample_audit import AuditRecord, EpochVerdict
from orchestrator.data.sampler import EpochOrder
from orchestrator.monitor.formatting import print_line
from orchestrator.monitor.journal_summary import parse_int, summarize_journal
from orchestrator.ray_backend import run_lookup
from orchestrator.ray_backend.run_spec import RunSpec, load_run_spec
from orchestrator.storage import urls
from orchestrator.storage.commit import CommitError
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir, get_journal_dir

TRAIN_SPLIT = "train"
MAX_LISTED = 20  # neighbors of an unknown run, bad samples of a run


@dataclass(frozen=True)
class AuditedRun:
    """A run to audit."""

    folder: str
    spec: RunSpec
    dataset: Manifest
    labels: NDArray[np.integer] | None  # of the training samples, for a class-balanced order


def run_audit(config: AuditConfig, console: Console) -> int:
    """Audit runs and print a table for each; return the exit status, 1 when one was not trained as planned.

    Raises ConfigError when there is nothing to audit, or when a run's dataset is missing or another one.
    """
    if not config.runs:
        raise ConfigError("runs: give the name of at least one run, or the URL of its folder")
    runs = [_load_run(name, config.storage, config.data) for name in config.runs]
    # Not all(...) of a generator: every run is reported, also after one that failed.
    clean = [_print_audit(run, console) for run in runs]
    return 0 if all(clean) else EXIT_FAILURE


def _print_audit(run: AuditedRun, console: Console) -> bool:
    try:
        record, samples, source = _load_record(run)
        with console.status("recomputing the plan of each epoch"):
            verdicts = _compare_epochs(record, samples, run)
    except (DataError, CommitError) as error:
        print_line(console, f"{run.spec.name}: MISMATCH: {error}")
        return False
    table = Table(title=f"{run.spec.name}: {source}", title_justify="left")
    for column in ("epoch", "planned", "delivered", "once", "left out by plan", "bad", "verdict"):
        table.add_column(column, justify="left" if column == "verdict" else "right", no_wrap=True)
    for row in verdicts:
        numbers = (row.epoch + 1, row.planned, row.delivered, row.exactly_once, row.left_out, row.bad)
        table.add_row(*map(str, numbers), "MISMATCH" if row.problems else "as planned")
    console.print(table)
    problems = [f"epoch {verdict.epoch + 1}: {problem}" for verdict in verdicts for problem in verdict.problems]
    problems += _find_record_problems(record, len(verdicts))
    lines = [f"MISMATCH: {problem}" for problem in problems]
    lines += [f"bad: {bad.key} at byte {bad.offset} of {bad.source}: {bad.reason}" for bad in record.bad[:MAX_LISTED]]
    lines += [f"bad: {len(record.bad) - MAX_LISTED} more"] if len(record.bad) > MAX_LISTED else []
    for line in (*lines, _describe_failures(run.folder)):
        print_line(console, line)
    return not problems


def _compare_epochs(record: AuditRecord, samples: int, run: AuditedRun) -> list[EpochVerdict]:
    """Return the comparison with the plan of each epoch that has begun, of weights trained on so many samples."""
    recipe = run.spec.recipe
    counts = tuple(shard.samples for shard in run.dataset.shards(TRAIN_SPLIT))
    steps_per_epoch = sampler.count_steps(sum(counts), recipe.batch_size)
    verdicts: list[EpochVerdict] = []
    steps_done = samples // recipe.batch_size
    for epoch in range(recipe.epochs):
        steps = min(steps_done - epoch * steps_per_epoch, steps_per_epoch)
        if steps <= 0:
            break
        plan = EpochOrder(counts, recipe.seeds.order, epoch, recipe.order.lanes, recipe.order.window, run.labels)
        verdicts.append(sample_audit.compare_with_plan(record.get_epoch(epoch), plan, recipe.batch_size, steps))
    return verdicts


def _find_record_problems(record: AuditRecord, epochs: int) -> list[str]:
    problems = []
    if [entry.epoch for entry in record.epochs] != list(range(epochs)):
        listed = ", ".join(str(entry.epoch + 1) for entry in record.epochs) or "none"
        problems.append(f"the weights say that {epochs} epochs have begun, the record has: {listed}")
    counted = {sample for entry in record.epochs for sample in entry.bad}
    if sorted(counted) != sorted(entry.id for entry in record.bad):
        problems.append(f"{len(counted)} samples are counted as bad, {len(record.bad)} are named")
    return problems


def _describe_failures(folder: str) -> str:
    """Return a line about failures: their samples were delivered, and rolled back with the weights."""
    summary = summarize_journal(get_journal_dir(folder))
    # The journal lacks a killed worker's last seconds, so this is a lower bound.
    samples = sum(parse_int(event.values.get("samples_replayed")) or 0 for event in summary.incidents)
    replayed = f"; at least {samples} samples were delivered, rolled back and delivered again"
    return f"attempts: {summary.attempt}, incidents: {len(summary.incidents)}" + replayed * bool(summary.incidents)


def _load_run(name: str, storage: str, data: str) -> AuditedRun:
    (entry,) = run_lookup.find_runs([name], storage)
    folder = entry.folder
    if entry.members is not None or entry.is_sweep:
        raise ConfigError(f"runs: {redaction.redact(name)!r}: must be a run, not an ensemble or a sweep; give its runs")
    try:
        spec = load_run_spec(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"runs: {redaction.redact(name)!r}: its spec.json cannot be used: {error}") from None
    url = urls.require_absolute(data, "data") if data else run_lookup.resolve_dataset_url(spec.to_dict(), folder)
    try:
        dataset = manifest.load(url, allow_elsewhere=True)  # counts and digest are compared, no tar is read
    except DataError as error:
        raise ConfigError(f"{error}; set --data to the dataset of {spec.name}") from None
    if dataset.digest() != spec.dataset_digest:
        raise ConfigError(
            f"data: {redaction.redact(url)}: its digest is {dataset.digest()}, {spec.name} was trained on "
            f"{spec.dataset_digest}; set --data to that dataset"
        )
    labels = sampler.load_balance_labels(url, dataset, TRAIN_SPLIT, spec.recipe.order)
    return AuditedRun(folder, spec, dataset, labels)


def _load_record(run: AuditedRun) -> tuple[AuditRecord, int, str]:
    """Return the record of the final weights, else of the newest checkpoint, the samples they were trained on, a name.

    Raises DataError, CommitError or ConfigError.
    """
    recipe, final = run.spec.recipe, get_final_weights_dir(run.folder)
    try:
        record = sample_audit.parse_record(checkpoint_format.load_audit(final), redaction.redact(final))
    except FileNotFoundError:
        newest = checkpoint_format.load_newest(get_checkpoints_dir(run.folder))
        if newest.checkpoint is None:
            reason = "; ".join(newest.skipped) or "it may not have written one yet"
            raise ConfigError(f"runs: {run.spec.name}: no checkpoint to audit: {reason}") from None
        record = sample_audit.parse_record(newest.state.get("audit"), redaction.redact(newest.checkpoint.url))
        return record, int(newest.state.get("samples", 0)), f"checkpoint at {newest.checkpoint.samples} samples"
    steps = sampler.count_steps(run.dataset.count_samples(TRAIN_SPLIT), recipe.batch_size)
    return record, recipe.epochs * steps * recipe.batch_size, "final weights"
