"""Classify images with models in storage or in MLflow's registry. Needs no cluster."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.cli.exit_status import EXIT_FAILURE, make_console
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.data.build.sources.listing import is_image
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.transforms import image_format
from orchestrator.ensemble import ensemble_registry
from orchestrator.ensemble.config import ModelChoice, PredictConfig
from orchestrator.evaluation import classifier
from orchestrator.evaluation.classifier import Classifier, Prediction
from orchestrator.ray_backend import lease, run_lookup
from orchestrator.ray_backend.run_lookup import RunEntry
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination
from orchestrator.storage import file_io, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.tracking.tracker import TrackingError
from orchestrator.training.run_dir import get_final_weights_dir, load_finished_outcome

# The decoder accepts 100 million pixels; a photograph of that size has fewer bytes at any usual quality.
MAX_IMAGE_BYTES = 64 * 2**20
_WEB_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class ModelSource:
    """The weights of a classifier, its description, and readable class names."""

    description: str
    weights_urls: tuple[str, ...]
    titles: tuple[str, ...]


def run_predict(config: PredictConfig, console: Console | None = None) -> int:
    """Classify the images and print their classes; return the exit status, 1 when some could not be read.

    Raises ConfigError, DataError or StorageError when there is no classifier or no image.
    """
    if not config.images:
        raise ConfigError("images: give at least one image, folder or URL")
    images = find_images(config.images)
    model = load_classifier(config.chosen, _print_note)
    print_answer = _print_json if config.json_lines else _make_table_printer(images, console or make_console())
    unreadable_count = 0
    step = classifier.compute_images_per_batch(config.crops)
    for first in range(0, len(images), step):
        batch = images[first : first + step]
        contents = [read_image(image) for image in batch]
        encoded = [data for data in contents if isinstance(data, bytes)]
        answers = iter(model.classify(encoded, config.crops, config.top))
        for image, data in zip(batch, contents, strict=True):
            answer = next(answers) if isinstance(data, bytes) else data
            print_answer(image, answer)
            unreadable_count += isinstance(answer, Exception)
    if unreadable_count:
        _print_note(f"{unreadable_count} of {len(images)} images could not be read")
    return EXIT_FAILURE if unreadable_count else 0


def load_classifier(choice: ModelChoice, report: Callable[[str], None]) -> Classifier:
    """Load the chosen classifier; `report` gets a line that says which it is. Raises as `run_predict` does."""
    uri, reason = (choice.model, "") if choice.model else _find_champion(choice)
    if uri.startswith(ensemble_registry.MODEL_URI_PREFIX):
        with tempfile.TemporaryDirectory(prefix="model-") as scratch:
            return _load_source(_fetch_registered(choice.model_copy(update={"model": uri}), scratch), report, reason)
    return _load_source(resolve_source(choice), report, reason)


def _find_champion(choice: ModelChoice) -> tuple[str, str]:
    """Return the URI of the registered champion, empty when there is none, and the reason for using it or not.

    Raises ConfigError when several are registered, or when the registry cannot be read.
    """
    try:
        destination = Destination(data=EMBEDDED_DATASET, storage=choice.storage, tracking=choice.tracking).resolve()
    except ConfigError:
        if choice.tracking:
            raise
        return "", "no MLflow store is known"  # remote storage has no default one
    database = os.path.join(urls.to_local_path(destination.storage), "mlflow.db") if not choice.tracking else ""
    if database and destination.tracking.startswith("sqlite") and not os.path.exists(database):
        return "", "no model is registered"  # found without MLflow, which takes seconds to import
    shown = redaction.redact(destination.tracking)
    try:
        champions = ensemble_registry.find_champions(destination.tracking)
    except TrackingError as error:
        raise ConfigError(
            f"model: the champion cannot be looked up: {error}; set --model to an ensemble or run"
        ) from None
    if len(champions) > 1:
        raise ConfigError(
            f"model: {len(champions)} champions are registered in {shown}; set --model to one: {', '.join(champions)}"
        )
    if champions:
        return champions[0], f"the champion registered in {shown}"
    return "", f"no champion is registered in {shown}"


def resolve_source(choice: ModelChoice) -> ModelSource:
    """Return the chosen weights in storage. Raises ConfigError when one is missing or not finished."""
    if choice.model:
        (entry,) = run_lookup.find_runs([choice.model], choice.storage, "model")
        entry.check_members("model")
        description = entry.name
    else:
        entry, description = _find_newest_ensemble(choice.storage)
    members = list(entry.members) if entry.members is not None else [entry.folder]
    runs = _select_members(members, choice.members)
    for number, run in runs:
        if load_finished_outcome(run) is None:
            raise ConfigError(
                f"model: {entry.name}: its model {number}, {urls.get_basename(run)}, is not finished; rerun its "
                "training, or choose others with --members"
            )
    return ModelSource(
        _format_model_count(description, runs, members),
        tuple(get_final_weights_dir(run) for _, run in runs),
        _load_titles(runs[0][1]),
    )


def find_images(places: Sequence[str]) -> list[str]:
    """Return the images at these places, as URLs or absolute paths; in a folder, extensions decide.

    Pictures in unsupported formats are included, so that each gets an error: a phone's HEIC must not vanish.
    Raises ConfigError for a folder without images.
    """
    images: list[str] = []
    for place in places:
        url = place if not urls.is_local(place) else os.path.abspath(os.path.expanduser(urls.to_local_path(place)))
        # A web page is not a list of files.
        names = [] if urls.get_scheme(url) in _WEB_SCHEMES or _is_file(url) else file_io.list_names(url)
        inside = [name for name in names if is_image(name) or _is_unsupported_image(name)]
        if not inside and (names or _is_folder(url)):
            raise ConfigError(
                f"images: {redaction.redact(place)}: a folder without images; subfolders are not searched"
            )
        images += [file_io.join(url, name) for name in inside] or [url]
    return images


def _is_unsupported_image(name: str) -> bool:
    """Return whether a name is that of a picture, not a document, in a format that cannot be decoded."""
    stem, _, extension = name.rpartition(".")
    kind = image_format.UNSUPPORTED_EXTENSIONS.get(extension.lower())
    return bool(stem) and not stem.startswith(".") and kind not in (None, "svg", "pdf")


def _is_file(url: str) -> bool:
    return urls.is_local(url) and os.path.isfile(url)


def _is_folder(url: str) -> bool:
    return urls.is_local(url) and os.path.isdir(url)


def read_image(url: str) -> bytes | OSError | BadSampleError:
    """Return the content of a file, or the error that explains why it cannot be used."""
    try:
        if (size := file_io.get_size(url)) > MAX_IMAGE_BYTES:
            return BadSampleError(f"an image must have at most {MAX_IMAGE_BYTES} bytes, got {size}")
        return file_io.read_bytes(url)
    except FileNotFoundError:
        return StorageError("nothing there")
    except OSError as error:
        return error


def encode_pixels(pixels: object) -> bytes:
    """Return RGB pixels (uint8, height x width x 3) as the bytes of a PNG file. Raises ConfigError for other arrays."""
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ConfigError(
            f"images: pixels must be uint8 of shape height x width x 3, got {array.dtype} of shape {array.shape}; give "
            "a path, a URL, the bytes of a JPEG or PNG file, or such pixels"
        )
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _find_newest_ensemble(storage: str) -> tuple[RunEntry, str]:
    """Return the newest trained ensemble whose members are all finished, and its description.

    Ensembles that were only evaluated do not count, and evaluating one makes it no newer.
    """
    place = run_lookup.resolve_storage(storage)
    ensembles = [(*_read_origin(entry.folder), entry) for entry in run_lookup.list_all_runs(storage) if entry.members]
    trained = [(created, entry) for made_by, created, entry in ensembles if made_by != run_lookup.MADE_BY_EVALUATION]
    for _, entry in sorted(trained, key=lambda pair: (pair[0], pair[1].name), reverse=True):
        if all(load_finished_outcome(run) is not None for run in entry.members or ()):
            several = f", the newest complete one of {len(trained)} trained" if len(trained) > 1 else ""
            return entry, f"{entry.name}{several}"
    raise ConfigError(
        f"model: no ensemble in {redaction.redact(place)} is completely trained ({len(trained)} there); set --model to "
        "an ensemble or a run, or --storage to another storage"
    )


def _read_origin(folder: str) -> tuple[str, float]:
    """Return what made an ensemble first and when (unix seconds), in old records when work on it last began, else 0."""
    record = file_io.read_json_or_empty(file_io.join(folder, run_lookup.ENSEMBLE_FILE))
    if isinstance(created := record.get("created"), int | float):
        return str(record.get("made_by")), float(created)
    last = lease.read_lease(folder)
    return run_lookup.MADE_BY_TRAINING, 0.0 if last is None else last.owner.since


def _select_members(members: Sequence[str], numbers: Sequence[int]) -> list[tuple[int, str]]:
    """Return numbers and items of the members with these numbers, by default all. Raises ConfigError."""
    if len(set(numbers)) < len(numbers) or not all(1 <= number <= len(members) for number in numbers):
        raise ConfigError(
            f"members: must be different numbers from 1 to {len(members)}, got {','.join(map(str, numbers))}"
        )
    return [(number, members[number - 1]) for number in numbers or range(1, len(members) + 1)]


def _format_model_count(name: str, selected: Sequence[tuple[int, str]], members: Sequence[str]) -> str:
    if len(selected) == len(members):
        return f"{name} ({len(members)} model{'s' * (len(members) > 1)})"
    return f"{name} (models {','.join(str(number) for number, _ in selected)} of {len(members)})"


def _load_titles(run: str) -> tuple[str, ...]:
    """Return readable class names from the dataset that the run was trained on; none when it is not available."""
    spec = file_io.read_json_or_empty(file_io.join(run, "spec.json"))
    try:
        # Only names are used: no tar is read.
        dataset = manifest.load(run_lookup.resolve_dataset_url(spec, run), allow_elsewhere=True)
    except (DataError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return ()
    return dataset.titles if dataset.digest() == spec.get("dataset_digest") else ()


def _fetch_registered(choice: ModelChoice, scratch: str) -> ModelSource:
    destination = Destination(data=EMBEDDED_DATASET, storage=choice.storage, tracking=choice.tracking).resolve()
    try:
        weights, titles = ensemble_registry.fetch_weights(destination.tracking, choice.model, scratch)
    except TrackingError as error:
        raise ConfigError(f"model: {error}; set --tracking to another store") from None
    selected = _select_members(weights, choice.members)
    return ModelSource(
        _format_model_count(choice.model, selected, weights), tuple(path for _, path in selected), tuple(titles)
    )


def _load_source(source: ModelSource, report: Callable[[str], None], reason: str) -> Classifier:
    report(f"model: {source.description}" + (f": {reason}" if reason else ""))
    try:
        return Classifier(source.weights_urls, source.titles)
    except (CheckpointError, FileNotFoundError) as error:
        raise DataError(f"model: {error}") from None


def _print_note(text: str) -> None:
    """Print a line on stderr, since results on stdout may go into a file."""
    sys.stderr.write(f"{text}\n")


def _print_json(image: str, answer: list[Prediction] | Exception) -> None:
    content: dict[str, object] = {"error": _escape_surrogates(str(answer))}
    if not isinstance(answer, Exception):
        content = {"predictions": [asdict(each) for each in answer]}
    sys.stdout.write(json.dumps({"image": _escape_surrogates(redaction.redact(image)), **content}) + "\n")
    sys.stdout.flush()


def _escape_surrogates(text: str) -> str:
    """Escape what a name that is not UTF-8 has instead of its bytes, and JSON must not hold."""
    return text.encode(errors="backslashreplace").decode()


def _make_table_printer(images: Sequence[str], console: Console) -> Callable[[str, list[Prediction] | Exception], None]:
    """Return a function that prints an image's rows; all have the same columns, so together they form a table."""
    names = shorten_names(images)
    width = min(max(map(len, names.values())), max(12, console.width // 3))

    def print_rows(image: str, answer: list[Prediction] | Exception) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(width=width, overflow="fold")
        table.add_column(width=8, justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        if isinstance(answer, Exception):
            table.add_row(Text(names[image]), Text("-"), Text(f"not read: {answer}", style="red"))
        else:
            for rank, prediction in enumerate(answer):
                name = names[image] if rank == 0 else ""
                table.add_row(Text(name), f"{100 * prediction.probability:.2f} %", Text(prediction.class_name))
        console.print(table, soft_wrap=False)

    return print_rows


def shorten_names(images: Sequence[str]) -> dict[str, str]:
    """Return the name of each image for people: its file's name where it is unique, else the whole URL."""
    short = [urls.get_basename(redaction.redact(image)) for image in images]
    return {
        image: name if short.count(name) == images.count(image) else redaction.redact(image)
        for image, name in zip(images, short, strict=True)
    }
