"""Which image goes into which shard: a pure function of the listing's columns and a seed.

Each shard is a fair sample of its split: of a class that has the share s of the images it has s of its own, to about
one image, since the images of a class stand at equal distances in the order that is cut into shards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import keyed
from orchestrator.data.sources.listing import SplitListing

# Beside its image a sample takes two headers, the label and, on average, half a record of filling.
OVERHEAD_BYTES = 512 * 3 + 256

Rows = NDArray[np.int64]


def order(labels: NDArray[np.int64], seed: int, split: str) -> NDArray[np.int64]:
    """The N rows in the order that is cut into shards: shuffled, and every class spread evenly."""
    sizes = np.bincount(labels)
    draws = keyed.permutation(keyed.key(seed, f"pack-{split}"), len(labels))
    by_class = draws[np.argsort(labels[draws], kind="stable")]
    own = labels[by_class]
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[own]
    # One phase for a class, not for an image: distances are then equal.
    phase = keyed.uniforms(keyed.key(seed, f"pack-phase-{split}"), np.arange(len(sizes)), 1)[:, 0]
    position = (rank + phase[own]) / sizes[own]
    # Ties, such as those of classes of one image, go by the shuffle.
    ties = np.empty(len(labels), dtype=np.int64)
    ties[draws] = np.arange(len(labels))
    return by_class[np.lexsort((ties[by_class], position))]


def shards(
    listing: SplitListing, seed: int, split: str, shard_bytes: float, min_shards: int, ratio: float = 1.0
) -> list[NDArray[np.int64]]:
    """The rows of each shard, shuffled; shards differ in bytes by about an image.

    ratio: bytes to be stored for a byte of the source.
    """
    rows = order(listing.labels, seed, split)
    ends = np.cumsum(listing.lengths[rows] * ratio + OVERHEAD_BYTES)
    count = min(len(rows), max(min_shards, int(np.ceil(ends[-1] / shard_bytes))))
    middles = ends - np.diff(ends, prepend=0.0) / 2
    bins = np.minimum((middles * (count / ends[-1])).astype(np.int64), count - 1)
    # An image larger than a shard leaves the next one empty.
    cuts = np.flatnonzero(np.diff(bins)) + 1
    parts = np.split(rows, cuts)
    return [
        part[keyed.permutation(keyed.key(seed, f"pack-shard-{split}", number), len(part))]
        for number, part in enumerate(parts)
    ]


def sample(listing: SplitListing, seed: int, count: int) -> NDArray[np.int64]:
    """At most `count` rows by which sizes are estimated."""
    return keyed.permutation(keyed.key(seed, "pack-estimate"), len(listing))[:count]


def per_class(listing: SplitListing, num_classes: int) -> list[int]:
    """Number of images of each class."""
    return [int(count) for count in np.bincount(listing.labels, minlength=num_classes)]
