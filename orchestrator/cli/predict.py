"""Classify images with models in storage or in MLflow's registry. Needs no cluster."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.cli.exit_status import EXIT_FAILURE
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data import manifest
from orchestrator.data.build.sources.listing import is_image
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.transforms import image_format
from orchestrator.ensemble import ensemble_registry
from orchestrator.ensemble.config import ModelChoice, PredictConfig
from orchestrator.ensemble.members import select_members
from orchestrator.evaluation import classifier
from orchestrator.evaluation.classifier import Classifier, Prediction
from orchestrator.ray_backend import run_lookup
from orchestrator.ray_backend.run_spec import EMBEDDED_DATASET, Destination
from orchestrator.storage import file_io, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.tracking.tracker import TrackingError
from orchestrator.training.run_dir import get_final_weights_dir, load_finished_outcome

# The decoder accepts 100 million pixels; a photograph of that size has fewer bytes at any usual quality.
MAX_IMAGE_BYTES = 64 * 2**20
Answer = list[Prediction] | Exception  # the most likely classes of an image, or why there are none


@dataclass(frozen=True)
class ModelSource:
    """The weights of a classifier, its description, and readable class names."""

    description: str
    weights_urls: tuple[str, ...]
    titles: tuple[str, ...]


def run_predict(config: PredictConfig, console: Console) -> int:
    """Classify the images and print their classes; return the exit status, 1 when some could not be read.

    Raises ConfigError, DataError or StorageError when there is no classifier or no image.
    """
    if not config.images:
        raise ConfigError("images: give at least one image, folder or URL")
    images = find_images(config.images)
    model, description = load_classifier(config.chosen)
    _print_note(f"model: {description}")
    names = shorten_names(images)
    width = min(max(map(len, names)), max(12, console.width // 3))
    unreadable_count, step = 0, classifier.compute_images_per_batch(config.crops)
    for first in range(0, len(images), step):
        batch = images[first : first + step]
        contents = [read_image(image) for image in batch]
        encoded = [data for data in contents if isinstance(data, bytes)]
        answers = iter(model.classify(encoded, config.crops, config.top))
        for name, image, data in zip(names[first:], batch, contents, strict=False):
            answer = next(answers) if isinstance(data, bytes) else data
            if config.json_lines:
                _print_json(image, answer)
            else:
                _print_rows(name, width, answer, console)
            unreadable_count += isinstance(answer, Exception)
    if unreadable_count:
        _print_note(f"{unreadable_count} of {len(images)} images could not be read")
    return EXIT_FAILURE if unreadable_count else 0


def load_classifier(choice: ModelChoice) -> tuple[Classifier, str]:
    """Load the chosen classifier; return it and which it is. Raises as `run_predict` does."""
    with tempfile.TemporaryDirectory(prefix="model-") as scratch:
        if choice.model and not choice.model.startswith(ensemble_registry.MODEL_URI_PREFIX):
            source = resolve_source(choice)
        else:
            source = _fetch_registered(choice, scratch)
        try:
            return Classifier(source.weights_urls, source.titles), source.description
        except (CheckpointError, FileNotFoundError) as error:
            raise DataError(f"model: {error}") from None


def _fetch_registered(choice: ModelChoice, scratch: str) -> ModelSource:
    """Return the weights of a registered model, by default the champion. Raises ConfigError when there is none."""
    destination = Destination(data=EMBEDDED_DATASET, storage=choice.storage, tracking=choice.tracking).resolve()
    tracking, name, reason = destination.tracking, choice.model, ""
    try:
        if not name:
            database = os.path.join(urls.to_local_path(destination.storage), "mlflow.db")
            # A query would make the default database, which takes seconds, just to find nothing in it.
            missing = not choice.tracking and tracking.startswith("sqlite") and not os.path.exists(database)
            champions = [] if missing else ensemble_registry.find_champions(tracking)
            shown = f"registered in {redaction.redact(tracking)}"
            if len(champions) != 1:
                found = f"{len(champions)} champions are {shown}" if champions else f"no champion is {shown}"
                which = f"one: {', '.join(champions)}" if champions else "an ensemble or a run"
                raise ConfigError(f"model: {found}; set --model to {which}")
            name, reason = champions[0], f": the champion {shown}"
        weights, titles = ensemble_registry.fetch_weights(tracking, name, scratch)
    except TrackingError as error:
        raise ConfigError(f"model: {error}; set --tracking to another store, or --model to a run") from None
    numbers = select_members(len(weights), choice.members)
    description = _format_model_count(name, numbers, len(weights)) + reason
    return ModelSource(description, tuple(weights[number - 1] for number in numbers), tuple(titles))


def resolve_source(choice: ModelChoice) -> ModelSource:
    """Return the chosen weights in storage. Raises ConfigError when one is missing or not finished."""
    (entry,) = run_lookup.find_runs([choice.model], choice.storage, "model")
    entry.check_members("model")
    members = [entry.folder] if entry.members is None else list(entry.members)
    numbers = select_members(len(members), choice.members)
    for number in numbers:
        if load_finished_outcome(run := members[number - 1]) is None:
            raise ConfigError(
                f"model: {entry.name}: its model {number}, {urls.get_basename(run)}, is not finished; rerun its "
                "training, or choose others with --members"
            )
    return ModelSource(
        _format_model_count(entry.name, numbers, len(members)),
        tuple(get_final_weights_dir(members[number - 1]) for number in numbers),
        _load_titles(members[numbers[0] - 1]),
    )


def _format_model_count(name: str, numbers: Sequence[int], count: int) -> str:
    if len(numbers) == count:
        return f"{name} ({count} model{'s' * (count > 1)})"
    return f"{name} (models {','.join(map(str, numbers))} of {count})"


def _load_titles(run: str) -> tuple[str, ...]:
    """Return readable class names from the dataset that the run was trained on; none when it is not available."""
    spec = file_io.read_json_or_empty(file_io.join(run, "spec.json"))
    try:
        # Only names are used: no tar is read.
        dataset = manifest.load(run_lookup.resolve_dataset_url(spec, run), allow_elsewhere=True)
    except (DataError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return ()
    return dataset.titles if dataset.digest() == spec.get("dataset_digest") else ()


def find_images(places: Sequence[str]) -> list[str]:
    """Return the images at these places, as URLs or absolute paths; in a folder, extensions decide.

    Pictures in unsupported formats are included, so that each gets an error: a phone's HEIC must not vanish.
    Raises ConfigError for a folder without images.
    """
    images: list[str] = []
    for place in places:
        url = os.path.abspath(os.path.expanduser(urls.to_local_path(place))) if urls.is_local(place) else place
        # A web page is not a list of files.
        names = [] if urls.is_web(url) or os.path.isfile(url) else file_io.list_names(url)
        inside = [name for name in names if is_image(name) or _is_unsupported_image(name)]
        if not inside and (names or os.path.isdir(url)):
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
        wanted = "paths, URLs, bytes of JPEG or PNG files, or pixels: uint8 of shape height x width x 3"
        raise ConfigError(f"images: must be {wanted}, got {array.dtype} of shape {array.shape}")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _print_note(text: str) -> None:
    """Print a line on stderr, since results on stdout may go into a file."""
    sys.stderr.write(f"{text}\n")


def _print_json(image: str, answer: Answer) -> None:
    content: dict[str, object] = {"error": _escape_surrogates(str(answer))}
    if not isinstance(answer, Exception):
        content = {"predictions": [asdict(each) for each in answer]}
    sys.stdout.write(json.dumps({"image": _escape_surrogates(redaction.redact(image)), **content}) + "\n")
    sys.stdout.flush()


def _escape_surrogates(text: str) -> str:
    """Escape what a name that is not UTF-8 has instead of its bytes, and JSON must not hold."""
    return text.encode(errors="backslashreplace").decode()


def _print_rows(name: str, width: int, answer: Answer, console: Console) -> None:
    """Print the rows of an image; those of all images have the same columns, so together they form a table."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(width=width, overflow="fold")
    table.add_column(width=8, justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    if isinstance(answer, Exception):
        table.add_row(Text(name), Text("-"), Text(f"not read: {answer}", style="red"))
    else:
        for rank, prediction in enumerate(answer):
            first = Text("" if rank else name)
            table.add_row(first, f"{100 * prediction.probability:.2f} %", Text(prediction.class_name))
    console.print(table, soft_wrap=False)


def shorten_names(images: Sequence[str]) -> list[str]:
    """Return the names of images for people: without the folder that they have in common."""
    names = [redaction.redact(image) for image in images]
    start = os.path.commonprefix(names).rfind("/") + 1  # noqa: RUF071  a folder ends at a slash, also that of a URL
    return [name[start:] for name in names]
