"""What a source holds, without the images: keys, labels and where each image lies."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.data.build import class_names
from orchestrator.data.build.sources.sample_keys import make_key
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import KeyColumn

# Other files are no images by their name: they are passed over and counted.
IMAGE_FILE_EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "webp", "tif", "tiff", "ppm"})


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
            numbers = (int(column[row]) for column in (self.labels, self.offsets, self.lengths))
            yield ImageRow(self.keys[row], self.names[row], *numbers)

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
        """A short hash of keys, labels and lengths: the same wherever the source lies."""
        digest = hashlib.sha256(repr((self.classes, self.titles)).encode())
        for name, split in sorted(self.splits.items()):
            digest.update(f"\0{name}\0{len(split)}\0".encode())
            for key in split.keys:
                digest.update(key.encode("utf-8", "surrogatepass") + b"\0")
            digest.update(split.labels.tobytes() + split.lengths.tobytes())
        return digest.hexdigest()[:16]


def build_split_listing(root: str, is_tar: bool, rows: Iterable[ImageRow]) -> SplitListing:
    """The listing of a split, sorted by key.

    Where keys are equal only because marks and emoji are left out of them, all keep theirs. Raises DataError when there
    is no image, or when two would still get the same key.
    """
    keys, names, paths, numbers = _TextColumn(), _TextColumn(), _TextColumn(), array("q")
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
    if any(keys.get_bytes(one) == keys.get_bytes(other) for one, other in pairwise(order)):
        origins = paths if len(paths) == len(names) else names
        keys = _TextColumn()
        for number in range(len(names)):
            keys.append(make_key(origins[number], keep_marks=True))
        order = sorted(range(len(keys)), key=keys.get_bytes)
    for one, other in pairwise(order):
        if keys.get_bytes(one) == keys.get_bytes(other):
            raise DataError(
                f"source: {shown}: {names[one]!r} and {names[other]!r} would both get the key {keys[one]!r}: rename one"
            )
    labels, offsets, lengths = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3)[order].T.copy()
    return SplitListing(
        root,
        is_tar,
        KeyColumn(keys[row] for row in order),
        KeyColumn(names[row] for row in order),
        labels,
        offsets,
        lengths,
    )


class _TextColumn:
    """Texts in one piece of memory while they come; objects of their own would take most of a large listing."""

    def __init__(self) -> None:
        self._joined, self._ends = bytearray(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        return self.get_bytes(number).decode("utf-8", "surrogatepass")

    def append(self, text: str) -> None:
        """One more."""
        self._joined += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._joined))

    def get_bytes(self, number: int) -> bytes:
        """A text's bytes, which sort as the texts do."""
        return bytes(self._joined[self._ends[number] : self._ends[number + 1]])


def hold_out(listing: SplitListing, share: float) -> tuple[SplitListing, SplitListing]:
    """Training and validation part of a split: of each class the share of images whose keys have the lowest hashes.

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
    """Raise DataError when there is nothing to tell apart, or a name that no dataset can have."""
    try:
        class_names.check_names(classes)
    except ValueError as error:
        raise DataError(f"source: {redaction.redact(root)}: {error}") from None
    if len(classes) < 2:
        names = ", ".join(classes) or "none"
        raise DataError(
            f"source: {redaction.redact(root)}: {len(classes)} class(es) ({names}): at least 2 are needed, "
            "a folder each"
        )
