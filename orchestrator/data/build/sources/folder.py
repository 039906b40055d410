"""A folder per class, on a disk or in any store: a listing with one file per image; labels of flat folders."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from orchestrator.config import redaction
from orchestrator.data.build.config import FolderSource, IlsvrcSource
from orchestrator.data.build.label_format import map_names_to_labels, normalize_name, read_text
from orchestrator.data.build.sources import listing
from orchestrator.data.build.sources.listing import ImageRow, SourceListing, SplitListing
from orchestrator.data.build.tar_reader import MemberRange, escape_undecodable
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

FolderImages = tuple[list[MemberRange], Counter[str]]  # images, and other files by extension


class ImageLister:
    """Lists the images of a source, which are then read in any order; `ignored` counts what is no image."""

    def __init__(self, source: FolderSource | IlsvrcSource) -> None:
        self._holdout = source.holdout
        self.ignored: Counter[str] = Counter()

    def find_roots(self) -> dict[str, str]:
        """Return the URL of the tar or folder of each split; held-out images lie in that of train.

        Raises DataError when there are no training images, or validation images neither there nor to be held out.
        """
        raise NotImplementedError

    def list_splits(self, roots: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, SplitListing]]:
        """Return classes, their titles, and the listing of the split of each root."""
        raise NotImplementedError

    def list_images(self, roots: Mapping[str, str]) -> SourceListing:
        """Return the listing of the images at these places.

        Raises DataError for images or labels that do not fit, StorageError when they cannot be read.
        """
        try:
            classes, titles, splits = self.list_splits(roots)
        except FileNotFoundError as error:
            raise DataError(f"source: removed while it was listed: {error}") from None
        if "validation" not in splits and self._holdout:
            splits["train"], splits["validation"] = listing.hold_out(splits["train"], self._holdout)
        return SourceListing(classes, titles, splits, dict(sorted(self.ignored.items())))

    def check_holdout(self, roots: Mapping[str, str]) -> None:
        """Raise DataError when validation images are neither there nor to be held out, or both."""
        if "validation" in roots and self._holdout is not None:
            raise DataError(
                f"source.holdout must not be set, got {self._holdout:g}: the source has a validation split, "
                f"{redaction.redact(roots['validation'])}"
            )
        if "validation" not in roots and self._holdout is None:
            raise DataError(
                f"source: {redaction.redact(roots['train'])}: no validation images: set --source.holdout 0.1 to hold "
                "out a tenth of each class, or 0 to have none"
            )

    def list_class_folders(
        self, root: str, classes: Sequence[str] | None, bare: bool = False
    ) -> tuple[tuple[str, ...], SplitListing]:
        """Return class names (sorted, or as given) and the listing of a folder of a folder per class.

        bare: keys are of the file names alone, without the class. Raises DataError for a class not in `classes`.
        """
        files, shown = file_io.list_sizes(root), redaction.redact(root)
        kinds = {name: _classify_ignored(root, name) for name in file_io.list_names(root) if name not in files}
        self.ignored.update(filter(None, kinds.values()))
        self.ignored.update(map(get_extension, files))
        folders = [name for name, kind in kinds.items() if not kind]
        if classes is None:
            classes = tuple(folders)
            listing.check_classes(root, classes)
        numbers = {normalize_name(name): number for number, name in enumerate(classes)}
        if unknown := sorted(name for name in folders if normalize_name(name) not in numbers):
            raise DataError(
                f"source: {shown}: class {unknown[0]!r} is not among the {len(classes)} classes of the training images "
                f"({len(unknown)} such classes)"
            )
        if not folders and files:
            raise DataError(
                f"source: {shown}: {len(files)} files and no folder per class: their labels are needed "
                "(--source.labels, or the devkit of ILSVRC)"
            )

        def rows() -> Iterator[ImageRow]:
            with ThreadPoolExecutor(LISTING_THREADS) as pool:
                walks = pool.map(lambda name: _walk_folder(file_io.join(root, name)), folders)
                for name, (images, others) in zip(folders, walks, strict=True):
                    self.ignored.update(others)
                    for file in images:
                        path = f"{name}/{file.name}"
                        named = file.name.rpartition("/")[2] if bare else path
                        label = numbers[normalize_name(name)]
                        yield ImageRow(listing.make_key(named), path, label, 0, file.length, named)

        return tuple(classes), listing.build_split_listing(root, False, rows())

    def list_flat_folder(self, root: str) -> list[MemberRange]:
        """Return the images directly below a folder, by name."""
        files = [MemberRange(name, 0, length) for name, length in sorted(file_io.list_sizes(root).items())]
        return self.select_images(files)

    def select_images(self, files: Sequence[MemberRange]) -> list[MemberRange]:
        """Return the files that are images by their names; count the others."""
        self.ignored.update(get_extension(file.name) for file in files if not is_image(file.name))
        return [file for file in files if is_image(file.name)]


class FolderLister(ImageLister):
    """Images in a folder per class."""

    def __init__(self, source: FolderSource) -> None:
        super().__init__(source)
        self._url, self._labels = source.url, source.labels

    def find_roots(self) -> dict[str, str]:
        """Return the URL of the folder of each split; a single tree is the training folder."""
        names, shown = file_io.list_names(self._url), redaction.redact(self._url)
        if not names:
            raise DataError(f"source.url: {shown}: empty, or no folder")
        roots = {"train": self._url}
        if "train" in names:
            found = [name for name in VALIDATION_NAMES if name in names]
            if len(found) > 1:
                raise DataError(f"source.url: {shown}: has both {' and '.join(found)}: remove one")
            roots["train"] = file_io.join(self._url, "train")
            if found:
                roots["validation"] = file_io.join(self._url, found[0])
        self.check_holdout(roots)
        return roots

    def list_splits(self, roots: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, SplitListing]]:
        """Return classes and splits; classes have no titles."""
        classes, train = self.list_class_folders(roots["train"], None)
        splits = {"train": train}
        if "validation" in roots and self._labels:
            splits["validation"] = self._list_labeled_folder(roots["validation"], classes)
        elif "validation" in roots:
            splits["validation"] = self.list_class_folders(roots["validation"], classes)[1]
        if roots["train"] != self._url:
            used = {urls.get_basename(root) for root in roots.values()} | file_io.list_sizes(self._url).keys()
            if others := set(file_io.list_names(self._url)) - used:
                self.ignored["folders beside train"] += len(others)
        return classes, (), splits

    def _list_labeled_folder(self, root: str, classes: Sequence[str]) -> SplitListing:
        images = self.list_flat_folder(root)
        names = {image.name: _get_label_names(image.name) for image in images}
        known = {label_name for label_names in names.values() for label_name in label_names}
        labels, shown = read_labels(self._labels, classes, known), redaction.redact(self._labels)
        unlabelled = [name for name, label_names in names.items() if not labels.keys() & label_names]
        if unlabelled:
            raise DataError(f"source.labels: {shown}: no line for {unlabelled[0]!r} ({len(unlabelled)} such images)")
        if missing := sorted(labels.keys() - known):
            raise DataError(
                f"source: {redaction.redact(file_io.join(root, missing[0]))}: missing: {shown} has a label for it "
                f"({len(missing)} such images)"
            )
        rows = (
            ImageRow(
                listing.make_key(image.name),
                image.name,
                next(labels[label_name] for label_name in names[image.name] if label_name in labels),
                0,
                image.length,
            )
            for image in images
        )
        return listing.build_split_listing(root, False, rows)


def read_labels(url: str, classes: Sequence[str], images: Collection[str]) -> dict[str, int]:
    """Return the label of each file that a list names, with or without extension, accents composed.

    The list has lines "FILE CLASS", "FILE,CLASS" or "FILE<tab>CLASS", with quotes where needed; the first may be the
    titles of the columns. A label is the whole name of a class. Raises DataError naming the line.
    """
    where, numbers = f"source.labels: {redaction.redact(url)}", map_names_to_labels(classes)
    labels: dict[str, int] = {}
    for number, line in enumerate(read_text(url, where).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, label = (normalize_name(column) for column in _split_line(line, images))
        except (ValueError, csv.Error):
            raise DataError(f"{where}: line {number}: must be FILE and CLASS, got {line[:80]!r}") from None
        if number == 1 and name not in images and label not in numbers:
            continue
        if label not in numbers:
            raise DataError(f"{where}: line {number}: {label!r} is no class of the training images")
        if labels.setdefault(name, numbers[label]) != numbers[label]:
            raise DataError(f"{where}: line {number}: a second label for {name!r}")
    return labels


def _split_line(line: str, images: Collection[str]) -> list[str]:
    for delimiter in "\t,":
        if delimiter in line:
            return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    parts = line.split(None, 1)
    return parts if parts[0] in images else line.rsplit(None, 1)


def _get_label_names(name: str) -> tuple[str, str]:
    """Return the names by which a list may call a file: with and without its extension."""
    return normalize_name(name), normalize_name(name.rpartition(".")[0])


# ------------------------------------------------------------------ files and folders
def is_image(name: str) -> bool:
    """Return whether a name is that of an image; what macOS adds ("._a.jpg") and hidden files are none."""
    return get_extension(name) in listing.IMAGE_FILE_EXTENSIONS and not name.rpartition("/")[2].startswith(".")


def get_extension(name: str) -> str:
    """Return what follows the last dot of a file's name, in lower case; empty when it has none."""
    return escape_undecodable(name.rpartition("/")[2].rpartition(".")[2].lower()) if "." in name else ""


