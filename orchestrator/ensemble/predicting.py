"""Top classes of images, by an ensemble in storage or in MLflow's registry. Needs no cluster."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.checkpoint.format import CheckpointError
from orchestrator.config.errors import ConfigError
from orchestrator.data import image_format, manifest
from orchestrator.data.errors import BadSampleError, DataError
from orchestrator.data.sources.folder import is_image
from orchestrator.ensemble import registry
from orchestrator.ensemble.predicting_config import Chosen, Predict
from orchestrator.evaluation import classifier
from orchestrator.evaluation.classifier import Classifier, Guess
from orchestrator.launch import holder, named
from orchestrator.launch.config import EMBEDDED, Destination
from orchestrator.launch.named import Named
from orchestrator.launch.screen import FAILED
from orchestrator.storage import files, urls
from orchestrator.storage.files import StorageError
from orchestrator.tracking.tracker import TrackingError
from orchestrator.training.job import final_of
from orchestrator.training.outcome import finished

# A photograph of 100 million pixels, the most that is decoded, has less in any usual quality.
MAX_BYTES = 64 * 2**20
_WEB = ("http", "https")


@dataclass(frozen=True)
class Source:
    """Where the weights of a classifier lie, and what to call it."""

    told: str
    finals: tuple[str, ...]
    titles: tuple[str, ...]


def predict(config: Predict, screen: Console) -> int:
    """Classify the images and print what they show; the exit status, 1 when some could not be read.

    Raises ConfigError, DataError or StorageError when there is no classifier or no image.
    """
    if not config.images:
        raise ConfigError("images: give at least one image, folder or URL")
    images = found(config.images)
    known = opened(config.chosen, _note)
    show = _as_json if config.json_lines else _as_tables(images, screen)
    broken = 0
    step = classifier.at_once(config.crops)
    for first in range(0, len(images), step):
        part = images[first : first + step]
        read = [_read(image) for image in part]
        answers = iter(known.classify([data for data in read if isinstance(data, bytes)], config.crops, config.top))
        for image, data in zip(part, read, strict=True):
            answer = next(answers) if isinstance(data, bytes) else data
            show(image, answer)
            broken += isinstance(answer, Exception)
    if broken:
        _note(f"{broken} of {len(images)} images could not be read")
    return FAILED if broken else 0


def opened(chosen: Chosen, note: Callable[[str], None]) -> Classifier:
    """The classifier that is meant, ready; `note` is told which. Raises as `predict` does."""
    registered, why = chosen.model, ""
    if not registered:
        registered, why = _champion(chosen)
    if registered.startswith(registry.URI):
        with tempfile.TemporaryDirectory(prefix="model-") as scratch:
            return _loaded(_registered(chosen.model_copy(update={"model": registered}), scratch), note, why)
    return _loaded(source(chosen), note, why)


def _champion(chosen: Chosen) -> tuple[str, str]:
    """Return the URI of the registered champion, empty where there is none, and what to say of it.

    Raises ConfigError where several are registered, or where the registry cannot be asked.
    """
    try:
        destination = Destination(data=EMBEDDED, storage=chosen.storage, tracking=chosen.tracking).resolved()
    except ConfigError:
        if chosen.tracking:
            raise
        return "", "no MLflow store is known"  # storage elsewhere, which has no default one
    database = os.path.join(urls.local_path(destination.storage), "mlflow.db") if not chosen.tracking else ""
    if database and destination.tracking.startswith("sqlite") and not os.path.exists(database):
        return "", "no model is registered"  # known without MLflow, which takes seconds to import
    shown = urls.redact(destination.tracking)
    try:
        found = registry.champions(destination.tracking)
    except TrackingError as error:
        raise ConfigError(
            f"model: which one is the champion cannot be found out: {error}; name an ensemble or run with --model"
        ) from None
    if len(found) > 1:
        raise ConfigError(
            f"model: {len(found)} champions are registered in {shown}; choose with --model: {', '.join(found)}"
        )
    return (found[0], f"the champion registered in {shown}") if found else ("", f"no champion is registered in {shown}")


def source(chosen: Chosen) -> Source:
    """The weights in storage that are meant. Raises ConfigError when they are not there, or not all."""
    if chosen.model:
        (one,) = named.find([chosen.model], chosen.storage, "model")
        one.check_members("model")
        told = one.name
    else:
        one, told = _newest(chosen.storage)
    members = list(one.members) if one.members is not None else [one.folder]
    runs = _taken(members, chosen.members)
    for number, run in runs:
        if finished(run) is None:
            raise ConfigError(
                f"model: {one.name}: its model {number}, {urls.name(run)}, is not trained to its end; finish it, or "
                "choose others with --members"
            )
    return Source(_counted(told, runs, members), tuple(final_of(run) for _, run in runs), _titles(runs[0][1]))


def found(places: Sequence[str]) -> list[str]:
    """The images at these places, as their URLs or absolute paths; those of a folder are told by their extensions.

    Pictures of formats that are not decoded are among them, since their answer says so: a phone's HEIC must not vanish.
    Raises ConfigError for a folder that has none.
    """
    images: list[str] = []
    for place in places:
        url = place if not urls.is_local(place) else os.path.abspath(os.path.expanduser(urls.local_path(place)))
        # A page of the web is no list of files.
        names = [] if urls.scheme(url) in _WEB or _is_file(url) else files.list_names(url)
        inside = [name for name in names if is_image(name) or _is_other_picture(name)]
        if not inside and (names or _is_folder(url)):
            raise ConfigError(f"images: {urls.redact(place)}: a folder without images; those in folders are not seen")
        images += [files.join(url, name) for name in inside] or [url]
    return images


def _is_other_picture(name: str) -> bool:
    """Return whether a name is that of a picture, not a document, whose format is not decoded."""
    stem, _, extension = name.rpartition(".")
    kind = image_format.EXTENSIONS.get(extension.lower())
    return bool(stem) and not stem.startswith(".") and kind not in (None, "svg", "pdf")


def _is_file(url: str) -> bool:
    return urls.is_local(url) and os.path.isfile(url)


def _is_folder(url: str) -> bool:
    return urls.is_local(url) and os.path.isdir(url)


def _read(url: str) -> bytes | OSError | BadSampleError:
    """The file, or what is wrong with it."""
    try:
        if (size := files.size(url)) > MAX_BYTES:
            return BadSampleError(f"an image must have at most {MAX_BYTES} bytes, got {size}")
        return files.read_bytes(url)
    except FileNotFoundError:
        return StorageError("nothing there")
    except OSError as error:
        return error


def _newest(storage: str) -> tuple[Named, str]:
    """The newest ensemble that train_ensemble.py made and whose members are all trained, and what to say of it.

    What was only evaluated never counts, and evaluating an ensemble makes it no newer.
    """
    place = named.storage_of(storage)
    origins = {one.folder: (one, *_origin(one.folder)) for one in named.everything(storage) if one.members}
    there = [(created, one.name, one) for one, made_by, created in origins.values() if made_by != named.EVALUATED]
    for _, _, one in sorted(there, key=lambda each: each[:2], reverse=True):
        if all(finished(run) is not None for run in one.members or ()):
            return one, one.name if len(there) == 1 else f"{one.name}, the newest whole one of {len(there)} trained"
    raise ConfigError(
        f"model: no ensemble in {urls.redact(place)} has all its models trained ({len(there)} there); give one, or a "
        "run, with --model, or another storage with --storage"
    )


def _origin(folder: str) -> tuple[str, float]:
    """Return what made an ensemble first and when, unix seconds; of older ones when work on it began last, else 0."""
    record = files.read_record(files.join(folder, named.SPEC))
    if isinstance(created := record.get("created"), int | float):
        return str(record.get("made_by")), float(created)
    last = holder.look(folder)
    return named.TRAINED, 0.0 if last is None else last.owner.since


def _taken(members: Sequence[str], numbers: Sequence[int]) -> list[tuple[int, str]]:
    """Numbers and items of those that are asked for, all by default. Raises ConfigError."""
    if len(set(numbers)) < len(numbers) or not all(1 <= number <= len(members) for number in numbers):
        told = ",".join(map(str, numbers))
        raise ConfigError(f"members: {told} is refused: numbers from 1 to {len(members)}, each once")
    return [(number, members[number - 1]) for number in numbers or range(1, len(members) + 1)]


def _counted(name: str, taken: Sequence[tuple[int, str]], members: Sequence[str]) -> str:
    if len(taken) == len(members):
        return f"{name} ({len(members)} model{'s' * (len(members) > 1)})"
    return f"{name} (models {','.join(str(number) for number, _ in taken)} of {len(members)})"


def _titles(run: str) -> tuple[str, ...]:
    """Readable names of the classes, from the dataset that the run was trained on; none when it is not at hand."""
    spec = files.read_record(files.join(run, "spec.json"))
    try:
        # Only names are taken from it: no tar is read.
        found = manifest.load(named.dataset_of(spec, run), allow_elsewhere=True)
    except (DataError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return ()
    return found.titles if found.digest() == spec.get("dataset_digest") else ()


def _registered(chosen: Chosen, scratch: str) -> Source:
    destination = Destination(data=EMBEDDED, storage=chosen.storage, tracking=chosen.tracking).resolved()
    try:
        weights, titles = registry.fetch(destination.tracking, chosen.model, scratch)
    except TrackingError as error:
        raise ConfigError(f"model: {error}; another store is given with --tracking") from None
    taken = _taken(weights, chosen.members)
    return Source(_counted(chosen.model, taken, weights), tuple(path for _, path in taken), tuple(titles))


def _loaded(chosen: Source, note: Callable[[str], None], why: str) -> Classifier:
    note(f"model: {chosen.told}" + (f": {why}" if why else ""))
    try:
        return Classifier.load(chosen.finals, chosen.titles)
    except (CheckpointError, FileNotFoundError) as error:
        raise DataError(f"model: {error}") from None


def _note(text: str) -> None:
    """Say it beside the results, which may go into a file."""
    sys.stderr.write(f"{text}\n")


def _as_json(image: str, answer: list[Guess] | Exception) -> None:
    told = {"error": str(answer)} if isinstance(answer, Exception) else {"predictions": [asdict(one) for one in answer]}
    sys.stdout.write(json.dumps({"image": urls.redact(image), **told}) + "\n")
    sys.stdout.flush()


def _as_tables(images: Sequence[str], screen: Console) -> Callable[[str, list[Guess] | Exception], None]:
    """Prints an image's rows as they come; all have the same columns, so they look like one table."""
    names = shortened(images)
    width = min(max(map(len, names.values())), max(12, screen.width // 3))

    def show(image: str, answer: list[Guess] | Exception) -> None:
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


def shortened(images: Sequence[str]) -> dict[str, str]:
    """How to show each image: by its file's name where no other image has that, else in full."""
    short = [urls.name(urls.redact(image)) for image in images]
    return {
        image: name if short.count(name) == images.count(image) else urls.redact(image)
        for image, name in zip(images, short, strict=True)
    }
