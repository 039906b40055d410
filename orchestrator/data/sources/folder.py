"""A folder per class, on a disk or in any store: a listing with one file per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from orchestrator.data.errors import DataError
from orchestrator.data.labels import normal
from orchestrator.data.sources import keys, label_file, listing
from orchestrator.data.sources.config import FolderSource
from orchestrator.data.sources.listing import Listing, Row, SplitListing
from orchestrator.data.tars import escape_undecodable
from orchestrator.storage import files, urls

VALIDATION_NAMES = ("validation", "val")
# Deeper trees are links that go round.
MAX_DEPTH = 8
LISTING_THREADS = 16
# Folders that systems and programs add, in lower case: no classes, and their pictures are nobody's.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information", "#recycle", "@recycle",
     "#snapshot"}
)  # fmt: skip
_HIDDEN, _SYSTEM, _DANGLING = "hidden folders", "system folders", "links to nothing"


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
    if places["train"] != source.url:
        used = {urls.name(place) for place in places.values()}
        others = {name for name in files.list_names(source.url) if name not in used} - files.sizes(source.url).keys()
        if others:
            ignored["folders beside train"] += len(others)
    return Listing(classes, (), splits, dict(sorted(ignored.items())))


def per_class(
    root: str, classes: Sequence[str] | None, ignored: Counter[str], bare: bool = False
) -> tuple[tuple[str, ...], SplitListing]:
    """Class names (sorted, or as given) and the listing of a folder of a folder per class.

    bare: keys are of the file names alone, without the class. Raises DataError for a class that is not in `classes`.
    """
    below = files.sizes(root)
    names = files.list_names(root)
    found = [name for name in names if name not in below and not _is_passed_over(root, name, ignored)]
    ignored.update(_extension(name) for name in below)
    if classes is None:
        classes = tuple(found)
        listing.check_classes(root, classes)
    elif unknown := sorted(name for name in found if normal(name) not in set(map(normal, classes))):
        raise DataError(
            f"source: {urls.redact(root)}: class {unknown[0]!r} is not among the {len(classes)} classes of the "
            f"training images ({len(unknown)} such classes)"
        )
    if not found and below:
        raise DataError(
            f"source: {urls.redact(root)}: {len(below)} files and no folder per class: their labels are needed "
            "(--source.labels, or the devkit of ILSVRC)"
        )
    numbers = {normal(name): number for number, name in enumerate(classes)}

    def rows() -> Iterator[Row]:
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            walks = pool.map(lambda name: _walk(files.join(root, name)), found)
            for name, (images, others) in zip(found, walks, strict=True):
                ignored.update(others)
                for file in images:
                    path = f"{name}/{file.name}"
                    named = file.name.rpartition("/")[2] if bare else path
                    yield Row(keys.of_name(named), path, numbers[normal(name)], 0, file.length, named)

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
    images = flat(root, ignored)
    names = {normal(name) for file in images for name in (file.name, _stem(file.name))}
    told = label_file.read_labels(labels, classes, names)
    found = [told.get(normal(file.name), told.get(normal(_stem(file.name)))) for file in images]
    unlabelled = [file.name for file, label in zip(images, found, strict=True) if label is None]
    if unlabelled:
        raise DataError(
            f"source.labels: {urls.redact(labels)}: no line for {unlabelled[0]!r} ({len(unlabelled)} such images)"
        )
    if missing := sorted(told.keys() - names):
        raise DataError(
            f"source: {urls.redact(files.join(root, missing[0]))}: missing: {urls.redact(labels)} has a label for it "
            f"({len(missing)} such images)"
        )
    rows = (
        Row(keys.of_name(name), name, label, 0, length)
        for (name, length), label in zip(images, found, strict=True)
        if label is not None
    )
    return listing.split(root, False, rows)


def _walk(folder: str, depth: int = 0) -> tuple[list[File], Counter[str]]:
    """Images below a folder, deeper ones too, and the extensions of other files."""
    if depth > MAX_DEPTH:
        raise DataError(f"source: {urls.redact(folder)}: more than {MAX_DEPTH} folders deep: a link that goes round?")
    sizes = files.sizes(folder)
    images = [File(name, length) for name, length in sizes.items() if is_image(name)]
    others = Counter(_extension(name) for name in sizes if not is_image(name))
    for name in files.list_names(folder):
        if name in sizes or (not is_image(name) and _is_passed_over(folder, name, others)):
            continue
        below, more = _walk(files.join(folder, name), depth + 1)
        if not below and not more and not files.exists(files.join(folder, name)):
            raise DataError(f"source: {urls.redact(files.join(folder, name))}: unreadable: a link to nothing?")
        images += [File(f"{name}/{file.name}", file.length) for file in below]
        others += more
    return images, others


def _is_passed_over(folder: str, name: str, ignored: Counter[str]) -> bool:
    """Whether what is no file is a hidden folder, one of the system, or no folder at all; it is then counted."""
    where = files.join(folder, name)
    kind = ""
    if _is_hidden(name):
        kind = _HIDDEN
    elif name.lower() in SYSTEM_FOLDERS:
        kind = _SYSTEM
    elif urls.is_local(where) and not files.exists(where):
        kind = _DANGLING
    if kind:
        ignored[kind] += 1
    return bool(kind)


def _extension(name: str) -> str:
    return escape_undecodable(name.rpartition("/")[2].rpartition(".")[2].lower()) if "." in name else ""


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
