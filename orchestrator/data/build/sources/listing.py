"""Listing of a source without its images: keys, labels and where each image lies; the lister of a folder per class."""

from __future__ import annotations

import csv
import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.data.build.label_format import check_names, map_names_to_labels, normalize_name, read_text
from orchestrator.data.build.tar_reader import MemberRange, escape_undecodable
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import KeyColumn
from orchestrator.storage import file_io, urls

VALIDATION_NAMES = ("validation", "val")
MAX_DEPTH = 8  # deeper trees are cycles of links
LISTING_THREADS = 16
# Folders that systems and programs add, in lower case: no classes, and their pictures do not belong to the dataset.
SYSTEM_FOLDERS = (
    "@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information", "#recycle", "@recycle", "#snapshot"
)  # fmt: skip
# Other files are no images by their name: they are passed over and counted.
IMAGE_FILE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "webp", "tif", "tiff", "ppm"})

# Letters and digits of any script, and what no file system, store or tar reader gives a meaning.
_ODD = re.compile(r"[^\w.\-+=@,()~]")
# Characters without a shape of their own; the two joiners make another letter or emoji of their neighbours.
_SHAPELESS, _JOINERS = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zs", "Zl", "Zp"}), "\u200c\u200d"
_EXTENSION = re.compile(r"(?<=.)\.[A-Za-z0-9]{1,5}$")


class ImageRow(NamedTuple):
    """One image of a source."""

    key: str
    name: str  # of the file below the root, or of the member (OUTER/INNER in a tar of tars)
    label: int
    offset: int
    length: int  # bytes
    path: str = ""  # what the key is made of, when it is not the name


@dataclass(frozen=True)
class SplitListing:
    """Columns over the N images of a split, sorted by key."""

    root: str  # URL of the tar that holds the images, or of the folder below which `names` lie
    is_tar: bool
    keys: KeyColumn
    names: KeyColumn
    labels: NDArray[np.int64]  # N
    offsets: NDArray[np.int64]  # N, byte of the tar or file where the image begins
    lengths: NDArray[np.int64]  # N, bytes

    def __len__(self) -> int:
        return len(self.labels)

    def to_columns(self) -> dict[str, list[Any]]:
        """Return the columns that make an ImageRow, in its order, as JSON has them."""
        texts = {"keys": list(self.keys), "names": list(self.names)}
        return {**texts, **{name: getattr(self, name).tolist() for name in ("labels", "offsets", "lengths")}}

    def select_rows(self, rows: NDArray[np.int64]) -> SplitListing:
        """Return some of the rows, in that order."""
        keys, names = (KeyColumn(column[row] for row in rows.tolist()) for column in (self.keys, self.names))
        numbers = (column[rows] for column in (self.labels, self.offsets, self.lengths))
        return SplitListing(self.root, self.is_tar, keys, names, *numbers)


@dataclass(frozen=True)
class SourceListing:
    """All that is to be packed."""

    classes: tuple[str, ...]
    titles: tuple[str, ...]
    splits: Mapping[str, SplitListing]
    ignored: Mapping[str, int]  # files that are no images by their name, by extension

    def digest(self) -> str:
        """Return a short hash of keys, labels and lengths: the same wherever the source lies."""
        digest = hashlib.sha256(repr((self.classes, self.titles)).encode())
        for name, split in sorted(self.splits.items()):
            digest.update(f"\0{name}\0{len(split)}\0".encode())
            for number in range(len(split)):
                digest.update(split.keys.get_bytes(number) + b"\0")
            digest.update(split.labels.tobytes() + split.lengths.tobytes())
        return digest.hexdigest()[:16]


