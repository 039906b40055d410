"""Status of a run, from its storage alone: lease, attempts, journal, checkpoints, outcome. Needs no Ray, no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from orchestrator.config import redaction
from orchestrator.monitor import journal_summary
from orchestrator.monitor.journal_summary import JournalSummary, parse_float, parse_int
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend.lease import LeaseSnapshot
from orchestrator.storage import commit, file_io, urls
from orchestrator.tracking.events import Event
from orchestrator.training import attempts
from orchestrator.training.attempts import PreviousAttempt, find_failure_cause
from orchestrator.training.run_dir import get_final_weights_dir, get_journal_dir, get_outcome_path

# What each means: `orchestrator status --help`.
RunState = Literal[
    "waiting", "starting", "running", "restarting", "stopping", "finished", "stopped", "failed", "unreadable", "lost",
    "pruned", "diverged",
]  # fmt: skip
LIVE_STATES: tuple[RunState, ...] = ("waiting", "starting", "running", "restarting", "stopping")
PROBLEM_STATES: tuple[RunState, ...] = ("failed", "lost", "unreadable")
TERMINAL_STATES: tuple[RunState, ...] = ("finished", "pruned", "diverged", "failed")  # of trials

# A start takes no longer on a busy machine; after that a run waits for workers.
START_GRACE_SECONDS = 60.0
_NumberedAttempt = tuple[int, PreviousAttempt]
_TRIAL_RECORD = re.compile(r"^(\d{4,})\.json$")
# Runs of the winner and of the preset with other seeds, which tell a gain from noise; they have leases of their own.
_REPEAT_SUFFIX = re.compile(r"-(winner|preset)-r\d+$")


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
    summary = journal_summary.summarize_journal(get_journal_dir(folder))
    alive = lease.is_driver_alive(folder, snapshot)
    if driver is not None and not alive:
        snapshot, alive = driver, awaited
    state, message = _determine_state(folder, outcome, snapshot, alive, newest)
    if (snapshot is None or driver is not None) and newest is None and awaited and state != "finished":
        state, message = "waiting", ""
    checkpoint_samples, checkpoint_age = _find_newest_checkpoint(folder)
    epochs = parse_int(get_field(spec, "recipe", "epochs"))
    return RunSnapshot(
        name=urls.get_basename(folder),
        folder=redaction.redact(folder),
        state=state,
        message=message,
        model=str(get_field(spec, "recipe", "name") or model or urls.get_basename(folder)),
        ensemble=ensemble,
        epochs=epochs,
        incidents=len(summary.incidents),
        last_incident=str(summary.incidents[-1].values.get("cause", "")) if summary.incidents else "",
        checkpoint_samples=checkpoint_samples,
        checkpoint_seconds_ago=checkpoint_age,
        workers=parse_int(summary.started and summary.started.values.get("workers"))
        or parse_int(get_field(spec, "placement", "workers")),
        owner=str(snapshot.owner) if snapshot is not None and alive else "",
        **_collect_progress(state, epochs, summary, newest[1] if newest is not None else None),
    )


def _determine_state(
    folder: str, outcome: dict[str, Any], snapshot: LeaseSnapshot | None, alive: bool, newest: _NumberedAttempt | None
) -> tuple[RunState, str]:
    status, message = str(outcome.get("status", "")), str(outcome.get("message", ""))
    if status == "finished" and commit.is_complete(get_final_weights_dir(folder)):
        return "finished", ""
    if snapshot is not None and alive:
        return _determine_live_state(snapshot, newest), ""
    if snapshot is not None and not snapshot.released:
        return "lost", f"its driver died ({snapshot.owner}); rerun the same command to resume"
    # An outcome of an earlier attempt than the last is stale.
    if status and (newest is None or outcome.get("attempt") == newest[0]):
        return ("stopped", "") if status in ("stopped", "finished") else ("failed", f"{status}: {message}")
    if newest is None or newest[1].ended_cleanly or (snapshot is not None and snapshot.stop_requested):
        return "stopped", ""
    return "failed", find_failure_cause(newest[1])


def _determine_live_state(snapshot: LeaseSnapshot, newest: _NumberedAttempt | None) -> RunState:
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
    started, ended, metrics = summary.started, summary.epoch, journal_summary.NO_METRICS
    size = parse_int(started.values.get("samples_per_epoch")) if started is not None else None
    if ended is not None:
        metrics = journal_summary.parse_epoch_metrics(ended)
        size = size or (ended.samples or 0) // max(1, metrics.epoch)
    samples = max([0, *(event.samples or 0 for event in (summary.last, ended) if event is not None)])
    if state == "running" and attempt is not None:
        samples = attempt.samples
    progress: dict[str, Any] = asdict(metrics) | {
        "samples": samples if summary.last is not None else None,
        "epoch": samples / size if size else float(metrics.epoch) if ended is not None else None,
        "loss": journal_summary.parse_loss(summary.points[-1]) if summary.points else metrics.loss,
    }
    if state == "running":
        # Points of the loss curve leave out the pauses between epochs.
        points = [event for event in summary.points if event.kind == "metrics"]
        if points and (speed := _measure_speed(points[0], points[-1].time, points[-1].samples or 0)):
            progress["images_per_second"] = speed
        # The speed of this attempt includes validations.
        speed = _measure_speed(started, attempt.last_seen, samples) if attempt is not None else None
        if speed and epochs and size:
            progress["seconds_left"] = max(0.0, epochs * size - samples) / speed
    return progress


def _measure_speed(first: Event | None, end: float, samples: int) -> float | None:
    if first is None or end <= first.time or samples <= (first.samples or 0):
        return None
    return (samples - (first.samples or 0)) / (end - first.time)


def _find_newest_checkpoint(folder: str) -> tuple[int | None, float | None]:
    """Return the samples of the newest checkpoint that counts, and its age in seconds if it records its time."""
    for checkpoint in attempts.list_valid_checkpoints(folder):
        with suppress(FileNotFoundError, commit.CommitError):
            written = parse_float(commit.read_metadata(checkpoint.url).get("time"))
            return checkpoint.samples, None if written is None else max(0.0, time.time() - written)
    return None, None


def get_field(record: object, *path: str) -> object:
    """Return a value deep in a record; None where the record has another form."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def inspect_sweep(sweep: str) -> tuple[str, list[Callable[[], RunSnapshot]]]:
    """Return the process that runs the sweep at that URL, empty for none, and a call for each trial and repeat.

    The calls may run in parallel. Storage errors pass through.
    """
    snapshot = lease.read_lease(sweep)
    alive = lease.is_driver_alive(sweep, snapshot)
    ledger, sweep_name = file_io.join(sweep, run_lookup.TRIALS), urls.get_basename(sweep)
    names = file_io.list_names(ledger)
    folders = run_lookup.list_folders(sweep, run_lookup.MODELS)
    runs = {urls.get_basename(folder).rpartition("-")[0]: folder for folder in folders}

    def inspect_trial(number: str) -> RunSnapshot:
        plan = file_io.read_json_or_empty(file_io.join(ledger, f"{number}.json"))
        model = str(get_field(plan, "recipe", "name") or "")
        folder = runs.get(model, file_io.join(sweep, run_lookup.MODELS, model or number))
        trial = replace(inspect_run(folder, model=model, awaited=alive, driver=snapshot), sweep=sweep_name)
        if trial.state == "stopping" and snapshot is not None and not snapshot.stop_requested:
            trial = replace(trial, state="waiting")  # its actor trains another trial now
        end = f"{number}.ended.json"
        record = file_io.read_json_or_empty(file_io.join(ledger, end)) if end in names else {}
        # States that the sweep's ledger records and the runs of its trials do not.
        match record.get("state"):
            case "pruned":
                return replace(trial, state="pruned", message="")
            case "diverged" | "failed" as state:
                return replace(trial, state=state, message=str(record.get("reason", "")))
        return trial

    def inspect_repeat(folder: str) -> RunSnapshot:
        return replace(inspect_run(folder), sweep=sweep_name)

    numbers = sorted((match[1] for name in names if (match := _TRIAL_RECORD.match(name))), key=int)
    trials = [partial(inspect_trial, number) for number in numbers]
    repeats = [partial(inspect_repeat, runs[name]) for name in sorted(runs) if _REPEAT_SUFFIX.search(name)]
    return str(snapshot.owner) if snapshot is not None and alive else "", [*trials, *repeats]
