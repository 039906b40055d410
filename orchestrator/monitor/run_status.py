"""Status of a run, from its storage alone: lease, attempts, journal, checkpoints, outcome. Needs no Ray, no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from orchestrator.checkpoint.checkpoint_dir import list_checkpoints
from orchestrator.config import redaction
from orchestrator.monitor.journal_summary import (
    NO_METRICS,
    JournalSummary,
    parse_epoch_metrics,
    parse_float,
    parse_int,
    parse_loss,
    summarize_journal,
)
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend.lease import LeaseSnapshot
from orchestrator.storage import commit, file_io, urls
from orchestrator.tracking.events import Event
from orchestrator.training import attempts
from orchestrator.training.attempts import PreviousAttempt, find_failure_cause
from orchestrator.training.run_dir import get_checkpoints_dir, get_final_weights_dir, get_journal_dir, get_outcome_path

RunState = Literal[
    "waiting",  # for its turn, or for workers
    "starting",
    "running",
    "restarting",  # after a crash of its workers
    "stopping",  # on request
    "finished",
    "stopped",
    "failed",
    "unreadable",  # one of its records is
    "lost",  # its driver died without releasing its lease
    "pruned",  # a trial ended early
    "diverged",  # a trial with a non-finite loss or score
]
LIVE_STATES: tuple[RunState, ...] = ("waiting", "starting", "running", "restarting", "stopping")
PROBLEM_STATES: tuple[RunState, ...] = ("failed", "lost", "unreadable")
TERMINAL_STATES: tuple[RunState, ...] = ("finished", "pruned", "diverged", "failed")  # of trials

# A start takes no longer on a busy machine; after that a run waits for workers.
START_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class RunSnapshot:
    """Status of one run; unknown values are None. Errors are in percent, `epoch` includes the part that is trained."""

    name: str
    folder: str  # URL, without users, passwords and queries
    state: RunState
    message: str = ""  # reason of a failed or lost run
    model: str = ""
    ensemble: str = ""
    sweep: str = ""
    epochs: int | None = None  # in all
    epoch: float | None = None
    samples: int | None = None
    loss: float | None = None
    top1_error: float | None = None
    top5_error: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    incidents: int = 0
    last_incident: str = ""
    goodput: float | None = None  # share of the time whose work counts
    checkpoint_samples: int | None = None
    checkpoint_seconds_ago: float | None = None
    workers: int | None = None
    owner: str = ""  # process that runs it
    stage: str = ""  # work of the ensemble's driver after training


def inspect_run(
    folder: str, ensemble: str = "", model: str = "", awaited: bool = False, driver: LeaseSnapshot | None = None
) -> RunSnapshot:
    """Read the status of the run in `folder`, which may not exist yet. Storage errors pass through.

    ensemble, model: the ensemble that it is a member of, and its recipe's name there. awaited: the driver of the
    ensemble or sweep is alive, so a run that was not begun waits for its turn. driver: the sweep's lease, which covers
    its trials.
    """
    spec = file_io.read_json_or_empty(file_io.join(folder, "spec.json"))
    outcome = file_io.read_json_or_empty(get_outcome_path(folder))
    snapshot, newest = lease.read_lease(folder), attempts.load_latest_attempt(folder)
    summary = summarize_journal(get_journal_dir(folder))
    alive = lease.is_driver_alive(folder, snapshot)
    if driver is not None and not alive:
        snapshot, alive = driver, awaited
    state, message = _determine_state(folder, outcome, snapshot, alive, newest)
    if (snapshot is None or driver is not None) and newest is None and awaited and state != "finished":
        state, message = "waiting", ""
    checkpoint_samples, checkpoint_age = _find_newest_checkpoint(folder)
    epochs = parse_int(_get_spec_field(spec, "recipe", "epochs"))
    return RunSnapshot(
        name=urls.get_basename(folder),
        folder=redaction.redact(folder),
        state=state,
        message=message,
        model=str(_get_spec_field(spec, "recipe", "name") or model or urls.get_basename(folder)),
        ensemble=ensemble,
        epochs=epochs,
        incidents=len(summary.incidents),
        last_incident=str(summary.incidents[-1].values.get("cause", "")) if summary.incidents else "",
        checkpoint_samples=checkpoint_samples,
        checkpoint_seconds_ago=checkpoint_age,
        workers=parse_int(summary.started and summary.started.values.get("workers"))
        or parse_int(_get_spec_field(spec, "placement", "workers")),
        owner=str(snapshot.owner) if snapshot is not None and alive else "",
        **_collect_progress(state, epochs, summary, newest[1] if newest is not None else None),
    )


def _determine_state(
    folder: str,
    outcome: dict[str, Any],
    snapshot: LeaseSnapshot | None,
    alive: bool,
    newest: tuple[int, PreviousAttempt] | None,
) -> tuple[RunState, str]:
    """Return the state, and the reason of a bad one."""
    status, message = str(outcome.get("status", "")), str(outcome.get("message", ""))
    if status == "finished" and commit.is_complete(get_final_weights_dir(folder)):
        return "finished", ""
    if snapshot is not None and alive:
        return _determine_live_state(snapshot, newest), ""
    if snapshot is not None and not snapshot.released:
        return (
            "lost",
            f"its driver died without releasing its lease ({snapshot.owner}); rerun the same command to resume",
        )
    # An outcome of an earlier attempt than the last is stale.
    if status and (newest is None or outcome.get("attempt") == newest[0]):
        return ("stopped", "") if status in ("stopped", "finished") else ("failed", f"{status}: {message}")
    if newest is None or newest[1].ended_cleanly or (snapshot is not None and snapshot.stop_requested):
        return "stopped", ""
    return "failed", find_failure_cause(newest[1])


def _determine_live_state(snapshot: LeaseSnapshot, newest: tuple[int, PreviousAttempt] | None) -> RunState:
    if snapshot.stop_requested:
        return "stopping"
    since = snapshot.owner.since
    if newest is None or newest[1].last_seen < since:
        return "starting" if time.time() - since < START_GRACE_SECONDS else "waiting"
    number, attempt = newest
    crashed = attempt.last_event is not None and attempt.last_event.kind == "crashed"
    if attempt.failure is not None or attempt.stall_causes or crashed:
        return "restarting"
    if attempt.ended_cleanly:
        return "stopping"  # its driver is about to end, too
    if attempt.last_event is None:
        return "starting" if number == 1 or attempt.start_time - since < START_GRACE_SECONDS else "restarting"
    return "running"


def _collect_progress(
    state: RunState, epochs: int | None, summary: JournalSummary, attempt: PreviousAttempt | None
) -> dict[str, Any]:
    """Return the fields of progress; speed and time left only of a run that makes progress."""
    metrics = NO_METRICS if summary.epoch is None else parse_epoch_metrics(summary.epoch)
    epoch_samples = _get_samples_per_epoch(summary)
    samples = max([0, *(event.samples or 0 for event in (summary.last, summary.epoch) if event is not None)])
    if state == "running" and attempt is not None:
        samples = attempt.samples
    whole_epochs = float(metrics.epoch) if summary.epoch is not None else None
    progress: dict[str, Any] = {
        "samples": samples if summary.last is not None else None,
        "epoch": samples / epoch_samples if epoch_samples else whole_epochs,
        "loss": parse_loss(summary.points[-1]) if summary.points else metrics.loss,
        "top1_error": metrics.top1_error,
        "top5_error": metrics.top5_error,
        "images_per_second": metrics.images_per_second,
        "goodput": metrics.goodput,
    }
    if state == "running":
        progress["images_per_second"] = _compute_throughput(summary.points) or metrics.images_per_second
        progress["seconds_left"] = _estimate_seconds_left(epochs, epoch_samples, samples, summary.started, attempt)
    return progress


def _compute_throughput(points: Sequence[Event]) -> float | None:
    """Return images per second between the given points of the loss curve, the pauses between epochs left out."""
    moments = [(event.time, event.samples or 0) for event in points if event.kind == "metrics"]
    if len(moments) < 2:
        return None
    (began, before), (ended, after) = moments[0], moments[-1]
    return (after - before) / (ended - began) if ended > began and after > before else None


def _estimate_seconds_left(
    epochs: int | None, size: float | None, samples: int, started: Event | None, attempt: PreviousAttempt | None
) -> float | None:
    """Estimate from the speed of this attempt, validations included."""
    if not epochs or not size or started is None or attempt is None:
        return None
    seconds, done = attempt.last_seen - started.time, samples - (started.samples or 0)
    return max(0.0, epochs * size - samples) * seconds / done if done > 0 and seconds > 0 else None


def _get_samples_per_epoch(summary: JournalSummary) -> float | None:
    size: float | None = parse_int(summary.started.values.get("samples_per_epoch")) if summary.started else None
    if not size and summary.epoch is not None and (ended := parse_epoch_metrics(summary.epoch).epoch):
        size = (summary.epoch.samples or 0) / ended
    return size or None


def _find_newest_checkpoint(folder: str) -> tuple[int | None, float | None]:
    """Return the samples of the newest checkpoint that counts, and its age in seconds if it records its time."""
    find_staleness = attempts.load_stale_checkpoint_check(folder)
    for checkpoint in list_checkpoints(get_checkpoints_dir(folder)):
        if find_staleness(checkpoint) is not None:
            continue
        try:
            written = parse_float(commit.read_metadata(checkpoint.url).get("time"))
        except (FileNotFoundError, commit.CommitError):
            continue
        return checkpoint.samples, None if written is None else max(0.0, time.time() - written)
    return None, None


def _get_spec_field(spec: dict[str, Any], part: str, field: str) -> object:
    fields = spec.get(part)
    return fields.get(field) if isinstance(fields, dict) else None


_TRIAL_RECORD = re.compile(r"^(\d{4,})\.json$")
# Runs of the winner and of the preset with other seeds, which tell a gain from noise; they have leases of their own.
_REPEAT_SUFFIX = re.compile(r"-(winner|preset)-r\d+$")
# States of trials that the sweep's ledger records and their runs do not.
_LEDGER_STATES: dict[str, RunState] = {"pruned": "pruned", "diverged": "diverged", "failed": "failed"}


@dataclass(frozen=True)
class SweepSnapshot:
    """Status of a sweep."""

    owner: str  # process that runs it; empty when there is none
    inspections: tuple[Callable[[], RunSnapshot], ...]  # one for each trial and repeat, for use in parallel


def inspect_sweep(sweep: str) -> SweepSnapshot:
    """Read the owner of the sweep in the folder of that URL, and list its trials and repeats.

    Storage errors pass through.
    """
    snapshot = lease.read_lease(sweep)
    alive = lease.is_driver_alive(sweep, snapshot)
    ledger = file_io.join(sweep, run_lookup.TRIALS)
    names = file_io.list_names(ledger)
    numbers = sorted(int(match[1]) for name in names if (match := _TRIAL_RECORD.match(name)))
    runs = {
        urls.get_basename(folder).rpartition("-")[0]: folder
        for folder in run_lookup.list_folders(sweep, run_lookup.MODELS)
    }

    def inspect_trial(number: int) -> RunSnapshot:
        recipe = _get_spec_field(
            file_io.read_json_or_empty(file_io.join(ledger, f"{number:04d}.json")), "recipe", "name"
        )
        model = str(recipe or "")
        folder = runs.get(model, file_io.join(sweep, run_lookup.MODELS, model or f"{number:04d}"))
        trial = replace(
            inspect_run(folder, model=model, awaited=alive, driver=snapshot), sweep=urls.get_basename(sweep)
        )
        if trial.state == "stopping" and snapshot is not None and not snapshot.stop_requested:
            trial = replace(trial, state="waiting")  # its actor trains another trial now
        end = f"{number:04d}.ended.json"
        if end not in names:
            return trial
        record = file_io.read_json_or_empty(file_io.join(ledger, end))
        state = _LEDGER_STATES.get(str(record.get("state")))
        if state is None:
            return trial
        return replace(trial, state=state, message="" if state == "pruned" else str(record.get("reason", "")))

    repeats = [runs[name] for name in sorted(runs) if _REPEAT_SUFFIX.search(name)]
    inspections = [partial(inspect_trial, number) for number in numbers]
    inspections += [partial(_inspect_repeat, folder, sweep) for folder in repeats]
    return SweepSnapshot(str(snapshot.owner) if snapshot is not None and alive else "", tuple(inspections))


def _inspect_repeat(folder: str, sweep: str) -> RunSnapshot:
    return replace(inspect_run(folder), sweep=urls.get_basename(sweep))
