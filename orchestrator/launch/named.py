"""Runs, ensembles and sweeps in storage, by name or by the URL of their folder. Importable without ray or torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.config.errors import ConfigError, suggestion
from orchestrator.launch.config import EMBEDDED, Destination
from orchestrator.storage import files, urls

MODELS, ENSEMBLES, SWEEPS = "models", "ensembles", "sweeps"
SPEC = "ensemble.json"  # what an ensemble is made of
TRAINED, EVALUATED = "train_ensemble", "evaluate"  # what made it, in SPEC
SWEEP, TRIALS = "sweep.json", "trials"  # what a sweep looks for; the folder of what its trials are and how they ended
_READERS = 8


@dataclass(frozen=True)
class Named:
    """A run, a sweep, or an ensemble with the folders of its members, which need not be there yet."""

    folder: str
    members: tuple[str, ...] | None = None  # None: no ensemble
    sweep: bool = False

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return urls.name(self.folder)

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders that may have a lease: its own, then those of its members."""
        return (self.folder, *(self.members or ()))


def storage_of(storage: str) -> str:
    """The URL of the storage that was asked for, or of the default one. Raises ConfigError."""
    # Only the storage is of interest: the other two would be refused if they were missing.
    return Destination(data=EMBEDDED, storage=storage, tracking="none").resolved().storage


def folder_of(name: str, storage: str) -> str:
    """The URL of the folder of the run of that name, or at that URL. Raises ConfigError for a relative path."""
    return _absolute(name) if "/" in name else files.join(storage_of(storage), MODELS, name)


def find(names: Sequence[str], storage: str, field: str = "runs") -> list[Named]:
    """What is meant by these names, each once. Raises ConfigError, with near misses, for one that is not there.

    field: of the command line, for messages.
    """
    place = "" if all("/" in name for name in names) else storage_of(storage)
    found = {one.folder: one for one in (_found(name, place, field) for name in names)}
    return list(found.values())


def everything(storage: str) -> list[Named]:
    """All ensembles in storage, then its sweeps, then the runs that are no member of an ensemble.

    Raises ConfigError for a bad URL.
    """
    place = storage_of(storage)
    ensembles = below(place, ENSEMBLES)
    with ThreadPoolExecutor(_READERS, "named") as pool:
        found = [one for one in pool.map(_ensemble, ensembles) if one is not None]
    taken = {folder for one in found for folder in one.members or ()}
    sweeps = [Named(folder, sweep=True) for folder in below(place, SWEEPS)]
    return [*found, *sweeps, *(Named(folder) for folder in below(place, MODELS) if folder not in taken)]


def _found(name: str, storage: str, field: str) -> Named:
    if "/" in name:
        folder = _absolute(name, field)
        one = _ensemble(folder) or _alone(folder)
        parent = folder.rpartition("/")[0]
        known = files.list_names(parent) if one is None else []
    else:
        one = _ensemble(files.join(storage, ENSEMBLES, name))
        parent, places = storage, [files.join(storage, kind, name) for kind in (MODELS, SWEEPS)]
        if one is None:
            one = next((found for folder in places if (found := _alone(folder)) is not None), None)
        kinds = (ENSEMBLES, MODELS, SWEEPS)
        known = [] if one else [urls.name(each) for kind in kinds for each in below(storage, kind)]
    if one is None:
        near = suggestion(name.rstrip("/").rpartition("/")[2], known, "runs")
        raise ConfigError(
            f"{field}: {urls.redact(name)!r}: no such run, ensemble or sweep in {urls.redact(parent)}"
            f"{near or '; there are none'}; another storage is given with --storage"
        )
    return one


def _alone(folder: str) -> Named | None:
    """The run or sweep in a folder; None when there is nothing."""
    names = files.list_names(folder)
    return Named(folder, sweep=SWEEP in names) if names else None


def _ensemble(folder: str) -> Named | None:
    """The ensemble in a folder; None when it holds none that can be read."""
    members = members_of(folder)
    return None if members is None else Named(folder, members)


def members_of(folder: str) -> tuple[str, ...] | None:
    """Return the folders of the members of the ensemble in a folder; None when it holds none that can be read."""
    try:
        members = json.loads(files.read_bytes(files.join(folder, SPEC)))["members"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return tuple(member_folder(folder, str(name)) for name in members)


def member_folder(ensemble: str, member: str) -> str:
    """Return the URL of the folder of an ensemble's member: a run of the same storage, or one at a URL."""
    storage = ensemble.rpartition("/")[0].rpartition("/")[0]
    return member if "/" in member else files.join(storage, MODELS, member)


def below(storage: str, kind: str) -> list[str]:
    """URLs of the folders of that kind in a storage, in the order of their names."""
    place = files.join(storage, kind)
    return [files.join(place, name) for name in files.list_names(place)]


def _absolute(url: str, field: str = "runs") -> str:
    try:
        return urls.absolute(url, field).rstrip("/")
    except ValueError as error:
        raise ConfigError(str(error)) from None
