"""A folder per class, on a disk or in any store: a listing with one file per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from orchestrator.config import redaction
from orchestrator.data.build.label_format import normalize_name
from orchestrator.data.build.sources import label_file, listing
from orchestrator.data.build.sources.config import FolderSource
from orchestrator.data.build.sources.listing import ImageRow, SourceListing, SplitListing
from orchestrator.data.build.tar_reader import escape_undecodable
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io, urls

VALIDATION_NAMES = ("validation", "val")
# Deeper trees are cycles of links.
MAX_DEPTH = 8
LISTING_THREADS = 16
# Folders that systems and programs add, in lower case: no classes, and their pictures do not belong to the dataset.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information", "#recycle", "@recycle",
     "#snapshot"}
)  # fmt: skip
_HIDDEN, _SYSTEM, _DANGLING = "hidden folders", "system folders", "links to nothing"


class ImageFile(NamedTuple):
    """An image of a folder."""

    name: str  # below the folder
    length: int


def find_roots(source: FolderSource) -> dict[str, str]:
    """Return the URL of the folder of each split; a single tree is the training folder.

    Raises DataError when there is nothing, or validation images neither there nor to be held out.
    """
    names = file_io.list_names(source.url)
    shown = redaction.redact(source.url)
    if not names:
        raise DataError(f"source.url: {shown}: empty, or no folder")
    if "train" not in names:
        return {"train": source.url, **require_holdout(source.url, source.holdout)}
    found = [name for name in VALIDATION_NAMES if name in names]
    if len(found) > 1:
        raise DataError(f"source.url: {shown}: has both {' and '.join(found)}: remove one")
    train = file_io.join(source.url, "train")
    if not found:
        return {"train": train, **require_holdout(source.url, source.holdout)}
    check_no_holdout(source.holdout, file_io.join(source.url, found[0]))
    return {"train": train, "validation": file_io.join(source.url, found[0])}


def require_holdout(url: str, holdout: float | None) -> dict[str, str]:
    """Raise DataError when neither validation images nor a share to hold out are given; else return no place."""
    if holdout is None:
        raise DataError(
            f"source: {redaction.redact(url)}: no validation images: set --source.holdout 0.1 to hold out a tenth of "
            "each class, or 0 to have none"
        )
    return {}


def check_no_holdout(holdout: float | None, validation: str) -> None:
    """Raise DataError when a share was to be held out of a source that has a validation split."""
    if holdout is not None:
        raise DataError(
            f"source.holdout must not be set, got {holdout:g}: the source has a validation split, "
            f"{redaction.redact(validation)}"
        )


def list_images(source: FolderSource, places: Mapping[str, str]) -> SourceListing:
    """Return the listing of the folders that `find_roots` returned.

    Raises DataError when there are fewer than two classes, a split without images, an unknown class or a missing label.
    """
    ignored: Counter[str] = Counter()
    classes, train = list_class_folders(places["train"], None, ignored)
    splits = {"train": train}
    if "validation" in places:
        where = places["validation"]
        if source.labels:
            splits["validation"] = _list_labeled_folder(where, source.labels, classes, ignored)
        else:
            splits["validation"] = list_class_folders(where, classes, ignored)[1]
    elif source.holdout:
        splits["train"], splits["validation"] = listing.hold_out(train, source.holdout)
    if places["train"] != source.url:
        used = {urls.get_basename(place) for place in places.values()}
        others = set(file_io.list_names(source.url)) - used - file_io.list_sizes(source.url).keys()
        if others:
            ignored["folders beside train"] += len(others)
    return SourceListing(classes, (), splits, dict(sorted(ignored.items())))


def list_class_folders(
    root: str, classes: Sequence[str] | None, ignored: Counter[str], bare: bool = False
) -> tuple[tuple[str, ...], SplitListing]:
    """Return class names (sorted, or as given) and the listing of a folder of a folder per class.

    bare: keys are of the file names alone, without the class. Raises DataError for a class that is not in `classes`.
    """
    below = file_io.list_sizes(root)
    names = file_io.list_names(root)
    found = [name for name in names if name not in below and not _count_if_ignored(root, name, ignored)]
    ignored.update(get_extension(name) for name in below)
    if classes is None:
        classes = tuple(found)
        listing.check_classes(root, classes)
    elif unknown := sorted(name for name in found if normalize_name(name) not in set(map(normalize_name, classes))):
        raise DataError(
            f"source: {redaction.redact(root)}: class {unknown[0]!r} is not among the {len(classes)} classes of the "
            f"training images ({len(unknown)} such classes)"
        )
    if not found and below:
        raise DataError(
            f"source: {redaction.redact(root)}: {len(below)} files and no folder per class: their labels are needed "
            "(--source.labels, or the devkit of ILSVRC)"
        )
    numbers = {normalize_name(name): number for number, name in enumerate(classes)}

    def rows() -> Iterator[ImageRow]:
        with ThreadPoolExecutor(LISTING_THREADS) as pool:
            walks = pool.map(lambda name: _walk_folder(file_io.join(root, name)), found)
            for name, (images, others) in zip(found, walks, strict=True):
                ignored.update(others)
                for file in images:
                    path = f"{name}/{file.name}"
                    named = file.name.rpartition("/")[2] if bare else path
                    label = numbers[normalize_name(name)]
                    yield ImageRow(listing.make_key(named), path, label, 0, file.length, named)

    return tuple(classes), listing.build_split_listing(root, False, rows())


def list_flat_folder(root: str, ignored: Counter[str]) -> list[ImageFile]:
    """Return the images directly below a folder, by name."""
    sizes = file_io.list_sizes(root)
    ignored.update(get_extension(name) for name in sizes if not is_image(name))
    return [ImageFile(name, sizes[name]) for name in sorted(sizes) if is_image(name)]


def is_image(name: str) -> bool:
    """Return whether a name is that of an image; what macOS adds ("._a.jpg") and hidden files are none."""
    return get_extension(name) in listing.IMAGE_FILE_EXTENSIONS and not _is_hidden(name.rpartition("/")[2])


def _list_labeled_folder(root: str, labels: str, classes: Sequence[str], ignored: Counter[str]) -> SplitListing:
    images = list_flat_folder(root, ignored)
    names = {name: _get_label_names(name) for name, _ in images}
    known = {label_name for label_names in names.values() for label_name in label_names}
    listed, shown = label_file.read_labels(labels, classes, known), redaction.redact(labels)
    unlabelled = [name for name, label_names in names.items() if not listed.keys() & label_names]
    if unlabelled:
        raise DataError(f"source.labels: {shown}: no line for {unlabelled[0]!r} ({len(unlabelled)} such images)")
    if missing := sorted(listed.keys() - known):
        raise DataError(
            f"source: {redaction.redact(file_io.join(root, missing[0]))}: missing: {shown} has a label for it "
            f"({len(missing)} such images)"
        )

    def rows() -> Iterator[ImageRow]:
        for name, length in images:
            label = next(listed[label_name] for label_name in names[name] if label_name in listed)
            yield ImageRow(listing.make_key(name), name, label, 0, length)

    return listing.build_split_listing(root, False, rows())


def _get_label_names(name: str) -> tuple[str, str]:
    """Return the names by which a list may call a file: with and without its extension."""
    return normalize_name(name), normalize_name(name.rpartition(".")[0])


def _walk_folder(folder: str, depth: int = 0) -> tuple[list[ImageFile], Counter[str]]:
    """Return the images below a folder, deeper ones too, and the extensions of other files."""
    if depth > MAX_DEPTH:
        raise DataError(f"source: {redaction.redact(folder)}: more than {MAX_DEPTH} folders deep: a cycle of links?")
    sizes = file_io.list_sizes(folder)
    images = [ImageFile(name, length) for name, length in sizes.items() if is_image(name)]
    others = Counter(get_extension(name) for name in sizes if not is_image(name))
    for name in file_io.list_names(folder):
        if name in sizes or (not is_image(name) and _count_if_ignored(folder, name, others)):
            continue
        below, more = _walk_folder(file_io.join(folder, name), depth + 1)
        if not below and not more and not file_io.exists(file_io.join(folder, name)):
            raise DataError(f"source: {redaction.redact(file_io.join(folder, name))}: unreadable: a link to nothing?")
        images += [ImageFile(f"{name}/{file.name}", file.length) for file in below]
        others += more
    return images, others


def _count_if_ignored(folder: str, name: str, ignored: Counter[str]) -> bool:
    """Return whether what is no file is a hidden or system folder, or a link to nothing; count it if so."""
    where = file_io.join(folder, name)
    kind = ""
    if _is_hidden(name):
        kind = _HIDDEN
    elif name.lower() in SYSTEM_FOLDERS:
        kind = _SYSTEM
    elif urls.is_local(where) and not file_io.exists(where):
        kind = _DANGLING
    if kind:
        ignored[kind] += 1
    return bool(kind)


def get_extension(name: str) -> str:
    """Return what follows the last dot of a file's name, in lower case; empty when it has none."""
    return escape_undecodable(name.rpartition("/")[2].rpartition(".")[2].lower()) if "." in name else ""


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
