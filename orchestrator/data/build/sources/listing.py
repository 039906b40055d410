"""Listing of a source without its images: keys, labels and where each image lies; and keys from names of files."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.data.build import label_format
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import KeyColumn

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

    def iter_rows(self, rows: NDArray[np.int64]) -> Iterator[ImageRow]:
        """Yield some of the images, in the order of `rows`."""
        for row in rows.tolist():
            label, offset, length = (int(column[row]) for column in (self.labels, self.offsets, self.lengths))
            yield ImageRow(self.keys[row], self.names[row], label, offset, length)

    def select_rows(self, rows: NDArray[np.int64]) -> SplitListing:
        """Return some of the rows, in that order."""
        keys, names = (KeyColumn(column[row] for row in rows.tolist()) for column in (self.keys, self.names))
        return SplitListing(
            self.root, self.is_tar, keys, names, self.labels[rows], self.offsets[rows], self.lengths[rows]
        )


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
    """Return the listing of a split, sorted by key.

    Where keys are equal only because marks and emoji are left out of them, all keep theirs. Raises DataError when there
    is no image, or when two would still get the same key.
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
            raise DataError(
                f"source: {shown}: {names[one]!r} and {names[other]!r} would both get the key {keys[one]!r}: rename one"
            )
    labels, offsets, lengths = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3)[order].T.copy()
    sorted_keys, sorted_names = (KeyColumn(column[row] for row in order) for column in (keys, names))
    return SplitListing(root, is_tar, sorted_keys, sorted_names, labels, offsets, lengths)


def _find_equal_neighbours(keys: KeyColumn, order: list[int]) -> tuple[int, int] | None:
    equal = (pair for pair in pairwise(order) if keys.get_bytes(pair[0]) == keys.get_bytes(pair[1]))
    return next(equal, None)


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


def check_classes(root: str, classes: tuple[str, ...]) -> None:
    """Raise DataError when there are fewer than two classes, or a name that no dataset can have."""
    try:
        label_format.check_names(classes)
    except ValueError as error:
        raise DataError(f"source: {redaction.redact(root)}: {error}") from None
    if len(classes) < 2:
        raise DataError(
            f"source: {redaction.redact(root)}: {len(classes)} class(es) ({', '.join(classes) or 'none'}): at least 2 "
            "are needed, a folder each"
        )


def make_key(name: str, keep_marks: bool = False) -> str:
    """Return the key of a file or member: its path without root, ".." and extension, odd characters as "_".

    keep_marks: combining marks, emoji and other symbols beyond ASCII are not odd, and accents are composed. A name is
    never used as a path to write to.
    """
    if keep_marks:
        name = unicodedata.normalize("NFC", name)
    parts = [
        _ODD.sub(_replace_odd_character if keep_marks else "_", part)
        for part in name.split("/")
        if part not in ("", ".", "..")
    ]
    if not parts:
        return "_"
    # WebDataset cuts names at the first dot of the last component.
    parts[-1] = _EXTENSION.sub("", parts[-1]).replace(".", "_")
    return "/".join(parts)


def _replace_odd_character(odd: re.Match[str]) -> str:
    letter = odd[0]
    is_kept = letter in _JOINERS or not (letter.isascii() or unicodedata.category(letter) in _SHAPELESS)
    return letter if is_kept else "_"
