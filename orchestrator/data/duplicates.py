"""Equal 64-bit hashes among many shards: 24 bytes of memory for each sample while they are looked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def equal_pairs(columns: Sequence[NDArray[np.uint64]]) -> Ints:
    """P x 2 places of equal hashes in the concatenated columns, each with its next equal, ascending."""
    hashes = np.concatenate([np.empty(0, np.uint64), *columns])
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    first = np.flatnonzero(ranked[1:] == ranked[:-1])
    pairs = np.stack((order[first], order[first + 1]), axis=1)
    return np.asarray(pairs[np.argsort(pairs[:, 0], kind="stable")], dtype=np.int64)


def located(columns: Sequence[NDArray[np.uint64]], places: Ints) -> tuple[Ints, Ints]:
    """Column and row of places in the concatenated columns."""
    ends = np.cumsum([len(column) for column in columns], dtype=np.int64)
    column = np.searchsorted(ends, places, side="right")
    lengths = np.array([len(column) for column in columns], dtype=np.int64)
    return np.asarray(column, dtype=np.int64), np.asarray(places - (ends - lengths)[column], dtype=np.int64)
