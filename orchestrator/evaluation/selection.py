"""Which members to take when only some can be had: greedily, scored on images that had no say in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.data import keyed
from orchestrator.evaluation.findings import SelectionStep
from orchestrator.evaluation.outcomes import Outcomes
from orchestrator.evaluation.rivals import Subset, Wrong

Images = NDArray[np.bool_]  # N: which images


def greedy(outcomes: Outcomes, names: Sequence[str]) -> tuple[SelectionStep, ...]:
    """Ensembles of 1 .. K members picked on one half of the images and scored on the other, both ways.

    None for a single member or a single image. The halves are a keyed draw, the same each time.
    """
    images = len(outcomes.labels)
    if outcomes.members == 1 or images == 1:
        return ()
    first = keyed.permutation(keyed.key(0, "halves"), images) < images // 2
    known: dict[Subset, Wrong] = {}
    halves = [(_picks(outcomes, half, known), ~half) for half in (first, ~first)]
    steps = []
    for size in range(1, outcomes.members + 1):
        wrong = sum(known[_sorted(picks[:size])][rest].sum(axis=0) for picks, rest in halves)
        top1, top5 = (100 * np.asarray(wrong) / images).tolist()
        one, other = (names[picks[size - 1]] for picks, _ in halves)
        steps.append(SelectionStep(size, (one, other), top1, top5))
    return tuple(steps)


def _picks(outcomes: Outcomes, half: Images, known: dict[Subset, Wrong]) -> list[int]:
    """All members, each the one that with those before it has the least top-5 (then top-1) error on these images."""
    picks: list[int] = []
    while len(picks) < outcomes.members:
        wider = {_sorted([*picks, member]): member for member in outcomes.whole if member not in picks}
        _look_up(outcomes, [subset for subset in wider if subset not in known], known)
        best = min(wider, key=lambda subset: (*known[subset][half].sum(axis=0)[::-1].tolist(), wider[subset]))
        picks.append(wider[best])
    return picks


def _look_up(outcomes: Outcomes, subsets: Sequence[Subset], known: dict[Subset, Wrong]) -> None:
    """Put the errors of images by these subsets into `known`."""
    found = [dict(shard.errors(subsets)) for shard in outcomes.rivals]
    known |= {subset: np.concatenate([errors[subset] for errors in found]) for subset in subsets}


def _sorted(members: Sequence[int]) -> Subset:
    return tuple(sorted(members))
