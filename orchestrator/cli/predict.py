"""Top classes of images, by an ensemble in storage or in MLflow's registry. Needs no cluster."""

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
from orchestrator.data.build.sources.folder import is_image
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

# A photograph of 100 million pixels, the most that is decoded, has less in any usual quality.
MAX_IMAGE_BYTES = 64 * 2**20
_WEB_SCHEMES = ("http", "https")


@dataclass(frozen=True)
class ModelSource:
    """Where the weights of a classifier lie, and what to call it."""

    description: str
    weights_urls: tuple[str, ...]
    titles: tuple[str, ...]


def run_predict(config: PredictConfig, console: Console | None = None) -> int:
    """Classify the images and print what they show; the exit status, 1 when some could not be read.

    Raises ConfigError, DataError or StorageError when there is no classifier or no image.
    """
    if not config.images:
        raise ConfigError("images: give at least one image, folder or URL")
    images = find_images(config.images)
    known = load_classifier(config.chosen, _print_note)
    show = _print_json if config.json_lines else _make_table_printer(images, console or make_console())
    broken = 0
    step = classifier.compute_images_per_batch(config.crops)
    for first in range(0, len(images), step):
        part = images[first : first + step]
        read = [read_image(image) for image in part]
        answers = iter(known.classify([data for data in read if isinstance(data, bytes)], config.crops, config.top))
        for image, data in zip(part, read, strict=True):
            answer = next(answers) if isinstance(data, bytes) else data
            show(image, answer)
            broken += isinstance(answer, Exception)
    if broken:
        _print_note(f"{broken} of {len(images)} images could not be read")
    return EXIT_FAILURE if broken else 0


def load_classifier(chosen: ModelChoice, note: Callable[[str], None]) -> Classifier:
    """The classifier that is meant, ready; `note` is told which. Raises as `predict` does."""
    registered, why = chosen.model, ""
    if not registered:
        registered, why = _find_champion(chosen)
    if registered.startswith(ensemble_registry.MODEL_URI_PREFIX):
        with tempfile.TemporaryDirectory(prefix="model-") as scratch:
            return _load_source(_fetch_registered(chosen.model_copy(update={"model": registered}), scratch), note, why)
    return _load_source(resolve_source(chosen), note, why)


def _find_champion(chosen: ModelChoice) -> tuple[str, str]:
    """Return the URI of the registered champion, empty where there is none, and what to say of it.

    Raises ConfigError where several are registered, or where the registry cannot be asked.
    """
    try:
        destination = Destination(data=EMBEDDED_DATASET, storage=chosen.storage, tracking=chosen.tracking).resolve()
    except ConfigError:
        if chosen.tracking:
            raise
        return "", "no MLflow store is known"  # storage elsewhere, which has no default one
    database = os.path.join(urls.to_local_path(destination.storage), "mlflow.db") if not chosen.tracking else ""
    if database and destination.tracking.startswith("sqlite") and not os.path.exists(database):
        return "", "no model is registered"  # known without MLflow, which takes seconds to import
    shown = redaction.redact(destination.tracking)
    try:
        found = ensemble_registry.find_champions(destination.tracking)
    except TrackingError as error:
        raise ConfigError(
            f"model: which one is the champion cannot be found out: {error}; name an ensemble or run with --model"
        ) from None
    if len(found) > 1:
        raise ConfigError(
            f"model: {len(found)} champions are registered in {shown}; choose with --model: {', '.join(found)}"
        )
    return (found[0], f"the champion registered in {shown}") if found else ("", f"no champion is registered in {shown}")


def resolve_source(chosen: ModelChoice) -> ModelSource:
    """The weights in storage that are meant. Raises ConfigError when they are not there, or not all."""
    if chosen.model:
        (one,) = run_lookup.find_runs([chosen.model], chosen.storage, "model")
        one.check_members("model")
        told = one.name
    else:
        one, told = _find_newest_ensemble(chosen.storage)
    members = list(one.members) if one.members is not None else [one.folder]
    runs = _select_members(members, chosen.members)
    for number, run in runs:
        if load_finished_outcome(run) is None:
            raise ConfigError(
                f"model: {one.name}: its model {number}, {urls.get_basename(run)}, is not trained to its "
                "end; finish it, or "
                "choose others with --members"
            )
    return ModelSource(
        _format_model_count(told, runs, members),
        tuple(get_final_weights_dir(run) for _, run in runs),
        _load_titles(runs[0][1]),
    )


def find_images(places: Sequence[str]) -> list[str]:
    """The images at these places, as their URLs or absolute paths; those of a folder are told by their extensions.

    Pictures of formats that are not decoded are among them, since their answer says so: a phone's HEIC must not vanish.
    Raises ConfigError for a folder that has none.
    """
    images: list[str] = []
    for place in places:
        url = place if not urls.is_local(place) else os.path.abspath(os.path.expanduser(urls.to_local_path(place)))
        # A page of the web is no list of files.
        names = [] if urls.get_scheme(url) in _WEB_SCHEMES or _is_file(url) else file_io.list_names(url)
        inside = [name for name in names if is_image(name) or _is_unsupported_image(name)]
        if not inside and (names or _is_folder(url)):
            raise ConfigError(
                f"images: {redaction.redact(place)}: a folder without images; those in folders are not seen"
            )
        images += [file_io.join(url, name) for name in inside] or [url]
    return images


def _is_unsupported_image(name: str) -> bool:
    """Return whether a name is that of a picture, not a document, whose format is not decoded."""
    stem, _, extension = name.rpartition(".")
    kind = image_format.UNSUPPORTED_EXTENSIONS.get(extension.lower())
    return bool(stem) and not stem.startswith(".") and kind not in (None, "svg", "pdf")


