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

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.launch.named import TRIALS
from orchestrator.recipe.config import Recipe
from orchestrator.storage import files, urls
from orchestrator.tuning import history
from orchestrator.tuning.trials import State, Trial

C = TypeVar("C", bound=Config)

_RECORD = re.compile(r"^(\d{4,})\.json$")
_READERS = 8


class LedgerError(ConfigError):
    """The ledger of a sweep cannot be used; the message names the file."""


class Origin(Config):
    """Where a trial's first epochs come from: it shares them with another one, and takes over its weights."""

    trial: int = Field(ge=1)
    samples: int = Field(ge=1, description="of the checkpoint that is taken over")
    epoch: int = Field(ge=1)


class Record(Config):
    """What a trial is."""

    number: int = Field(ge=1)
    assignment: dict[str, Any]
    recipe: Recipe
    origin: Origin | None = None
    replaces: int | None = Field(None, ge=1, description="the trial whose place in a population it takes")

    @property
    def shared(self) -> int:
        """Epochs that it was not trained for itself."""
        return 0 if self.origin is None else self.origin.epoch


class End(Config):
    """How a trial ended for good."""

    state: State
    reason: str = ""


@dataclass(frozen=True)
class Entry:
    """A trial as the ledger has it."""

    record: Record
    trial: Trial


class Ledger:
    """The trials of the sweep in one folder."""

    def __init__(self, sweep: str) -> None:
        """sweep: URL of the sweep's folder."""
        self._folder = files.join(sweep, TRIALS)

    def add(self, record: Record) -> None:
        """Write what a trial is. Raises LedgerError when another driver has written one of that number."""
        if not files.create_bytes(self._url(record.number), record.to_json().encode()):
            raise LedgerError(
                f"{urls.redact(self._url(record.number))}: is there already: another driver runs this sweep; stop it, "
                "or wait for it"
            )

    def end(self, number: int, end: End) -> None:
        """Write how a trial ended."""
        files.write_bytes(self._url(number, ".ended"), end.to_json().encode())

    def read(self, folder_of: Callable[[Recipe], str]) -> list[Entry]:
        """All trials in the order of their numbers, with what their runs have reported.

        folder_of: the URL of a recipe's run. Raises LedgerError for a record that cannot be read, or a gap.
        """
        names = set(files.list_names(self._folder))
        numbers = sorted(int(match[1]) for name in names if (match := _RECORD.match(name)))
        if numbers != list(range(1, len(numbers) + 1)):
            missing = next(n for n in range(1, len(numbers) + 1) if n not in numbers)
            raise LedgerError(f"{urls.redact(self._url(missing))}: is not there, though later trials are")

        def entry(number: int) -> Entry:
            record = self._read(Record, number)
            ended = f"{number:04d}.ended.json" in names
            end = self._read(End, number, ".ended") if ended else End(state="waiting")
            epochs = history.read(folder_of(record.recipe))
            trial = Trial(number, record.assignment, record.recipe, end.state, end.reason, epochs, record.shared)
            return Entry(record, trial)

        with ThreadPoolExecutor(_READERS, "ledger") as pool:
            return list(pool.map(entry, numbers))

    def _read(self, form: type[C], number: int, kind: str = "") -> C:
        url = self._url(number, kind)
        try:
            return form.from_record(files.read_bytes(url))
        except ValueError as error:
            raise LedgerError(f"{urls.redact(url)}: cannot be read: {error}; begin anew with --new") from None

    def _url(self, number: int, kind: str = "") -> str:
        return files.join(self._folder, f"{number:04d}{kind}.json")


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Those that ended, then those that are to go on: a scheduler should know what there is before it decides."""
    return sorted(entries, key=lambda entry: (not entry.trial.done, entry.record.number))
