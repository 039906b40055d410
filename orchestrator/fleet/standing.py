"""How a run stands, from its storage alone: lease, attempts, journal, checkpoints, outcome. Needs no ray, no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.checkpoint.places import places
from orchestrator.fleet.figures import NOTHING, loss_of, number, of_epoch, whole
from orchestrator.fleet.glance import Glance, glance
from orchestrator.launch import holder
from orchestrator.launch.holder import Holder
from orchestrator.storage import commit, files, urls
from orchestrator.tracking.events import Event
from orchestrator.training import attempts
from orchestrator.training.attempts import Before
from orchestrator.training.incident import cause
from orchestrator.training.job import checkpoints_of, final_of, journal_of, outcome_of

State = Literal[
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
LIVE: tuple[State, ...] = ("waiting", "starting", "running", "restarting", "stopping")
BAD: tuple[State, ...] = ("failed", "lost", "unreadable")
ENDED: tuple[State, ...] = ("finished", "pruned", "diverged", "failed")  # trials that are not gone on with

# A start takes no longer on a busy machine; then it waits for workers.
START_SECONDS = 60.0


@dataclass(frozen=True)
class Standing:
    """One run; what is not known is None. Errors are in percent, `epoch` counts parts of the present one, too."""

    name: str
    folder: str  # URL, without users, passwords and queries
    state: State
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


def standing(
    folder: str, ensemble: str = "", model: str = "", awaited: bool = False, driver: Holder | None = None
) -> Standing:
    """How the run in `folder` stands, which need not be there yet. Storage errors pass through.

    ensemble, model: the ensemble that it is a member of, and its recipe's name there. awaited: the ensemble's, or the
    sweep's, driver lives, so that a member that was not begun waits for its turn. driver: the sweep's, whose lease is
    that of its trials, too.
    """
    spec, outcome = files.read_record(files.join(folder, "spec.json")), files.read_record(outcome_of(folder))
    held, newest, told = holder.look(folder), attempts.newest(folder), glance(journal_of(folder))
    lives = holder.lives(folder, held)
    if driver is not None and not lives:
        held, lives = driver, awaited
    last = newest[1] if newest is not None else None
    state, message = _state(folder, outcome, held, lives, newest)
    if (held is None or driver is not None) and newest is None and awaited and state != "finished":
        state, message = "waiting", ""
    saved = _saved(folder)
    epochs = whole(_of(spec, "recipe", "epochs"))
    return Standing(
        name=urls.name(folder),
        folder=urls.redact(folder),
        state=state,
        message=message,
        model=str(_of(spec, "recipe", "name") or model or urls.name(folder)),
        ensemble=ensemble,
        epochs=epochs,
        incidents=len(told.incidents),
        last_incident=str(told.incidents[-1].values.get("cause", "")) if told.incidents else "",
        checkpoint_samples=saved[0],
        checkpoint_seconds_ago=saved[1],
        workers=whole(told.started and told.started.values.get("workers")) or whole(_of(spec, "placement", "workers")),
        owner=str(held.owner) if held is not None and lives else "",
        **_figures(state, epochs, told, last),
    )


def _state(
    folder: str, outcome: dict[str, Any], held: Holder | None, lives: bool, newest: tuple[int, Before] | None
) -> tuple[State, str]:
    """The state, and why it is a bad one."""
    status, message = str(outcome.get("status", "")), str(outcome.get("message", ""))
    if status == "finished" and commit.is_complete(final_of(folder)):
        return "finished", ""
    if held is not None and lives:
        return _live(held, newest), ""
    if held is not None and not held.released:
        return "lost", f"its driver died without releasing its lease ({held.owner}); rerun the same command to resume"
    # An outcome counts when it is that of the last attempt: an earlier one was overtaken.
    if status and (newest is None or outcome.get("attempt") == newest[0]):
        return ("stopped", "") if status in ("stopped", "finished") else ("failed", f"{status}: {message}")
    if newest is None or newest[1].orderly or (held is not None and held.asked_to_stop):
        return "stopped", ""
    return "failed", cause(newest[1])


def _live(held: Holder, newest: tuple[int, Before] | None) -> State:
    if held.asked_to_stop:
        return "stopping"
    since = held.owner.since
    if newest is None or newest[1].ended < since:
        return "starting" if time.time() - since < START_SECONDS else "waiting"
    before = newest[1]
    if before.failure is not None or before.stalled or (before.last is not None and before.last.kind == "crashed"):
        return "restarting"
    if before.orderly:
        return "stopping"  # its driver is about to end, too
    if before.last is None:
        return "starting" if newest[0] == 1 or before.began - since < START_SECONDS else "restarting"
    return "running"


def _figures(state: State, epochs: int | None, told: Glance, last: Before | None) -> dict[str, Any]:
    """What the journal says of progress; speed and time left only of a run that makes progress."""
    figures = NOTHING if told.epoch is None else of_epoch(told.epoch)
    size = _size(told)
    samples = max([0, *(event.samples or 0 for event in (told.last, told.epoch) if event is not None)])
    if state == "running" and last is not None:
        samples = last.samples
    point = told.points[-1] if told.points else None
    found: dict[str, Any] = {
        "samples": samples if told.last is not None else None,
        "epoch": samples / size if size else (float(figures.epoch) if told.epoch is not None else None),
        "loss": loss_of(point) if point is not None else figures.loss,
        "top1_error": figures.top1_error,
        "top5_error": figures.top5_error,
        "images_per_second": figures.images_per_second,
        "goodput": figures.goodput,
    }
    if state == "running":
        found["images_per_second"] = _speed(told.points) or figures.images_per_second
        found["seconds_left"] = _seconds_left(epochs, size, samples, told.started, last)
    return found


def _speed(points: Sequence[Event]) -> float | None:
    """Images a second between the points at hand of the loss curve, the pauses between epochs left out."""
    moments = [(event.time, event.samples or 0) for event in points if event.kind == "metrics"]
    if len(moments) < 2:
        return None
    (began, before), (ended, after) = moments[0], moments[-1]
    return (after - before) / (ended - began) if ended > began and after > before else None


def _seconds_left(
    epochs: int | None, size: float | None, samples: int, started: Event | None, last: Before | None
) -> float | None:
    """From the speed of this attempt, validations included."""
    if not epochs or not size or started is None or last is None:
        return None
    seconds, done = last.ended - started.time, samples - (started.samples or 0)
    return max(0.0, epochs * size - samples) * seconds / done if done > 0 and seconds > 0 else None


def _size(told: Glance) -> float | None:
    """Samples of an epoch."""
    size: float | None = whole(told.started.values.get("samples_per_epoch")) if told.started is not None else None
    if not size and told.epoch is not None and (ended := of_epoch(told.epoch).epoch):
        size = (told.epoch.samples or 0) / ended
    return size or None


def _saved(folder: str) -> tuple[int | None, float | None]:
    """Samples of the newest checkpoint that counts, and its age in seconds if it says when it was written."""
    void = attempts.void(folder)
    for place in places(checkpoints_of(folder)):
        if void(place) is not None:
            continue
        try:
            written = number(commit.about(place.url).get("time"))
        except (FileNotFoundError, commit.CommitError):
            continue
        return place.samples, None if written is None else max(0.0, time.time() - written)
    return None, None


def _of(spec: dict[str, Any], part: str, field: str) -> object:
    found = spec.get(part)
    return found.get(field) if isinstance(found, dict) else None