def build_split_listing(root: str, is_tar: bool, rows: Iterable[ImageRow]) -> SplitListing:
    """Return the listing of a split, sorted by key; where keys would be equal, all keep their marks and emoji.

    Raises DataError when there is no image, or when two would still get the same key.
    """
    keys, names, paths, numbers = KeyColumn(), KeyColumn(), KeyColumn(), array("q")
    for row in rows:
        keys.append(row.key)
        names.append(row.name)
        if row.path not in ("", row.name):
            paths.append(row.path)
        numbers.extend((row.label, row.offset, row.length))
    shown = redaction.redact(root)
    if not numbers:
        raise DataError(f"source: {shown}: no images there")
    order = sorted(range(len(keys)), key=keys.get_bytes)
    if _find_equal_neighbours(keys, order):
        keys = KeyColumn(make_key(path, keep_marks=True) for path in (paths if len(paths) == len(names) else names))
        order = sorted(range(len(keys)), key=keys.get_bytes)
        if equal := _find_equal_neighbours(keys, order):
            one, other = equal
            both = f"{names[one]!r} and {names[other]!r}"
            raise DataError(f"source: {shown}: {both} would both get the key {keys[one]!r}: rename one")
    labels, offsets, lengths = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3)[order].T.copy()
    sorted_keys, sorted_names = (KeyColumn(column[row] for row in order) for column in (keys, names))
    return SplitListing(root, is_tar, sorted_keys, sorted_names, labels, offsets, lengths)


def _find_equal_neighbours(keys: KeyColumn, order: list[int]) -> tuple[int, int] | None:
    equal = (pair for pair in pairwise(order) if keys.get_bytes(pair[0]) == keys.get_bytes(pair[1]))
    return next(equal, None)


def build_flat_listing(
    root: str, is_tar: bool, images: Sequence[MemberRange], labels: Mapping[str, int], where: str
) -> SplitListing:
    """Return the listing of images whose labels are known by name, in NFC and with or without extension.

    Raises DataError, which begins with `where`, when labels and images do not fit.
    """
    rows, left = list[ImageRow](), dict(labels)
    for image in images:
        path = image.name.rpartition("/")[2]
        names = (normalize_name(path), normalize_name(path.rpartition(".")[0]))
        label = next((label for name in names if (label := left.pop(name, None)) is not None), None)
        if label is None:
            raise DataError(f"{where}: no label for {path!r} ({len(labels)} labels, {len(images)} images)")
        rows.append(ImageRow(make_key(path), image.name, label, image.offset, image.length, path))
    if left:
        raise DataError(f"{where}: a label for {min(left)!r}, which is missing ({len(left)} such images)")
    return build_split_listing(root, is_tar, rows)


def hold_out(listing: SplitListing, share: float) -> tuple[SplitListing, SplitListing]:
    """Return training and validation part: of each class the share of images whose keys have the lowest hashes.

    Each class keeps at least one training image. Neither a seed nor the other classes have a part in it.
    """
    view = (xxhash.xxh3_64_intdigest(f"holdout\0{key}".encode("utf-8", "surrogatepass")) for key in listing.keys)
    hashes = np.fromiter(view, dtype=np.uint64, count=len(listing))
    order = np.lexsort((hashes, listing.labels))
    sizes = np.bincount(listing.labels)
    held = np.minimum(np.floor(sizes * share + 0.5).astype(np.int64), np.maximum(sizes - 1, 0))
    sorted_labels = listing.labels[order]
    rank = np.arange(len(listing)) - (np.cumsum(sizes) - sizes)[sorted_labels]
    chosen = np.zeros(len(listing), dtype=bool)
    chosen[order[rank < held[sorted_labels]]] = True
    return listing.select_rows(np.flatnonzero(~chosen)), listing.select_rows(np.flatnonzero(chosen))


def number_classes(root: str, found: Collection[str], classes: Sequence[str] | None) -> dict[str, int]:
    """Return the label of each class by its name, in NFC: of `classes`, or of those that are found.

    Raises DataError for fewer than two classes, unfit names, and a class that is not in `classes`.
    """
    where = f"source: {redaction.redact(root)}"
    names = sorted(found) if classes is None else classes
    try:
        check_names(names)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if len(names) < 2:
        raise DataError(f"{where}: {len(names)} class(es) ({', '.join(names) or 'none'}): at least 2 are needed")
    numbers = {normalize_name(name): number for number, name in enumerate(names)}
    if unknown := sorted(name for name in found if normalize_name(name) not in numbers):
        raise DataError(f"{where}: class {unknown[0]!r} is not among the {len(names)} classes ({len(unknown)} such)")
    return numbers


