"""The trials of a sweep in storage, from which a sweep resumes. Importable without torch or ray.

SWEEP/trials/0007.json defines trial 7. It is written once, by conditional create, before anything of the trial runs.
SWEEP/trials/0007.ended.json says how it ended, once that is final. What it reported is in its run's own journal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field

from orchestrator.config import redaction
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.ray_backend.run_lookup import TRIALS
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io
from orchestrator.tuning import trial_history
from orchestrator.tuning.trial import State, Trial

ConfigT = TypeVar("ConfigT", bound=Config)

_RECORD_NAME = re.compile(r"^(\d{4,})\.json$")
_READ_THREADS = 8


class TrialStoreError(ConfigError):
    """The stored trials of a sweep cannot be used; the message names the file."""


class TrialRecord(Config):
    """The definition of a trial."""

    number: int = Field(ge=1)
    assignment: dict[str, Any]
    recipe: Recipe


class TrialEnd(Config):
    """The final state of a trial."""

    state: State
    reason: str = ""


@dataclass(frozen=True)
class StoredTrial:
    """A trial as storage has it."""

    record: TrialRecord
    trial: Trial


class TrialStore:
    """The trials of the sweep in one folder."""

    def __init__(self, sweep: str) -> None:
        """Use the sweep's folder, a URL."""
        self._folder = file_io.join(sweep, TRIALS)

    def add_trial(self, record: TrialRecord) -> None:
        """Write the definition of a trial. Raises TrialStoreError when another driver wrote one of that number."""
        url = self._url(record.number)
        if not file_io.create_bytes(url, record.to_json().encode()):
            raise TrialStoreError(
                f"{redaction.redact(url)}: exists already: another driver runs this sweep; stop it, or wait for it"
            )

    def write_end(self, number: int, end: TrialEnd) -> None:
        """Write how a trial ended."""
        file_io.write_bytes(self._url(number, ".ended"), end.to_json().encode())

    def load_trials(self, get_folder: Callable[[Recipe], str]) -> list[StoredTrial]:
        """Return all trials in the order of their numbers, with what their runs have reported.

        get_folder: returns the URL of a recipe's run. Raises TrialStoreError for an unreadable record or a gap.
        """
        names = set(file_io.list_names(self._folder))
        numbers = sorted(int(match[1]) for name in names if (match := _RECORD_NAME.match(name)))
        if missing := sorted(set(range(1, len(numbers) + 1)) - set(numbers)):
            url = redaction.redact(self._url(missing[0]))
            raise TrialStoreError(f"{url}: is missing, though later trials exist; restore it, or set --new")

        def load_trial(number: int) -> StoredTrial:
            record = self._read_config(TrialRecord, number)
            has_ended = f"{number:04d}.ended.json" in names
            end = self._read_config(TrialEnd, number, ".ended") if has_ended else TrialEnd(state="waiting")
            epochs = trial_history.read_epochs(get_folder(record.recipe))
            return StoredTrial(record, Trial(number, record.assignment, record.recipe, end.state, end.reason, epochs))

        with ThreadPoolExecutor(_READ_THREADS, "trial-store") as pool:
            return list(pool.map(load_trial, numbers))

    def _read_config(self, form: type[ConfigT], number: int, kind: str = "") -> ConfigT:
        url = self._url(number, kind)
        try:
            return form.from_record(file_io.read_bytes(url))
        except ValueError as error:
            raise TrialStoreError(
                f"{redaction.redact(url)}: cannot be read: {error}; set --new to begin another sweep"
            ) from None

    def _url(self, number: int, kind: str = "") -> str:
        return file_io.join(self._folder, f"{number:04d}{kind}.json")


def sort_for_resume(entries: Iterable[StoredTrial]) -> list[StoredTrial]:
    """Return ended trials before resumable ones: the scheduler should know all results before it decides."""
    return sorted(entries, key=lambda entry: (not entry.trial.is_terminal, entry.record.number))
