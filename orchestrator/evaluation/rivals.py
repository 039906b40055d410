"""Top-1 and top-5 errors of every ensemble of some members, at the price of the few classes that can matter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import keyed

# Up to this many members all subsets are looked at, 1,023 of them; of more members at most so many of each size.
MOST_MEMBERS = 10
MOST_SUBSETS = 128
MARGIN = np.float32(2**-16)  # relative; more than what rounds off a float32 sum of a hundred scores

Floats = NDArray[np.float32]
Wrong = NDArray[np.bool_]  # images x 2: whether the true class misses the first place, and the first five
Subset = tuple[int, ...]  # numbers of members, ascending


class Rivals:
    """The classes of some images that come before the true one, or level with it, in at least one member.

    No other class can do so in a mean of members: where each member's score is below that of the true class, so are
    their sums. A float32 sum of K scores is off by less than K parts in 2^24, so that rounding cannot change that where
    they differ by more than MARGIN. Scores of float16 (evaluation.half) do so whenever they differ.
    """

    def __init__(self, members: Sequence[Floats], labels: NDArray[np.int64]) -> None:
        """`members` is K times N x C, decoded from float16; `labels` is N, each a class."""
        rows = np.arange(len(labels))
        self._true = np.stack([scores[rows, labels] for scores in members])
        shape = members[0].shape
        below, all_below = np.empty(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
        for scores, true in zip(members, self._true, strict=True):
            # Not ">=": a score that is no number must count as wrong, not as right.
            all_below &= np.less(scores, true[:, None] * (1 - MARGIN), out=below)
        all_below[rows, labels] = True
        images, classes = np.divmod(np.flatnonzero(~all_below), shape[1])
        self._scores = np.stack([scores[images, classes] for scores in members])
        # Rivals are in the order of their images, so those of an image are the ones between two of these.
        self._bounds = np.searchsorted(images, np.arange(len(labels) + 1))

    def errors(self, subsets: Iterable[Subset]) -> Iterator[tuple[Subset, Wrong]]:
        """Each subset of the members with the errors (N x 2) of its ensemble; subsets come in sorted order.

        Scores are summed in float32 in the order of the members, and a tie counts against the true class.
        """
        of_image = np.diff(self._bounds)
        # A subset follows those it shares its first members with, and so their sum.
        summed: list[tuple[int, Floats, Floats]] = []
        for subset in sorted(subsets):
            shared = 0
            while shared < min(len(summed), len(subset)) and summed[shared][0] == subset[shared]:
                shared += 1
            del summed[shared:]
            for member in subset[shared:]:
                scores, true = self._scores[member], self._true[member]
                if summed:
                    scores, true = summed[-1][1] + scores, summed[-1][2] + true
                summed.append((member, scores, true))
            _, scores, true = summed[-1]
            not_below = np.flatnonzero(~(scores < np.repeat(true, of_image)))
            others = np.diff(np.searchsorted(not_below, self._bounds))
            yield subset, np.stack((others >= 1, others >= 5), axis=1)


def subsets(members: int) -> list[Subset]:
    """All subsets of so many members but the empty one; of more than MOST_MEMBERS at most so many of each size.

    Which ones is a keyed draw, the same each time. Single members, the whole, and the whole less one are always there.
    """
    found: list[Subset] = []
    for size in range(1, members + 1):
        possible = math.comb(members, size)
        if members <= MOST_MEMBERS or possible <= max(MOST_SUBSETS, members):
            found += combinations(range(members), size)
            continue
        drawn: dict[Subset, None] = {}
        first = 0
        while len(drawn) < MOST_SUBSETS:
            draws = np.arange(first, first + MOST_SUBSETS)
            orders = keyed.uniforms(keyed.key(0, "subset", size), draws, members).argsort(axis=1)
            drawn |= dict.fromkeys(tuple(row) for row in np.sort(orders[:, :size], axis=1).tolist())
            first += MOST_SUBSETS
        found += sorted(list(drawn)[:MOST_SUBSETS])
    return found