def make_key(name: str, keep_marks: bool = False) -> str:
    """Return the key of a file or member: its path without root, ".." and extension, odd characters as "_".

    keep_marks: combining marks, emoji and symbols beyond ASCII are not odd. No name becomes a path to write to.
    """
    if keep_marks:
        name = unicodedata.normalize("NFC", name)
    replace = _replace_odd_character if keep_marks else "_"
    parts = [_ODD.sub(replace, part) for part in name.split("/") if part not in ("", ".", "..")]
    if not parts:
        return "_"
    # WebDataset cuts names at the first dot of the last component.
    parts[-1] = _EXTENSION.sub("", parts[-1]).replace(".", "_")
    return "/".join(parts)


def _replace_odd_character(odd: re.Match[str]) -> str:
    letter = odd[0]
    is_kept = letter in _JOINERS or not (letter.isascii() or unicodedata.category(letter) in _SHAPELESS)
    return letter if is_kept else "_"


# ------------------------------------------------------------------ images in folders
class FolderLister:
    """Lists images in a folder per class, which are then read in any order; `ignored` counts what is no image."""

    def __init__(self, url: str, holdout: float | None, labels: str = "") -> None:
        self._url, self._holdout, self._labels = url, holdout, labels
        self.ignored: Counter[str] = Counter()

    def check_holdout(self, roots: Mapping[str, str]) -> None:
        """Raise DataError when validation images are neither there nor to be held out, or both."""
        if "validation" in roots and self._holdout is not None:
            shown = redaction.redact(roots["validation"])
            raise DataError(f"source.holdout must not be set: the source has a validation split, {shown}")
        if "validation" not in roots and self._holdout is None:
            shown = redaction.redact(roots["train"])
            raise DataError(f"source: {shown}: no validation images: set --source.holdout 0.1, or 0 to have none")

    def build_listing(
        self, classes: tuple[str, ...], titles: tuple[str, ...], train: SplitListing, validation: SplitListing | None
    ) -> SourceListing:
        """Return the listing of all splits; without validation images the share is held out."""
        splits = {"train": train} if validation is None else {"train": train, "validation": validation}
        if validation is None and self._holdout:
            splits["train"], splits["validation"] = hold_out(train, self._holdout)
            if not len(splits["validation"]):
                most = np.bincount(train.labels).max()
                what = f"holds out no image: no class has more than {most}"
                raise DataError(f"source.holdout {self._holdout:g} {what}; set a larger share, or 0 to have none")
        return SourceListing(classes, titles, splits, dict(sorted(self.ignored.items())))

    def list_class_folders(
        self, root: str, classes: Sequence[str] | None, bare: bool = False
    ) -> tuple[tuple[str, ...], SplitListing]:
        """Return class names and the listing of a folder of a folder per class; `bare` keys are without the class."""
        files = file_io.list_sizes(root)
        kinds = {name: _classify_ignored(root, name) for name in file_io.list_names(root) if name not in files}
        self.ignored.update(filter(None, kinds.values()))
        self.ignored.update(map(get_extension, files))
        folders = [name for name, kind in kinds.items() if not kind]
        if not folders and files and classes is not None:
            what = f"source: {redaction.redact(root)}: {len(files)} files and no folder per class"
            raise DataError(f"{what}: their labels are needed (--source.labels, or the devkit of ILSVRC)")
        numbers = number_classes(root, folders, classes)

        def rows() -> Iterator[ImageRow]:
            with ThreadPoolExecutor(LISTING_THREADS) as pool:
                walks = pool.map(lambda name: _walk_folder(file_io.join(root, name)), folders)
                for name, (images, others) in zip(folders, walks, strict=True):
                    self.ignored.update(others)
                    for image in images:
                        path = f"{name}/{image.name}"
                        named = image.name.rpartition("/")[2] if bare else path
                        label = numbers[normalize_name(name)]
                        yield ImageRow(make_key(named), path, label, 0, image.length, named)

        return tuple(folders if classes is None else classes), build_split_listing(root, False, rows())

    def list_flat_folder(self, root: str) -> list[MemberRange]:
        """Return the images directly below a folder, by name."""
        files = [MemberRange(name, 0, length) for name, length in sorted(file_io.list_sizes(root).items())]
        return self.select_images(files)

    def select_images(self, files: Sequence[MemberRange]) -> list[MemberRange]:
        """Return the files that are images by their names; count the others."""
        self.ignored.update(get_extension(file.name) for file in files if not is_image(file.name))
        return [file for file in files if is_image(file.name)]

    def find_roots(self) -> dict[str, str]:
        """Return the URL of the folder of each split; a single tree is the training folder. Raises DataError."""
        names, shown = file_io.list_names(self._url), redaction.redact(self._url)
        if not names:
            raise DataError(f"source.url: {shown}: empty, or no folder")
        if "train" not in names:
            roots = {"train": self._url}
        elif all(name in names for name in VALIDATION_NAMES):
            raise DataError(f"source.url: {shown}: has both {' and '.join(VALIDATION_NAMES)}: remove one")
        else:
            roots = {name: file_io.join(self._url, name) for name in ("train", *VALIDATION_NAMES) if name in names}
            roots |= {"validation": roots.pop("val")} if "val" in roots else {}
        self.check_holdout(roots)
        return roots

    def list_images(self, roots: Mapping[str, str]) -> SourceListing:
        """Return the listing of what `find_roots` returned. Raises DataError for images or labels that do not fit."""
        classes, train = self.list_class_folders(roots["train"], None)
        validation = None
        if "validation" in roots and self._labels:
            images, labels = self.list_flat_folder(roots["validation"]), read_labels(self._labels, classes)
            where = f"source.labels: {redaction.redact(self._labels)}"
            validation = build_flat_listing(roots["validation"], False, images, labels, where)
        elif "validation" in roots:
            validation = self.list_class_folders(roots["validation"], classes)[1]
        if roots["train"] != self._url:
            used = {urls.get_basename(root) for root in roots.values()} | file_io.list_sizes(self._url).keys()
            if others := set(file_io.list_names(self._url)) - used:
                self.ignored["folders beside train"] += len(others)
        return self.build_listing(classes, (), train, validation)


