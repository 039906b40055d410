"""Runs, ensembles and sweeps in storage, by name or by the URL of their folder. Importable without Ray or torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError, format_suggestion, format_value
from orchestrator.config.json_text import parse_object
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination, RunSpec, load_run_spec
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io, storage_errors, urls
from orchestrator.storage.file_io import StorageError

MODELS, ENSEMBLES, SWEEPS = "models", "ensembles", "sweeps"
ENSEMBLE_FILE = "ensemble.json"  # the members of an ensemble
SCORING_FILE = "scoring.json"  # progress of its scoring, while its driver scores
MADE_BY_TRAINING, MADE_BY_EVALUATION = "train_ensemble", "evaluate"  # the command that made it, in SPEC
SWEEP_FILE = "sweep.json"  # the plan of a sweep
TRIALS = "trials"  # the folder of its trials and of how they ended
_READER_THREADS = 8


@dataclass(frozen=True)
class RunEntry:
    """A run, a sweep, or an ensemble with the folders of its members, which need not be there yet."""

    folder: str
    members: tuple[str, ...] | None = None  # None: no ensemble
    is_sweep: bool = False
    error: str = ""  # why the record of an ensemble cannot be read; it names the file

    @property
    def name(self) -> str:
        """The last part of its folder."""
        return urls.get_basename(self.folder)

    def check_members(self, field: str) -> None:
        """Raise ConfigError for an ensemble whose members are not known."""
        if self.error:
            raise ConfigError(f"{field}: {self.error}")
        if self.members == ():
            raise ConfigError(
                f"{field}: {redaction.redact(file_io.join(self.folder, ENSEMBLE_FILE))}: must have members, got none"
            )


def resolve_storage(storage: str) -> str:
    """Return the URL of a storage, by default of the default one. Raises ConfigError."""
    # Data and tracking are given to pass their checks; only the storage is used.
    return Destination(data=EMBEDDED_DATASET, storage=storage, tracking="none").resolve().storage


def resolve_dataset_url(spec: Mapping[str, Any], folder: str) -> str:
    """Return the URL of the dataset of the run in a folder, by its spec; one in the run's storage moves with it.

    Raises KeyError, TypeError or AttributeError for a spec without it.
    """
    destination = spec["destination"]
    data, storage = str(destination["data"]), str(destination.get("storage", ""))
    before, now = file_io.join(storage, MODELS, urls.get_basename(folder)).split("/"), folder.rstrip("/").split("/")
    while before and now and before[-1] == now[-1]:
        before.pop()
        now.pop()
    old, new = "/".join(before), "/".join(now)
    if not old or not data.startswith(f"{old}/") or file_io.exists(file_io.join(data, "manifest.json")):
        return data
    return new + data[len(old) :]


def find_runs(names: Sequence[str], storage: str, field: str = "runs") -> list[RunEntry]:
    """Return the runs, ensembles and sweeps of these names, each once.

    field: of the command line, for messages. Raises ConfigError, with similar names, for one that does not exist.
    """
    storage = "" if all("/" in name for name in names) else resolve_storage(storage)
    entries = (_find_run(name, storage, field) for name in names)
    return list({entry.folder: entry for entry in entries}.values())


def list_all_runs(storage: str) -> list[RunEntry]:
    """Return all ensembles in storage, its sweeps, and the runs outside ensembles. Raises ConfigError for a bad URL."""
    storage = resolve_storage(storage)
    with ThreadPoolExecutor(_READER_THREADS, "run-lookup") as pool:
        ensembles = list(filter(None, pool.map(_read_ensemble, list_folders(storage, ENSEMBLES))))
    members = {folder for ensemble in ensembles for folder in ensemble.members or ()}
    sweeps = [RunEntry(folder, is_sweep=True) for folder in list_folders(storage, SWEEPS)]
    runs = [RunEntry(folder) for folder in list_folders(storage, MODELS) if folder not in members]
    return [*ensembles, *sweeps, *runs]


def _find_run(name: str, storage: str, field: str) -> RunEntry:
    if "/" in name:
        parent, _, base = urls.require_absolute(name, field).rstrip("/").rpartition("/")
        parents = [parent]
    else:
        parent, base, parents = storage, name, [file_io.join(storage, kind) for kind in (ENSEMBLES, MODELS, SWEEPS)]
    for url in parents:
        folder = file_io.join(url, base)
        if (ensemble := _read_ensemble(folder)) is not None:
            return ensemble
        if not url.endswith(f"/{ENSEMBLES}") and (names := file_io.list_names(folder)):
            return RunEntry(folder, is_sweep=SWEEP_FILE in names)
    near = format_suggestion(base, [known for url in parents for known in file_io.list_names(url)], "runs")
    raise ConfigError(
        f"{field}: {redaction.redact(name)!r}: no such run, ensemble or sweep in {redaction.redact(parent)}"
        f"{near or '; there are none'}; another storage is given with --storage"
    )


def _read_ensemble(folder: str) -> RunEntry | None:
    """Return the ensemble in a folder, with the error when its record cannot be read; None when it is no ensemble."""
    try:
        members = load_member_folders(folder)
    except FileNotFoundError:
        return None
    except (ConfigError, StorageError) as error:
        if isinstance(error, StorageError) and not storage_errors.is_object_specific(error):
            raise
        return RunEntry(folder, (), error=str(error))
    return RunEntry(folder, tuple(members))


def load_member_folders(folder: str) -> list[str]:
    """Return the folders of the members of the ensemble in a folder: runs of the same storage, or `elsewhere`.

    Another user of the storage may have written the record. Unlike a manifest's tars, these folders need no flag: jobs
    open only the files of a run there, by their fixed names, and each must be the folder of the run of that name in a
    store that can hold runs. Raises FileNotFoundError; ConfigError, naming the file, for a damaged record.
    """
    url = file_io.join(folder, ENSEMBLE_FILE)
    try:
        record = parse_object(file_io.read_bytes(url))
        members, elsewhere = record.get("members"), record.get("elsewhere", {})
        if not isinstance(members, list) or not all(_is_run_name(name) for name in members):
            raise ValueError(f"its members must be names of runs, got {format_value(members)}")
        if not isinstance(elsewhere, dict) or not all(_is_run(*item) for item in elsewhere.items()):
            raise ValueError(
                f"elsewhere must be folders of runs by name, such as s3://bucket/runs/{MODELS}/NAME, got "
                f"{redaction.redact(format_value(elsewhere))}"
            )
    except ValueError as error:
        raise ConfigError(f"{redaction.redact(url)}: cannot be read: {error}") from None
    models = file_io.join(folder.rpartition("/")[0].rpartition("/")[0], MODELS)
    return [elsewhere.get(name) or file_io.join(models, name) for name in members]


def _is_run_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value


def _is_run(name: str, url: object) -> bool:
    """Return whether a URL is a run's folder of that name: absolute, and not on a web server."""
    if not isinstance(url, str) or urls.is_web(url) or not url.endswith(f"/{MODELS}/{name}"):
        return False
    try:
        return _is_run_name(name) and urls.require_absolute(url, name) == url
    except ValueError:
        return False


