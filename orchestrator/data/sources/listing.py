"""What a source holds, without the images: keys, labels and where each image lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from orchestrator.data.errors import DataError
from orchestrator.data.index import Keys
from orchestrator.storage import urls

# Other files are no images by their name: they are passed over and counted.
EXTENSIONS = frozenset({"jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "webp", "tif", "tiff", "ppm"})


class Row(NamedTuple):
    """One image of a source."""

    key: str
    name: str  # of the file below the root, or of the member (OUTER/INNER in a tar of tars)
    label: int
    offset: int
    length: int  # bytes


@dataclass(frozen=True)
class SplitListing:
    """Columns over the N images of a split, sorted by key."""

    root: str  # URL of the tar that holds the images, or of the folder below which `names` lie
    is_tar: bool
    keys: Keys
    names: Keys
    labels: NDArray[np.int64]  # N
    offsets: NDArray[np.int64]  # N, byte of the tar or file where the image begins
    lengths: NDArray[np.int64]  # N, bytes

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> SplitListing:
        """Some of the rows, in that order."""
        keys, names = (Keys(column[row] for row in rows.tolist()) for column in (self.keys, self.names))
        return SplitListing(
            self.root, self.is_tar, keys, names, self.labels[rows], self.offsets[rows], self.lengths[rows]
        )


@dataclass(frozen=True)
class Listing:
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


def split(root: str, is_tar: bool, rows: Iterable[Row]) -> SplitListing:
    """The listing of a split, sorted by key.

    Raises DataError when there is no image, or when two would get the same key.
    """
    found = sorted(rows)
    if not found:
        raise DataError(f"source: {urls.redact(root)}: no images there")
    for one, other in pairwise(found):
        if one.key == other.key:
            raise DataError(
                f"source: {urls.redact(root)}: {one.name!r} and {other.name!r} would both get the key {one.key!r}: "
                "rename one"
            )
    labels, offsets, lengths = (
        np.fromiter(column, dtype=np.int64, count=len(found))
        for column in (
            (row.label for row in found),
            (row.offset for row in found),
            (row.length for row in found),
        )
    )
    keys, names = Keys(row.key for row in found), Keys(row.name for row in found)
    return SplitListing(root, is_tar, keys, names, labels, offsets, lengths)


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
    return listing.take(np.flatnonzero(~chosen)), listing.take(np.flatnonzero(chosen))


def check_classes(root: str, classes: tuple[str, ...]) -> None:
    """Raise DataError when there is nothing to tell apart."""
    if len(classes) < 2:
        names = ", ".join(classes) or "none"
        raise DataError(
            f"source: {urls.redact(root)}: {len(classes)} class(es) ({names}): at least 2 are needed, a folder each"
        )
