"""The lookup of finished runs as members of an ensemble, and of the data that they are scored on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from orchestrator.checkpoint import checkpoint_dir
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.data.data_errors import DataError
from orchestrator.ensemble.members import select_members
from orchestrator.ray_backend import run_lookup
from orchestrator.ray_backend.run_lookup import MODELS
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination, RunSpec, load_run_spec
from orchestrator.ray_backend.session import Session
from orchestrator.storage import file_io, urls
from orchestrator.training.run_dir import get_final_weights_dir, load_finished_outcome


def find_runs(
    storage: str, names: Sequence[str], field: str, members: Sequence[int] = (), partial: bool = False
) -> tuple[tuple[RunSpec, ...], list[str]]:
    """Return the finished runs of these names, ensembles replaced by their members, in order; and unfinished names.

    names: of runs or ensembles in `storage`, or absolute paths or URLs of their folders. field: of the command line,
    for messages. members: only those of these numbers, from 1. partial: leave out unfinished runs, unless all are.
    Raises ConfigError for an unknown name or number, an unfinished run, and a run that is named twice.
    """
    folders = [folder for name in names for folder in _find_run_folders(storage, name, field)]
    runs = [urls.get_basename(folder) for folder in folders]
    if repeated := [run for run, count in Counter(runs).items() if count > 1]:
        raise ConfigError(f"{field}: {repeated[0]}: is given twice; give each model once")
    requested = [folders[number - 1] for number in select_members(len(folders), members)]
    done = [folder for folder in requested if load_finished_outcome(folder) is not None]
    unfinished = [folder for folder in requested if folder not in done]
    if unfinished and not (partial and done):
        _load_spec(storage, unfinished[0], field)  # a missing run has its own error
        raise ConfigError(f"{field}: {urls.get_basename(unfinished[0])}: is not finished; submit its training again")
    return tuple(_load_spec(storage, folder, field) for folder in done), list(map(urls.get_basename, unfinished))


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
    try:
        digest = manifest.load(url, allow_elsewhere=destination.allow_elsewhere).digest()
        problem = "" if digest == first.dataset_digest else f"it is dataset {digest} now, not {first.dataset_digest}"
    except (DataError, OSError) as error:
        problem = f"it cannot be read: {error}"
    if problem:
        raise ConfigError(
            f"data: {redaction.redact(url)}: {first.name} was trained on it, and {problem}; set --data to where its "
            "dataset is now, or to one with the same classes to score it on"
        )
    return destination.model_copy(update={"data": url})


def adapt_to_session(session: Session, spec: RunSpec, field: str, other_data: bool = False) -> RunSpec:
    """Return a stored run with this session's data and hardware, in its own storage.

    other_data: the session's dataset may differ from the run's, but not in its classes. Raises ConfigError.
    """
    if spec.dataset_digest != session.manifest.digest():
        if not other_data:
            raise ConfigError(f"{field}: {spec.name}: was trained on another dataset; give that one with --data")
        classes, others = checkpoint_dir.read_class_names(get_final_weights_dir(spec.folder)), session.manifest.classes
        if classes not in (None, others):  # None: the scoring tasks check
            differing = next(pair for pair in zip_longest(classes, others) if pair[0] != pair[1])
            raise ConfigError(
                f"{field}: {spec.name}: has {len(classes)} classes, data {redaction.redact(session.destination.data)} "
                f"has {len(others)}; the first that differs is {differing[0]!r} there, {differing[1]!r} here; set "
                "--data to a dataset with the same classes in the same order"
            )
    destination = session.destination.model_copy(update={"storage": spec.destination.storage})
    return spec.model_copy(update={"destination": destination, "placement": session.placement})


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