def list_folders(storage: str, kind: str) -> list[str]:
    """Return the URLs of the folders of that kind in a storage, in the order of their names."""
    parent = file_io.join(storage, kind)
    return [file_io.join(parent, name) for name in file_io.list_names(parent)]


def match_code(specs: Sequence[RunSpec], same_code_anyway: bool, say: Callable[[str], None]) -> list[RunSpec]:
    """Return the runs; with `same_code_anyway` those that began with other code of their plug-ins in place of new ones.

    Either way `say` receives a line about each. Raises ConfigError when several runs differ in nothing but such code.
    """
    matched = []
    for spec in specs:
        others = _find_runs_of_other_code(spec) if spec.recipe.code else []
        known = {other.name: other.recipe for other in others}
        if known and choose_code(spec.name, spec.recipe, known, same_code_anyway, say):
            spec = spec.model_copy(update={"recipe": others[0].recipe})  # noqa: PLW2901
        matched.append(spec)
    return matched


def choose_code(
    name: str, recipe: Recipe, others: Mapping[str, Recipe], same_code_anyway: bool, say: Callable[[str], None]
) -> bool:
    """Return whether to resume the one that began with other code of its plug-ins; `say` receives a line about it.

    others: the runs or sweeps that differ from `name` in such code only. Raises ConfigError when several are to resume.
    """
    names, before = ", ".join(others), next(iter(others.values())).code
    changed = ", ".join(kind for kind in recipe.code if recipe.code[kind] != before.get(kind))
    if not same_code_anyway:
        say(
            f"{name}: the code of {changed} has changed since {names} began, so this is another one; "
            "--same-code-anyway resumes that one"
        )
    elif len(others) > 1:
        raise ConfigError(f"same_code_anyway: {names} differ in their code only; remove all but one of them")
    else:
        say(f"{names}: resumed, though the code of {changed} has changed since it began")
    return same_code_anyway


def _find_runs_of_other_code(spec: RunSpec) -> list[RunSpec]:
    """Return the runs in storage that differ from a run that is not there yet in their plug-ins' code only."""
    folders = list_folders(spec.destination.storage, MODELS)
    if spec.folder in folders:
        return []
    found = []
    for folder in folders:
        if urls.get_basename(folder).startswith(f"{spec.recipe.name}-"):
            with suppress(FileNotFoundError, ConfigError):
                other = load_run_spec(folder)
                recipe = other.recipe.model_copy(update={"code": spec.recipe.code})
                if other.model_copy(update={"recipe": recipe}).identity == spec.identity:
                    found.append(other)
    return found
