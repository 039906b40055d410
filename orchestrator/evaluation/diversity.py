"""What the members have in common and what each adds: errors of members and subsets, agreement, gains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from orchestrator.data import crops
from orchestrator.evaluation.comparison import compare, percent
from orchestrator.evaluation.findings import Gain, MemberError, Pairs, Spread, Subsets
from orchestrator.evaluation.outcomes import ALL_CROPS, CROPS, Outcomes


def members(outcomes: Outcomes, names: Sequence[str]) -> tuple[MemberError, ...]:
    """Errors of each member alone at each number of crops."""
    return tuple(
        MemberError(name, count, *percent(outcomes.ensemble((CROPS, count), (member,))))
        for member, name in enumerate(names)
        for count in crops.SUBSETS
    )


def subsets(outcomes: Outcomes) -> tuple[Subsets, ...]:
    """Errors over the ensembles of each size at each number of crops."""
    found = []
    for count, counted in outcomes.counts.items():
        for size in range(1, outcomes.members + 1):
            errors = np.array([wrong for subset, wrong in counted.items() if len(subset) == size])
            errors = 100 * errors / len(outcomes.labels)
            top1, top5 = (Spread(float(ranked.min()), float(ranked.mean()), float(ranked.max())) for ranked in errors.T)
            found.append(Subsets(size, count, len(errors), math.comb(outcomes.members, size), top1, top5))
    return tuple(found)


def pairs(outcomes: Outcomes, names: Sequence[str]) -> Pairs:
    """Pairwise disagreement of top-1 classes and correlation of top-1 errors."""
    predicted = outcomes.predicted[: outcomes.members]
    wrong = np.stack([outcomes.wrong[ALL_CROPS][(member,)][:, 0] for member in outcomes.whole]).astype(np.float64)
    apart = wrong - wrong.mean(axis=1, keepdims=True)
    together = apart @ apart.T
    disagreement, correlation = [], []
    for one in outcomes.whole:
        disagreement.append(tuple(100 * float((predicted[one] != other).mean()) for other in predicted))
        spreads = [math.sqrt(together[one, one] * together[other, other]) for other in outcomes.whole]
        correlation.append(
            tuple(
                float(np.clip(together[one, other] / spread, -1, 1)) if spread else None
                for other, spread in enumerate(spreads)
            )
        )
    return Pairs(tuple(names), tuple(disagreement), tuple(correlation))


def gains(outcomes: Outcomes, names: Sequence[str]) -> tuple[Gain, ...]:
    """The error of the ensemble without each member less that with it; none for a single member."""
    if outcomes.members == 1:
        return ()
    found = []
    for member, name in enumerate(names):
        others = tuple(other for other in outcomes.whole if other != member)
        difference = compare(outcomes.ensemble(ALL_CROPS, others), outcomes.ensemble(ALL_CROPS), 1)
        found.append(Gain(name, *difference))
    return tuple(found)
