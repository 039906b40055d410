"""Runs, ensembles and sweeps in storage, by name or by the URL of their folder. Importable without ray or torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.config.errors import ConfigError, show, suggestion
from orchestrator.config.json_text import parse_object
from orchestrator.launch.config import EMBEDDED, Destination
from orchestrator.storage import faults, files, urls
from orchestrator.storage.files import StorageError

MODELS, ENSEMBLES, SWEEPS = "models", "ensembles", "sweeps"
SPEC = "ensemble.json"  # what an ensemble is made of
SCORING = "scoring.json"  # how far its scoring is, while its driver scores
TRAINED, EVALUATED = "train_ensemble", "evaluate"  # what made it, in SPEC
SWEEP, TRIALS = "sweep.json", "trials"  # what a sweep looks for; the folder of what its trials are and how they ended
_READERS = 8


@dataclass(frozen=True)
class Named:
    """A run, a sweep, or an ensemble with the folders of its members, which need not be there yet."""

    folder: str
    members: tuple[str, ...] | None = None  # None: no ensemble
    sweep: bool = False
    trouble: str = ""  # why the record of an ensemble cannot be read; it names the file

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return urls.name(self.folder)

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders that may have a lease: its own, then those of its members."""
        return (self.folder, *(self.members or ()))

    def check_members(self, field: str) -> None:
        """Raise ConfigError for an ensemble whose members are not known."""
        if self.trouble:
            raise ConfigError(f"{field}: {self.trouble}")
        if self.members == ():
            raise ConfigError(f"{field}: {urls.redact(files.join(self.folder, SPEC))}: must have members, got none")


def storage_of(storage: str) -> str:
    """The URL of the storage that was asked for, or of the default one. Raises ConfigError."""
    # Only the storage is of interest: the other two would be refused if they were missing.
    return Destination(data=EMBEDDED, storage=storage, tracking="none").resolved().storage


def folder_of(name: str, storage: str) -> str:
    """The URL of the folder of the run of that name, or at that URL. Raises ConfigError for a relative path."""
    return _absolute(name) if "/" in name else files.join(storage_of(storage), MODELS, name)


def dataset_of(spec: Mapping[str, Any], folder: str) -> str:
    """The URL of the dataset of the run in a folder, by its spec; one that lies in the run's storage moves with it.

    Raises KeyError, TypeError or AttributeError for a spec that does not say.
    """
    destination = spec["destination"]
    data, place = str(destination["data"]), str(destination.get("storage", ""))
    before, now = files.join(place, MODELS, urls.name(folder)).split("/"), folder.rstrip("/").split("/")
    while before and now and before[-1] == now[-1]:
        before.pop()
        now.pop()
    old, new = "/".join(before), "/".join(now)
    if not old or not data.startswith(f"{old}/") or files.exists(files.join(data, "manifest.json")):
        return data
    return new + data[len(old) :]


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
    """The ensemble in a folder, without members but with the trouble when its record cannot be read; else None."""
    try:
        members = members_of(folder)
    except FileNotFoundError:
        return None
    except (ConfigError, StorageError) as error:
        if isinstance(error, StorageError) and not faults.is_of_one_object(error):
            raise
        return Named(folder, (), trouble=str(error))
    return Named(folder, tuple(members))


def members_of(folder: str) -> list[str]:
    """Return the folders of the members of the ensemble in a folder: runs of the same storage, or `elsewhere`.

    The record's author may be another user of the storage. Unlike a manifest's tars, these places need no flag: jobs
    open only the files of a run there, by their fixed names, and a place must be the folder of the run of that name in
    a store that can hold runs. Raises FileNotFoundError; ConfigError, naming the file, for a damaged record.
    """
    url = files.join(folder, SPEC)
    try:
        record = parse_object(files.read_bytes(url))
    except ValueError as error:
        raise ConfigError(f"{urls.redact(url)}: cannot be read: {error}") from None
    members, elsewhere = record.get("members"), record.get("elsewhere", {})
    if not isinstance(members, list) or not all(_is_name(name) for name in members):
        raise ConfigError(f"{urls.redact(url)}: cannot be read: its members must be names of runs, got {show(members)}")
    if not isinstance(elsewhere, dict) or not all(_is_run(*item) for item in elsewhere.items()):
        raise ConfigError(
            f"{urls.redact(url)}: cannot be read: elsewhere must be folders of runs by name, such as "
            f"s3://bucket/runs/{MODELS}/NAME, got {urls.redact(show(elsewhere))}"
        )
    models = files.join(folder.rpartition("/")[0].rpartition("/")[0], MODELS)
    return [elsewhere.get(name) or files.join(models, name) for name in members]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value


def _is_run(name: str, place: object) -> bool:
    """Return whether a place is a run's folder of that name: absolute, and not on a web server."""
    if not isinstance(place, str) or urls.is_web(place) or not place.endswith(f"/{MODELS}/{name}"):
        return False
    try:
        return _is_name(name) and urls.absolute(place, name) == place
    except ValueError:
        return False


def below(storage: str, kind: str) -> list[str]:
    """URLs of the folders of that kind in a storage, in the order of their names."""
    place = files.join(storage, kind)
    return [files.join(place, name) for name in files.list_names(place)]


def _absolute(url: str, field: str = "runs") -> str:
    try:
        return urls.absolute(url, field).rstrip("/")
    except ValueError as error:
        raise ConfigError(str(error)) from None
