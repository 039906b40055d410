"""A folder per class, on a disk or in any store: a listing with one file per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from orchestrator.data.errors import DataError
from orchestrator.data.sources import keys, listing
from orchestrator.data.sources.config import FolderSource
from orchestrator.data.sources.listing import Listing, Row, SplitListing
from orchestrator.storage import files, urls

VALIDATION_NAMES = ("validation", "val")
# Deeper trees are links that go round.
MAX_DEPTH = 8
LISTING_THREADS = 16
MAX_LABELS_BYTES = 2**30


class File(NamedTuple):
    """An image of a folder."""

    name: str  # below the folder
    length: int


def roots(source: FolderSource) -> dict[str, str]:
    """URL of the folder of each split; a single tree is the training folder.

    Raises DataError when there is nothing, or validation images neither there nor to be held out.
    """
    names = files.list_names(source.url)
    shown = urls.redact(source.url)
    if not names:
        raise DataError(f"source.url: {shown}: empty, or no folder")
    if "train" not in names:
        return {"train": source.url, **held_out(source.url, source.holdout)}
    found = [name for name in VALIDATION_NAMES if name in names]
    if len(found) > 1:
        raise DataError(f"source.url: {shown}: has both {' and '.join(found)}: remove one")
    train = files.join(source.url, "train")
    if not found:
        return {"train": train, **held_out(source.url, source.holdout)}
    refuse_holdout(source.holdout, files.join(source.url, found[0]))
    return {"train": train, "validation": files.join(source.url, found[0])}


def held_out(url: str, holdout: float | None) -> dict[str, str]:
    """Nothing; raises DataError when it has not been said where validation images are to come from."""
    if holdout is None:
        raise DataError(
            f"source: {urls.redact(url)}: no validation images: give --source.holdout 0.1 to hold out a tenth of each "
            "class, or 0 to have none"
        )
    return {}


def refuse_holdout(holdout: float | None, validation: str) -> None:
    """Raise DataError when a share was to be held out of a source that has a validation split."""
    if holdout is not None:
        raise DataError(
            f"source.holdout: {holdout:g} is refused: the source has a validation split, {urls.redact(validation)}"
        )


def listed(source: FolderSource, places: Mapping[str, str]) -> Listing:
    """The listing of the folders that `roots` found.

    Raises DataError when there are fewer than two classes, a split without images, an unknown class or a missing label.
    """
    ignored: Counter[str] = Counter()
    classes, train = per_class(places["train"], None, ignored)
    splits = {"train": train}
    if "validation" in places:
        where = places["validation"]
        if source.labels:
            splits["validation"] = _labelled(where, source.labels, classes, ignored)
        else:
            splits["validation"] = per_class(where, classes, ignored)[1]
    elif source.holdout:
        splits["train"], splits["validation"] = listing.hold_out(train, source.holdout)
    return Listing(classes, (), splits, dict(sorted(ignored.items())))


def per_class(
    root: str, classes: Sequence[str] | None, ignored: Counter[str], bare: bool = False
) -> tuple[tuple[str, ...], SplitListing]:
    """Class names (sorted, or as given) and the listing of a folder of a folder per class.

    bare: keys are of the file names alone, without the class. Raises DataError for a class that is not in `classes`.
    """
    below = files.sizes(root)
    names = files.list_names(root)
    found = [name for name in names if name not in below and not _is_hidden(name)]
    ignored.update(_extension(name) for name in below)
    if hidden := sum(_is_hidden(name) for name in names if name not in below):
        ignored["hidden folders"] += hidden
    if classes is None:
        classes = tuple(found)
        listing.check_classes(root, classes)
    elif unknown := sorted(set(found) - set(classes)):
        raise DataError(
            f"source: {urls.redact(root)}: class {unknown[0]!r} is not among the {len(classes)} classes of the "
            f"training images ({len(unknown)} such classes)"
        )
    if not found and below:
        raise DataError(
            f"source: {urls.redact(root)}: {len(below)} files and no folder per class: their labels are needed "
            "(--source.labels, or the devkit of ILSVRC)"
        )
    numbers = {name: number for number, name in enumerate(classes)}

    def rows() -> Iterator[Row]:
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            walks = pool.map(lambda name: _walk(files.join(root, name)), found)
            for name, (images, others) in zip(found, walks, strict=True):
                ignored.update(others)
                for file in images:
                    path = f"{name}/{file.name}"
                    key = keys.of_name(file.name.rpartition("/")[2] if bare else path)
                    yield Row(key, path, numbers[name], 0, file.length)

    return tuple(classes), listing.split(root, False, rows())


def flat(root: str, ignored: Counter[str]) -> list[File]:
    """The images directly below a folder, by name."""
    found = files.sizes(root)
    ignored.update(_extension(name) for name in found if not is_image(name))
    return [File(name, found[name]) for name in sorted(found) if is_image(name)]


def is_image(name: str) -> bool:
    """Whether a name is that of an image; what macOS adds ("._a.jpg") and hidden files are none."""
    return _extension(name) in listing.EXTENSIONS and not _is_hidden(name.rpartition("/")[2])


def _labelled(root: str, labels: str, classes: Sequence[str], ignored: Counter[str]) -> SplitListing:
    told = _read_labels(labels, classes)
    images = flat(root, ignored)
    unlabelled = [file.name for file in images if file.name not in told and _stem(file.name) not in told]
    if unlabelled:
        raise DataError(
            f"source.labels: {urls.redact(labels)}: no line for {unlabelled[0]!r} ({len(unlabelled)} such images)"
        )
    names = {name for file in images for name in (file.name, _stem(file.name))}
    if missing := sorted(told.keys() - names):
        raise DataError(
            f"source: {urls.redact(files.join(root, missing[0]))}: missing: {urls.redact(labels)} has a label for it "
            f"({len(missing)} such images)"
        )
    rows = (
        Row(keys.of_name(name), name, told[name] if name in told else told[_stem(name)], 0, length)
        for name, length in images
    )
    return listing.split(root, False, rows)


def _read_labels(url: str, classes: Sequence[str]) -> dict[str, int]:
    """Label by file name, of lines such as "FILE CLASS", "FILE,CLASS ..." or with tabs."""
    numbers = {name: number for number, name in enumerate(classes)}
    shown = urls.redact(url)
    try:
        if files.size(url) > MAX_LABELS_BYTES:
            raise DataError(f"source.labels: {shown}: over {MAX_LABELS_BYTES} bytes: no list of labels")
        lines = files.read_bytes(url).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"source.labels: {shown}: missing") from None
    except UnicodeDecodeError as error:
        raise DataError(f"source.labels: {shown}: no text: {error}") from None
    told: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.split("\t") if "\t" in line else line.split(",", 1) if "," in line else line.rsplit(None, 1)
        name, label = fields[0].strip(), fields[1].strip() if len(fields) > 1 else ""
        if label not in numbers:
            label = label.partition(" ")[0]  # what follows may be boxes
        if label not in numbers:
            if number == 1:
                continue  # the names of the columns
            raise DataError(f"source.labels: {shown}: line {number}: {label!r} is no class of the training images")
        if told.setdefault(name, numbers[label]) != numbers[label]:
            raise DataError(f"source.labels: {shown}: line {number}: a second label for {name!r}")
    return told


def _walk(folder: str, depth: int = 0) -> tuple[list[File], Counter[str]]:
    """Images below a folder, deeper ones too, and the extensions of other files."""
    if depth > MAX_DEPTH:
        raise DataError(f"source: {urls.redact(folder)}: more than {MAX_DEPTH} folders deep: a link that goes round?")
    sizes = files.sizes(folder)
    images = [File(name, length) for name, length in sizes.items() if is_image(name)]
    others = Counter(_extension(name) for name in sizes if not is_image(name))
    for name in files.list_names(folder):
        if name in sizes or _is_hidden(name):
            continue
        below, more = _walk(files.join(folder, name), depth + 1)
        if not below and not more and not files.exists(files.join(folder, name)):
            raise DataError(f"source: {urls.redact(files.join(folder, name))}: unreadable: a link to nothing?")
        images += [File(f"{name}/{file.name}", file.length) for file in below]
        others += more
    return images, others


def _extension(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