def _walk_folder(folder: str, depth: int = 0) -> FolderImages:
    """Return the images below a folder, deeper ones too, and the extensions of other files."""
    if depth > MAX_DEPTH:
        raise DataError(f"source: {redaction.redact(folder)}: more than {MAX_DEPTH} folders deep: a cycle of links?")
    sizes = file_io.list_sizes(folder)
    images = [MemberRange(name, 0, length) for name, length in sizes.items() if is_image(name)]
    others = Counter(get_extension(name) for name in sizes if not is_image(name))
    for name in file_io.list_names(folder):
        if name in sizes:
            continue
        if not is_image(name) and (kind := _classify_ignored(folder, name)):
            others[kind] += 1
            continue
        below, more = _walk_folder(file_io.join(folder, name), depth + 1)
        if not below and not more and not file_io.exists(file_io.join(folder, name)):
            raise DataError(f"source: {redaction.redact(file_io.join(folder, name))}: unreadable: a link to nothing?")
        images += [MemberRange(f"{name}/{file.name}", 0, file.length) for file in below]
        others += more
    return images, others


def _classify_ignored(folder: str, name: str) -> str:
    """Return what is no file and to be ignored: a hidden or system folder, or a link to nothing; else nothing."""
    where = file_io.join(folder, name)
    if name.startswith("."):
        return "hidden folders"
    if name.lower() in SYSTEM_FOLDERS:
        return "system folders"
    return "links to nothing" if urls.is_local(where) and not file_io.exists(where) else ""
