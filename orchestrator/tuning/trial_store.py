"""The trials of a sweep in storage, from which a sweep resumes. Importable without torch or ray.

SWEEP/trials/0007.json defines trial 7. It is written once, by conditional create, before anything of the trial runs.
SWEEP/trials/0007.ended.json says how it ended, once that is final. What it reported is in its run's own journal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import Field

from orchestrator.config import redaction
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend.run_lookup import TRIALS
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io
from orchestrator.tracking import journal
from orchestrator.tracking.events import Event
from orchestrator.training.run_dir import get_journal_dir
from orchestrator.tuning.trial import EpochResult, State, Trial

_RECORD_NAME = re.compile(r"^(\d{4,})\.json$")
_READ_THREADS = 8


class TrialStoreError(ConfigError):
    """The stored trials of a sweep cannot be used; the message names the file."""


class _TrialRecord(Config):
    number: int = Field(ge=1)
    assignment: dict[str, Any]
    recipe: Recipe


class _TrialEnd(Config):
    state: State
    reason: str = ""


def add_trial(sweep: str, trial: Trial) -> None:
    """Write the definition of a trial. Raises TrialStoreError when another driver wrote one of that number."""
    url = _get_url(sweep, trial.number)
    record = _TrialRecord(number=trial.number, assignment=dict(trial.assignment), recipe=trial.recipe)
    if not file_io.create_bytes(url, record.to_json().encode()):
        raise TrialStoreError(
            f"{redaction.redact(url)}: exists already: another driver runs this sweep; stop it, or wait for it"
        )


def write_end(sweep: str, trial: Trial) -> None:
    """Write how a trial ended."""
    end = _TrialEnd(state=trial.state, reason=trial.reason)
    file_io.write_bytes(_get_url(sweep, trial.number, ".ended"), end.to_json().encode())


def load_trials(sweep: str, get_folder: Callable[[Recipe], str]) -> list[Trial]:
    """Return all trials of the sweep in a folder by their numbers, with what their runs have reported.

    get_folder: returns the URL of a recipe's run. Raises TrialStoreError for an unreadable record or a gap.
    """
    names = set(file_io.list_names(file_io.join(sweep, TRIALS)))
    numbers = sorted(int(match[1]) for name in names if (match := _RECORD_NAME.match(name)))
    if missing := sorted(set(range(1, len(numbers) + 1)) - set(numbers)):
        url = redaction.redact(_get_url(sweep, missing[0]))
        raise TrialStoreError(f"{url}: is missing, though later trials exist; restore it, or set --new")

    def load_trial(number: int) -> Trial:
        url, end = _get_url(sweep, number), _TrialEnd(state="waiting")
        try:
            record = _TrialRecord.from_record(file_io.read_bytes(url))
            if f"{number:04d}.ended.json" in names:
                url = _get_url(sweep, number, ".ended")
                end = _TrialEnd.from_record(file_io.read_bytes(url))
        except ValueError as error:
            shown = redaction.redact(url)
            raise TrialStoreError(f"{shown}: cannot be read: {error}; set --new to begin another sweep") from None
        epochs = read_epochs(get_folder(record.recipe))
        return Trial(number, record.assignment, record.recipe, end.state, end.reason, epochs)

    with ThreadPoolExecutor(_READ_THREADS, "trial-store") as pool:
        return list(pool.map(load_trial, numbers))


def _get_url(sweep: str, number: int, kind: str = "") -> str:
    return file_io.join(sweep, TRIALS, f"{number:04d}{kind}.json")


def read_epochs(folder: str) -> tuple[EpochResult, ...]:
    """Return the epochs that the run in `folder` has reported, ascending, each once. Storage errors pass through."""
    events: list[Event] = []
    cursor = None
    while True:
        try:
            new_events, cursor = journal.read_events(get_journal_dir(folder), cursor)
        except journal.DamagedSegmentError as error:
            cursor = error.cursor  # the trial can resume without the epochs of this segment
            continue
        if not new_events:
            return parse_epochs(events)
        events.extend(new_events)


def parse_epochs(events: Iterable[Event]) -> tuple[EpochResult, ...]:
    """Return the epochs of these events. An epoch trained again after a restart counts once, as reported last."""
    reported: dict[int, tuple[dict[str, float], int]] = {}
    for event in events:
        if event.kind == "epoch":
            values = {name: float(value) for name, value in event.values.items() if isinstance(value, int | float)}
            if math.isfinite(number := values.get("train/epoch", 0.0)):
                reported[int(number)] = values, event.samples or 0
    epochs: list[EpochResult] = []
    for number in sorted(reported):
        epochs.append(build_next_epoch(epochs[-1] if epochs else None, number, *reported[number]))
    return tuple(epochs)


def build_next_epoch(last: EpochResult | None, number: int, values: Mapping[str, float], samples: int) -> EpochResult:
    """Return the epoch of that number, after which the trial had seen `samples`.

    Its seconds are those of its steps: starts, validations and waits for a scheduler are no training.
    """
    speed = values.get("train/images_per_second", 0.0)
    steps = samples / max(1, number) / speed if speed > 0 else 0.0
    return EpochResult(number, values, (last.seconds if last is not None else 0.0) + steps, samples)
