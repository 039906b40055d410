"""How a run stands, from its storage alone: lease, attempts, journal, checkpoints, outcome. Needs no ray, no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from orchestrator.checkpoint.checkpoint_dir import list_checkpoints
from orchestrator.config import redaction
from orchestrator.monitor.formatting import NO_METRICS, parse_epoch_metrics, parse_float, parse_int, parse_loss
from orchestrator.monitor.journal_summary import JournalSummary, summarize_journal
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
    "stopping",  # asked to
    "finished",
    "stopped",
    "failed",
    "unreadable",  # one of its records; the others are shown
    "lost",  # its driver died without releasing its lease
    "pruned",  # a trial that was ended early
    "diverged",  # a trial whose loss or score is no number
]
LIVE_STATES: tuple[RunState, ...] = ("waiting", "starting", "running", "restarting", "stopping")
PROBLEM_STATES: tuple[RunState, ...] = ("failed", "lost", "unreadable")
TERMINAL_STATES: tuple[RunState, ...] = ("finished", "pruned", "diverged", "failed")  # trials that are not gone on with

# A start takes no longer on a busy machine; then it waits for workers.
START_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class RunSnapshot:
    """One run; what is not known is None. Errors are in percent, `epoch` counts parts of the present one, too."""

    name: str
    folder: str  # URL, without users, passwords and queries
    state: RunState
    message: str = ""  # why it failed or is lost
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
    owner: str = ""  # who runs it
    stage: str = ""  # what the driver of its ensemble does with it now that it is trained


def inspect_run(
    folder: str, ensemble: str = "", model: str = "", awaited: bool = False, driver: LeaseSnapshot | None = None
) -> RunSnapshot:
    """How the run in `folder` stands, which need not be there yet. Storage errors pass through.

    ensemble, model: the ensemble that it is a member of, and its recipe's name there. awaited: the ensemble's, or the
    sweep's, driver lives, so that a member that was not begun waits for its turn. driver: the sweep's, whose lease is
    that of its trials, too.
    """
    spec, outcome = (
        file_io.read_json_or_empty(file_io.join(folder, "spec.json")),
        file_io.read_json_or_empty(get_outcome_path(folder)),
    )
    held, newest, told = (
        lease.read_lease(folder),
        attempts.load_latest_attempt(folder),
        summarize_journal(get_journal_dir(folder)),
    )
    lives = lease.is_driver_alive(folder, held)
    if driver is not None and not lives:
        held, lives = driver, awaited
    last = newest[1] if newest is not None else None
    state, message = _determine_state(folder, outcome, held, lives, newest)
    if (held is None or driver is not None) and newest is None and awaited and state != "finished":
        state, message = "waiting", ""
    saved = _find_newest_checkpoint(folder)
    epochs = parse_int(_get_spec_field(spec, "recipe", "epochs"))
    return RunSnapshot(
        name=urls.get_basename(folder),
        folder=redaction.redact(folder),
        state=state,
        message=message,
        model=str(_get_spec_field(spec, "recipe", "name") or model or urls.get_basename(folder)),
        ensemble=ensemble,
        epochs=epochs,
        incidents=len(told.incidents),
        last_incident=str(told.incidents[-1].values.get("cause", "")) if told.incidents else "",
        checkpoint_samples=saved[0],
        checkpoint_seconds_ago=saved[1],
        workers=parse_int(told.started and told.started.values.get("workers"))
        or parse_int(_get_spec_field(spec, "placement", "workers")),
        owner=str(held.owner) if held is not None and lives else "",
        **_collect_progress(state, epochs, told, last),
    )


def _determine_state(
    folder: str,
    outcome: dict[str, Any],
    held: LeaseSnapshot | None,
    lives: bool,
    newest: tuple[int, PreviousAttempt] | None,
) -> tuple[RunState, str]:
    """The state, and why it is a bad one."""
    status, message = str(outcome.get("status", "")), str(outcome.get("message", ""))
    if status == "finished" and commit.is_complete(get_final_weights_dir(folder)):
        return "finished", ""
    if held is not None and lives:
        return _determine_live_state(held, newest), ""
    if held is not None and not held.released:
        return "lost", f"its driver died without releasing its lease ({held.owner}); rerun the same command to resume"
    # An outcome counts when it is that of the last attempt: an earlier one was overtaken.
    if status and (newest is None or outcome.get("attempt") == newest[0]):
        return ("stopped", "") if status in ("stopped", "finished") else ("failed", f"{status}: {message}")
    if newest is None or newest[1].ended_cleanly or (held is not None and held.stop_requested):
        return "stopped", ""
    return "failed", find_failure_cause(newest[1])


def _determine_live_state(held: LeaseSnapshot, newest: tuple[int, PreviousAttempt] | None) -> RunState:
    if held.stop_requested:
        return "stopping"
    since = held.owner.since
    if newest is None or newest[1].last_seen < since:
        return "starting" if time.time() - since < START_GRACE_SECONDS else "waiting"
    before = newest[1]
    if (
        before.failure is not None
        or before.stall_causes
        or (before.last_event is not None and before.last_event.kind == "crashed")
    ):
        return "restarting"
    if before.ended_cleanly:
        return "stopping"  # its driver is about to end, too
    if before.last_event is None:
        return "starting" if newest[0] == 1 or before.start_time - since < START_GRACE_SECONDS else "restarting"
    return "running"


def _collect_progress(
    state: RunState, epochs: int | None, told: JournalSummary, last: PreviousAttempt | None
) -> dict[str, Any]:
    """What the journal says of progress; speed and time left only of a run that makes progress."""
    figures = NO_METRICS if told.epoch is None else parse_epoch_metrics(told.epoch)
    size = _get_samples_per_epoch(told)
    samples = max([0, *(event.samples or 0 for event in (told.last, told.epoch) if event is not None)])
    if state == "running" and last is not None:
        samples = last.samples
    point = told.points[-1] if told.points else None
    found: dict[str, Any] = {
        "samples": samples if told.last is not None else None,
        "epoch": samples / size if size else (float(figures.epoch) if told.epoch is not None else None),
        "loss": parse_loss(point) if point is not None else figures.loss,
        "top1_error": figures.top1_error,
        "top5_error": figures.top5_error,
        "images_per_second": figures.images_per_second,
        "goodput": figures.goodput,
    }
    if state == "running":
        found["images_per_second"] = _compute_throughput(told.points) or figures.images_per_second
        found["seconds_left"] = _estimate_seconds_left(epochs, size, samples, told.started, last)
    return found


def _compute_throughput(points: Sequence[Event]) -> float | None:
    """Images a second between the points at hand of the loss curve, the pauses between epochs left out."""
    moments = [(event.time, event.samples or 0) for event in points if event.kind == "metrics"]
    if len(moments) < 2:
        return None
    (began, before), (ended, after) = moments[0], moments[-1]
    return (after - before) / (ended - began) if ended > began and after > before else None


def _estimate_seconds_left(
    epochs: int | None, size: float | None, samples: int, started: Event | None, last: PreviousAttempt | None
) -> float | None:
    """From the speed of this attempt, validations included."""
    if not epochs or not size or started is None or last is None:
        return None
    seconds, done = last.last_seen - started.time, samples - (started.samples or 0)
    return max(0.0, epochs * size - samples) * seconds / done if done > 0 and seconds > 0 else None


def _get_samples_per_epoch(told: JournalSummary) -> float | None:
    """Samples of an epoch."""
    size: float | None = parse_int(told.started.values.get("samples_per_epoch")) if told.started is not None else None
    if not size and told.epoch is not None and (ended := parse_epoch_metrics(told.epoch).epoch):
        size = (told.epoch.samples or 0) / ended
    return size or None


def _find_newest_checkpoint(folder: str) -> tuple[int | None, float | None]:
    """Samples of the newest checkpoint that counts, and its age in seconds if it says when it was written."""
    void = attempts.load_stale_checkpoint_check(folder)
    for place in list_checkpoints(get_checkpoints_dir(folder)):
        if void(place) is not None:
            continue
        try:
            written = parse_float(commit.read_metadata(place.url).get("time"))
        except (FileNotFoundError, commit.CommitError):
            continue
        return place.samples, None if written is None else max(0.0, time.time() - written)
    return None, None


def _get_spec_field(spec: dict[str, Any], part: str, field: str) -> object:
    found = spec.get(part)
    return found.get(field) if isinstance(found, dict) else None


_TRIAL_RECORD = re.compile(r"^(\d{4,})\.json$")
# Runs of the winner and of the preset with other seeds, which tell a gain from noise; they have leases of their own.
_REPEAT_SUFFIX = re.compile(r"-(winner|preset)-r\d+$")
# How the sweep's ledger says that a trial ended, where that is not what its run says of itself.
_LEDGER_STATES: dict[str, RunState] = {"pruned": "pruned", "diverged": "diverged", "failed": "failed"}


@dataclass(frozen=True)
class SweepSnapshot:
    """A sweep at one moment."""

    owner: str  # who runs it; empty when nobody does
    inspections: tuple[Callable[[], RunSnapshot], ...]  # one for each trial and repeat, to be asked side by side


def inspect_sweep(sweep: str) -> SweepSnapshot:
    """Who runs the sweep in the folder of that URL, its trials and its repeats. Storage errors pass through."""
    held = lease.read_lease(sweep)
    lives = lease.is_driver_alive(sweep, held)
    places = file_io.join(sweep, run_lookup.TRIALS)
    names = file_io.list_names(places)
    numbers = sorted(int(match[1]) for name in names if (match := _TRIAL_RECORD.match(name)))
    runs = {
        urls.get_basename(folder).rpartition("-")[0]: folder
        for folder in run_lookup.list_folders(sweep, run_lookup.MODELS)
    }

    def trial(number: int) -> RunSnapshot:
        recipe = _read_recipe_name(file_io.join(places, f"{number:04d}.json"))
        folder = runs.get(recipe, file_io.join(sweep, run_lookup.MODELS, recipe or f"{number:04d}"))
        one = replace(inspect_run(folder, model=recipe, awaited=lives, driver=held), sweep=urls.get_basename(sweep))
        if one.state == "stopping" and held is not None and not held.stop_requested:
            one = replace(one, state="waiting")  # its actor trains another trial now
        end = f"{number:04d}.ended.json"
        return one if end not in names else _apply_trial_end(one, file_io.read_json_or_empty(file_io.join(places, end)))

    repeats = [runs[name] for name in sorted(runs) if _REPEAT_SUFFIX.search(name)]
    calls = [partial(trial, each) for each in numbers] + [partial(_inspect_repeat, each, sweep) for each in repeats]
    return SweepSnapshot(str(held.owner) if held is not None and lives else "", tuple(calls))


def _inspect_repeat(folder: str, sweep: str) -> RunSnapshot:
    return replace(inspect_run(folder), sweep=urls.get_basename(sweep))


def _apply_trial_end(one: RunSnapshot, end: dict[str, Any]) -> RunSnapshot:
    state = _LEDGER_STATES.get(str(end.get("state")))
    if state is None:
        return one
    return replace(one, state=state, message="" if state == "pruned" else str(end.get("reason", "")))


def _read_recipe_name(url: str) -> str:
    found = file_io.read_json_or_empty(url).get("recipe")
    return str(found.get("name", "")) if isinstance(found, dict) else ""