def read_labels(url: str, classes: Sequence[str]) -> dict[str, int]:
    """Return the label of each file, in NFC, by lines of file and class with a space, comma or tab between them.

    A label is the whole name of a class. Raises DataError naming the line.
    """
    where, numbers = f"source.labels: {redaction.redact(url)}", map_names_to_labels(classes)
    labels: dict[str, int] = {}
    for number, line in enumerate(read_text(url, where).splitlines(), start=1):
        delimiter = next((delimiter for delimiter in "\t," if delimiter in line), None)
        cells = csv.reader([line], delimiter=delimiter or "\t", skipinitialspace=True)
        try:
            row = next(cells) if delimiter else line.split(None, 1)
        except csv.Error as error:
            raise DataError(f"{where}: line {number}: {error}") from None
        if not line.strip() or (number == 1 and not is_image(row[0]) and normalize_name(row[-1]) not in numbers):
            continue
        if len(row) != 2 or (label := numbers.get(normalize_name(row[1]))) is None:
            rule = "must be a file and a class of the training images"
            raise DataError(f"{where}: line {number}: {rule}, got {line[:80]!r}")
        if labels.setdefault(normalize_name(row[0]), label) != label:
            raise DataError(f"{where}: line {number}: a second label for {row[0]!r}")
    return labels


# ------------------------------------------------------------------ files and folders
def is_image(name: str) -> bool:
    """Return whether a name is that of an image; what macOS adds ("._a.jpg") and hidden files are none."""
    return get_extension(name) in IMAGE_FILE_EXTENSIONS and not name.rpartition("/")[2].startswith(".")


def get_extension(name: str) -> str:
    """Return what follows the last dot of a file's name, in lower case; empty when it has none."""
    return escape_undecodable(name.rpartition("/")[2].rpartition(".")[2].lower()) if "." in name else ""


def _walk_folder(folder: str, depth: int = 0) -> tuple[list[MemberRange], Counter[str]]:
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
