"""Finished runs by name, URL or path, as members of an ensemble, and the data that they are scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.data.data_errors import DataError
from orchestrator.ray_backend import run_lookup
from orchestrator.ray_backend.run_lookup import MODELS
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination, RunSpec, load_run_spec
from orchestrator.ray_backend.session import Session
from orchestrator.storage import file_io, urls
from orchestrator.training.run_dir import get_final_weights_dir, load_finished_outcome


@dataclass(frozen=True)
class FinishedRuns:
    """Runs that are trained to their end, and the names of those that are not."""

    runs: tuple[RunSpec, ...]
    unfinished: tuple[str, ...] = ()


def find_runs(
    storage: str, names: Sequence[str], field: str, members: Sequence[int] = (), partial: bool = False
) -> FinishedRuns:
    """The finished runs of these names, ensembles replaced by their members, in order.

    names: of runs or ensembles in `storage`, or absolute paths or URLs of their folders. field: of the command line,
    for messages. members: only those of these numbers, from 1. partial: leave out what is not trained to its end, as
    long as anything is. Raises ConfigError for a name that is not there, a run that is not trained to its end, a number
    that no run has, and for anything that is given twice.
    """
    found: list[str] = []
    for name in names:
        for folder in _find_run_folders(storage, name, field):
            if folder in found:
                raise ConfigError(f"{field}: {urls.get_basename(folder)}: is given twice; give each model once")
            found.append(folder)
    asked = select_members(found, members)
    done = [folder for folder in asked if load_finished_outcome(folder) is not None]
    unfinished = [folder for folder in asked if folder not in done]
    for folder in unfinished:
        if not partial or not done:
            _load_spec(storage, folder, field)  # one that is not there is told so
            raise ConfigError(
                f"{field}: {urls.get_basename(folder)}: is not trained to its end; submit its training again"
            )
    specs = tuple(_load_spec(storage, folder, field) for folder in done)
    return FinishedRuns(specs, tuple(urls.get_basename(folder) for folder in unfinished))


def select_members(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """The runs of these numbers, from 1; all of them without any. Raises ConfigError."""
    if twice := [number for number in numbers if numbers.count(number) > 1]:
        raise ConfigError(f"members: {twice[0]} is given twice; give each model once")
    if wrong := [number for number in numbers if not 1 <= number <= len(names)]:
        raise ConfigError(f"members: {wrong[0]} is refused: there are models 1 to {len(names)}")
    return [names[number - 1] for number in numbers] if numbers else list(names)


def resolve_dataset(specs: Sequence[RunSpec], destination: Destination) -> Destination:
    """Return the destination with the dataset that the runs were trained on, where it names none.

    Raises ConfigError when the runs had several, or when theirs is not where it was.
    """
    if destination.data:
        return destination
    first = specs[0]
    for spec in specs:
        if spec.dataset_digest != first.dataset_digest:
            raise ConfigError(
                f"data: {first.name} and {spec.name} were trained on different datasets ({first.dataset_digest}, "
                f"{spec.dataset_digest}); set --data to the one to score them on"
            )
    place = first.destination.data
    if place == file_io.join(first.destination.storage, "data", EMBEDDED_DATASET):
        return destination.model_copy(update={"data": EMBEDDED_DATASET})
    shown, fix = redaction.redact(place), f"set --data to where the dataset of {first.name} lies now"
    try:
        there = manifest.load(place, allow_elsewhere=destination.allow_elsewhere).digest()
    except (DataError, OSError) as error:
        raise ConfigError(
            f"data: {shown}: {first.name} was trained on it, and it cannot be read: {error}; {fix}"
        ) from None
    if there != first.dataset_digest:
        raise ConfigError(
            f"data: {shown}: is dataset {there}, {first.name} was trained on {first.dataset_digest}; {fix}, or "
            f"to {shown} to score it on that"
        )
    return destination.model_copy(update={"data": place})


def adapt_to_session(session: Session, spec: RunSpec, field: str, other_data: bool = False) -> RunSpec:
    """A stored run on this session's data and hardware, in its own storage.

    other_data: the session's dataset may be another one than the run's, of the same classes. Raises ConfigError.
    """
    if spec.dataset_digest != session.manifest.digest():
        if not other_data:
            raise ConfigError(f"{field}: {spec.name}: was trained on another dataset; give that one with --data")
        _check_classes(session, spec, field)
    destination = session.destination.model_copy(update={"storage": spec.destination.storage})
    return spec.model_copy(update={"destination": destination, "placement": session.placement})


def _check_classes(session: Session, spec: RunSpec, field: str) -> None:
    """Raise ConfigError when a run knows other classes than the session's dataset has."""
    classes, there = checkpoint_dir.read_class_names(get_final_weights_dir(spec.folder)), session.manifest.classes
    if classes is None or classes == there:  # None: the tasks find out
        return
    number = next((one for one, pair in enumerate(zip(classes, there, strict=False)) if pair[0] != pair[1]), None)
    told = "" if number is None else f"; class {number} is {classes[number]!r} there, {there[number]!r} here"
    raise ConfigError(
        f"{field}: {spec.name}: knows {len(classes)} classes, data {redaction.redact(session.destination.data)} has "
        f"{len(there)}{told}; set --data to a dataset with the same classes in the same order"
    )


def _find_run_folders(storage: str, name: str, field: str) -> list[str]:
    """Return the folders of the runs that a name, URL or path means."""
    if "/" in name:
        (found,) = run_lookup.find_runs([name], storage, field)
        if found.is_sweep:
            raise ConfigError(f"{field}: {redaction.redact(name)}: is a sweep; give the folder of one of its runs")
        found.check_members(field)
        return [found.folder] if found.members is None else list(found.members)
    try:
        return run_lookup.load_member_folders(file_io.join(storage, run_lookup.ENSEMBLES, name))
    except FileNotFoundError:
        return [file_io.join(storage, MODELS, name)]


def _load_spec(storage: str, folder: str, field: str) -> RunSpec:
    """Return what the run in a folder is, in the storage where it lies."""
    name = urls.get_basename(folder)
    try:
        spec = load_run_spec(folder)
    except FileNotFoundError:
        there = file_io.list_names(file_io.join(storage, run_lookup.ENSEMBLES)) + file_io.list_names(
            file_io.join(storage, MODELS)
        )
        known = ", ".join(there) or "none"
        shown = redaction.redact(storage)
        raise ConfigError(f"{field}: {name!r}: no such run or ensemble in {shown}; there are: {known}") from None
    above, _, kind = folder.rpartition("/")[0].rpartition("/")
    if kind != MODELS or spec.name != name:
        raise ConfigError(
            f"{field}: {redaction.redact(folder)}: holds the run {spec.name}; its folder must be "
            f".../{MODELS}/{spec.name}"
        )
    places_now = {"storage": above, "data": run_lookup.resolve_dataset_url(spec.to_dict(), folder)}
    return spec.model_copy(update={"destination": spec.destination.model_copy(update=places_now)})
