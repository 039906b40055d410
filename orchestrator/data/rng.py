"""Randomness without state: every draw is a hash of (seed, purpose, epoch, sample, number of the draw).

So a checkpoint holds no random state, and a draw is the same on any worker, thread, or resumed attempt. The mixer is
splitmix64's finaliser (https://prng.di.unimi.it/splitmix64.c), exact in wrapping 64-bit integers everywhere.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)

UInt64Array = NDArray[np.uint64]


def derive_key(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 64-bit key of a seed, a purpose ("order", "augment", ...) and whole numbers such as the epoch."""
    text = "\0".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix_bits(values: UInt64Array) -> UInt64Array:
    """Return splitmix64's output for each counter value."""
    with np.errstate(over="ignore"):
        z = values + _GAMMA
        z = (z ^ (z >> np.uint64(30))) * _MIX1
        z = (z ^ (z >> np.uint64(27))) * _MIX2
        return z ^ (z >> np.uint64(31))


def permutation(base: int, length: int) -> NDArray[np.int64]:
    """Return a permutation of 0 .. length - 1 that depends on the key alone (a sort by hash; ties keep their order)."""
    values = mix_bits(mix_bits(np.arange(length, dtype=np.uint64)) ^ np.uint64(base))
    return np.argsort(values, kind="stable")


def uniform(base: int, ids: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Return len(ids) x draws numbers in [0, 1), a row for each id that does not depend on the other ids."""
    rows = mix_bits(ids.astype(np.uint64) ^ np.uint64(base))
    with np.errstate(over="ignore"):
        counters = rows[:, None] + np.arange(draws, dtype=np.uint64)[None, :] * _GAMMA
    result: NDArray[np.float64] = (mix_bits(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result