def _is_file(url: str) -> bool:
    return urls.is_local(url) and os.path.isfile(url)


def _is_folder(url: str) -> bool:
    return urls.is_local(url) and os.path.isdir(url)


def read_image(url: str) -> bytes | OSError | BadSampleError:
    """The file, or what is wrong with it."""
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
    """The newest ensemble that train_ensemble.py made and whose members are all trained, and what to say of it.

    What was only evaluated never counts, and evaluating an ensemble makes it no newer.
    """
    place = run_lookup.resolve_storage(storage)
    origins = {one.folder: (one, *_read_origin(one.folder)) for one in run_lookup.list_all_runs(storage) if one.members}
    there = [
        (created, one.name, one)
        for one, made_by, created in origins.values()
        if made_by != run_lookup.MADE_BY_EVALUATION
    ]
    for _, _, one in sorted(there, key=lambda each: each[:2], reverse=True):
        if all(load_finished_outcome(run) is not None for run in one.members or ()):
            return one, one.name if len(there) == 1 else f"{one.name}, the newest whole one of {len(there)} trained"
    raise ConfigError(
        f"model: no ensemble in {redaction.redact(place)} has all its models trained ({len(there)} there); "
        "give one, or a "
        "run, with --model, or another storage with --storage"
    )


def _read_origin(folder: str) -> tuple[str, float]:
    """Return what made an ensemble first and when, unix seconds; of older ones when work on it began last, else 0."""
    record = file_io.read_json_or_empty(file_io.join(folder, run_lookup.ENSEMBLE_FILE))
    if isinstance(created := record.get("created"), int | float):
        return str(record.get("made_by")), float(created)
    last = lease.read_lease(folder)
    return run_lookup.MADE_BY_TRAINING, 0.0 if last is None else last.owner.since


def _select_members(members: Sequence[str], numbers: Sequence[int]) -> list[tuple[int, str]]:
    """Numbers and items of those that are asked for, all by default. Raises ConfigError."""
    if len(set(numbers)) < len(numbers) or not all(1 <= number <= len(members) for number in numbers):
        told = ",".join(map(str, numbers))
        raise ConfigError(f"members: {told} is refused: numbers from 1 to {len(members)}, each once")
    return [(number, members[number - 1]) for number in numbers or range(1, len(members) + 1)]


def _format_model_count(name: str, taken: Sequence[tuple[int, str]], members: Sequence[str]) -> str:
    if len(taken) == len(members):
        return f"{name} ({len(members)} model{'s' * (len(members) > 1)})"
    return f"{name} (models {','.join(str(number) for number, _ in taken)} of {len(members)})"


def _load_titles(run: str) -> tuple[str, ...]:
    """Readable names of the classes, from the dataset that the run was trained on; none when it is not at hand."""
    spec = file_io.read_json_or_empty(file_io.join(run, "spec.json"))
    try:
        # Only names are taken from it: no tar is read.
        found = manifest.load(run_lookup.resolve_dataset_url(spec, run), allow_elsewhere=True)
    except (DataError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return ()
    return found.titles if found.digest() == spec.get("dataset_digest") else ()


def _fetch_registered(chosen: ModelChoice, scratch: str) -> ModelSource:
    destination = Destination(data=EMBEDDED_DATASET, storage=chosen.storage, tracking=chosen.tracking).resolve()
    try:
        weights, titles = ensemble_registry.fetch_weights(destination.tracking, chosen.model, scratch)
    except TrackingError as error:
        raise ConfigError(f"model: {error}; another store is given with --tracking") from None
    taken = _select_members(weights, chosen.members)
    return ModelSource(
        _format_model_count(chosen.model, taken, weights), tuple(path for _, path in taken), tuple(titles)
    )


def _load_source(chosen: ModelSource, note: Callable[[str], None], why: str) -> Classifier:
    note(f"model: {chosen.description}" + (f": {why}" if why else ""))
    try:
        return Classifier.load(chosen.weights_urls, chosen.titles)
    except (CheckpointError, FileNotFoundError) as error:
        raise DataError(f"model: {error}") from None


def _print_note(text: str) -> None:
    """Say it beside the results, which may go into a file."""
    sys.stderr.write(f"{text}\n")


def _print_json(image: str, answer: list[Prediction] | Exception) -> None:
    told = {"error": str(answer)} if isinstance(answer, Exception) else {"predictions": [asdict(one) for one in answer]}
    sys.stdout.write(json.dumps({"image": redaction.redact(image), **told}) + "\n")
    sys.stdout.flush()


def _make_table_printer(images: Sequence[str], screen: Console) -> Callable[[str, list[Prediction] | Exception], None]:
    """Prints an image's rows as they come; all have the same columns, so they look like one table."""
    names = shorten_names(images)
    width = min(max(map(len, names.values())), max(12, screen.width // 3))

    def show(image: str, answer: list[Prediction] | Exception) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(width=width, overflow="fold")
        table.add_column(width=8, justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        if isinstance(answer, Exception):
            table.add_row(Text(names[image]), Text("-"), Text(f"not read: {answer}", style="red"))
        else:
            for rank, one in enumerate(answer):
                name = names[image] if rank == 0 else ""
                table.add_row(Text(name), f"{100 * one.probability:.2f} %", Text(one.class_name))
        screen.print(table, soft_wrap=False)

    return show


def shorten_names(images: Sequence[str]) -> dict[str, str]:
    """How to show each image: by its file's name where no other image has that, else in full."""
    short = [urls.get_basename(redaction.redact(image)) for image in images]
    return {
        image: name if short.count(name) == images.count(image) else redaction.redact(image)
        for image, name in zip(images, short, strict=True)
    }
