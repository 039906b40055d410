"""The trials of a sweep in storage, so that a sweep whose driver died goes on. Importable without torch or ray.

SWEEP/trials/0007.json is what trial 7 is, written once, by conditional create, before anything of it runs;
SWEEP/trials/0007.ended.json how it ended, for ends that are final. What it reported is in its run's own journal.
Ray's records of a sweep are never read.
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
    """The ledger of a sweep cannot be used; the message names the file."""


class TrialRecord(Config):
    """What a trial is."""

    number: int = Field(ge=1)
    assignment: dict[str, Any]
    recipe: Recipe


class TrialEnd(Config):
    """How a trial ended for good."""

    state: State
    reason: str = ""


@dataclass(frozen=True)
class StoredTrial:
    """A trial as the ledger has it."""

    record: TrialRecord
    trial: Trial


class TrialStore:
    """The trials of the sweep in one folder."""

    def __init__(self, sweep: str) -> None:
        """sweep: URL of the sweep's folder."""
        self._folder = file_io.join(sweep, TRIALS)

    def add_trial(self, record: TrialRecord) -> None:
        """Write what a trial is. Raises LedgerError when another driver has written one of that number."""
        if not file_io.create_bytes(self._url(record.number), record.to_json().encode()):
            raise TrialStoreError(
                f"{redaction.redact(self._url(record.number))}: is there already: another driver runs this "
                "sweep; stop it, "
                "or wait for it"
            )

    def write_end(self, number: int, end: TrialEnd) -> None:
        """Write how a trial ended."""
        file_io.write_bytes(self._url(number, ".ended"), end.to_json().encode())

    def load_trials(self, folder_of: Callable[[Recipe], str]) -> list[StoredTrial]:
        """All trials in the order of their numbers, with what their runs have reported.

        folder_of: the URL of a recipe's run. Raises LedgerError for a record that cannot be read, or a gap.
        """
        names = set(file_io.list_names(self._folder))
        numbers = sorted(int(match[1]) for name in names if (match := _RECORD_NAME.match(name)))
        if numbers != list(range(1, len(numbers) + 1)):
            missing = next(n for n in range(1, len(numbers) + 1) if n not in numbers)
            raise TrialStoreError(f"{redaction.redact(self._url(missing))}: is not there, though later trials are")

        def entry(number: int) -> StoredTrial:
            record = self._read_config(TrialRecord, number)
            ended = f"{number:04d}.ended.json" in names
            end = self._read_config(TrialEnd, number, ".ended") if ended else TrialEnd(state="waiting")
            epochs = trial_history.read_epochs(folder_of(record.recipe))
            trial = Trial(number, record.assignment, record.recipe, end.state, end.reason, epochs)
            return StoredTrial(record, trial)

        with ThreadPoolExecutor(_READ_THREADS, "ledger") as pool:
            return list(pool.map(entry, numbers))

    def _read_config(self, form: type[ConfigT], number: int, kind: str = "") -> ConfigT:
        url = self._url(number, kind)
        try:
            return form.from_record(file_io.read_bytes(url))
        except ValueError as error:
            raise TrialStoreError(f"{redaction.redact(url)}: cannot be read: {error}; begin anew with --new") from None

    def _url(self, number: int, kind: str = "") -> str:
        return file_io.join(self._folder, f"{number:04d}{kind}.json")


def sort_for_resume(entries: Iterable[StoredTrial]) -> list[StoredTrial]:
    """Those that ended, then those that are to go on: a scheduler should know what there is before it decides."""
    return sorted(entries, key=lambda entry: (not entry.trial.is_terminal, entry.record.number))
