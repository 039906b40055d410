"""The lookup of finished runs as members of an ensemble, and of the data that they are scored on."""

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
    """Finished runs, and the names of requested runs that are not finished."""

    runs: tuple[RunSpec, ...]
    unfinished: tuple[str, ...] = ()


def find_runs(
    storage: str, names: Sequence[str], field: str, members: Sequence[int] = (), partial: bool = False
) -> FinishedRuns:
    """Return the finished runs of these names, ensembles replaced by their members, in order.

    names: of runs or ensembles in `storage`, or absolute paths or URLs of their folders. field: of the command line,
    for messages. members: only those of these numbers, from 1. partial: leave out unfinished runs, unless all are.
    Raises ConfigError for an unknown name or number, an unfinished run, and a run that is named twice.
    """
    folders: list[str] = []
    for name in names:
        for folder in _find_run_folders(storage, name, field):
            if folder in folders:
                raise ConfigError(f"{field}: {urls.get_basename(folder)}: is given twice; give each model once")
            folders.append(folder)
    requested = select_members(folders, members)
    done = [folder for folder in requested if load_finished_outcome(folder) is not None]
    unfinished = [folder for folder in requested if folder not in done]
    if unfinished and not (partial and done):
        _load_spec(storage, unfinished[0], field)  # a missing run has its own error
        raise ConfigError(f"{field}: {urls.get_basename(unfinished[0])}: is not finished; submit its training again")
    specs = tuple(_load_spec(storage, folder, field) for folder in done)
    return FinishedRuns(specs, tuple(urls.get_basename(folder) for folder in unfinished))


def select_members(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return the runs of these numbers, from 1; without numbers all. Raises ConfigError."""
    if repeated := [number for number in numbers if numbers.count(number) > 1]:
        raise ConfigError(f"members: {repeated[0]} is given twice; give each model once")
    if unknown := [number for number in numbers if not 1 <= number <= len(names)]:
        raise ConfigError(f"members: must be from 1 to {len(names)}, got {unknown[0]}; give the number of a model")
    return [names[number - 1] for number in numbers] if numbers else list(names)


def resolve_dataset(specs: Sequence[RunSpec], destination: Destination) -> Destination:
    """Return the destination with the dataset of the runs, unless it names another one.

    Raises ConfigError when the runs had several datasets, or when theirs has moved.
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
    url = first.destination.data
    if url == file_io.join(first.destination.storage, "data", EMBEDDED_DATASET):
        return destination.model_copy(update={"data": EMBEDDED_DATASET})
    shown, fix = redaction.redact(url), f"set --data to where the dataset of {first.name} is now"
    try:
        digest = manifest.load(url, allow_elsewhere=destination.allow_elsewhere).digest()
    except (DataError, OSError) as error:
        raise ConfigError(
            f"data: {shown}: {first.name} was trained on it, and it cannot be read: {error}; {fix}"
        ) from None
    if digest != first.dataset_digest:
        raise ConfigError(
            f"data: {shown}: is dataset {digest}, {first.name} was trained on {first.dataset_digest}; {fix}, or "
            f"to {shown} to score it on that"
        )
    return destination.model_copy(update={"data": url})


def adapt_to_session(session: Session, spec: RunSpec, field: str, other_data: bool = False) -> RunSpec:
    """Return a stored run with this session's data and hardware, in its own storage.

    other_data: the session's dataset may differ from the run's, but not in its classes. Raises ConfigError.
    """
    if spec.dataset_digest != session.manifest.digest():
        if not other_data:
            raise ConfigError(f"{field}: {spec.name}: was trained on another dataset; give that one with --data")
        _check_classes(session, spec, field)
    destination = session.destination.model_copy(update={"storage": spec.destination.storage})
    return spec.model_copy(update={"destination": destination, "placement": session.placement})


def _check_classes(session: Session, spec: RunSpec, field: str) -> None:
    """Raise ConfigError when a run has other classes than the session's dataset."""
    classes, others = checkpoint_dir.read_class_names(get_final_weights_dir(spec.folder)), session.manifest.classes
    if classes is None or classes == others:  # None: the scoring tasks check
        return
    number = next((index for index, pair in enumerate(zip(classes, others, strict=False)) if pair[0] != pair[1]), None)
    detail = "" if number is None else f"; class {number} is {classes[number]!r} there, {others[number]!r} here"
    raise ConfigError(
        f"{field}: {spec.name}: has {len(classes)} classes, data {redaction.redact(session.destination.data)} has "
        f"{len(others)}{detail}; set --data to a dataset with the same classes in the same order"
    )


def _find_run_folders(storage: str, name: str, field: str) -> list[str]:
    """Return the folders of the runs that a name, URL or path means."""
    if "/" in name:
        (run,) = run_lookup.find_runs([name], storage, field)
        if run.is_sweep:
            raise ConfigError(f"{field}: {redaction.redact(name)}: is a sweep; give the folder of one of its runs")
        run.check_members(field)
        return [run.folder] if run.members is None else list(run.members)
    try:
        return run_lookup.load_member_folders(file_io.join(storage, run_lookup.ENSEMBLES, name))
    except FileNotFoundError:
        return [file_io.join(storage, MODELS, name)]


def _load_spec(storage: str, folder: str, field: str) -> RunSpec:
    """Return the spec of the run in a folder, with the storage where it is now."""
    name = urls.get_basename(folder)
    try:
        spec = load_run_spec(folder)
    except FileNotFoundError:
        names = [file_io.list_names(file_io.join(storage, kind)) for kind in (run_lookup.ENSEMBLES, MODELS)]
        known, shown = ", ".join([*names[0], *names[1]]) or "none", redaction.redact(storage)
        raise ConfigError(f"{field}: {name!r}: no such run or ensemble in {shown}; known: {known}") from None
    parent, _, kind = folder.rpartition("/")[0].rpartition("/")
    if kind != MODELS or spec.name != name:
        raise ConfigError(
            f"{field}: {redaction.redact(folder)}: holds the run {spec.name}; its folder must be "
            f".../{MODELS}/{spec.name}"
        )
    places = {"storage": parent, "data": run_lookup.resolve_dataset_url(spec.to_dict(), folder)}
    return spec.model_copy(update={"destination": spec.destination.model_copy(update=places)})
