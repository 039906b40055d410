"""Everything that can be said of an ensemble from stored scores alone; no model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.evaluation import (
    calibration,
    comparison,
    confusions,
    diversity,
    joined,
    outcomes,
    resampling,
    selection,
    table3,
)
from orchestrator.evaluation.findings import Analysis
from orchestrator.evaluation.outcomes import CROPS, Outcomes

__all__ = ["Analysis", "Scored", "analyse"]


@dataclass(frozen=True)
class Scored:
    """A member and where its scores lie."""

    name: str
    scores: str  # folder of the scores of its averaged weights
    raw: str | None = None  # folder of the scores of its raw weights, where they were scored


def analyse(members: Sequence[Scored], manifest: Manifest, split: str) -> Analysis:
    """The analysis of the ensemble of `members`, in the order given (the order of sums).

    One pass over the scores, shard by shard, so memory is that of two shards of all members and of a few numbers an
    image. Raises DataError (no members, a member twice, scores of other images, labels or classes, no labelled image),
    FileNotFoundError (a shard is not scored) and storage.commit.CommitError (a damaged shard).
    """
    names = [member.name for member in members]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"member {twice[0]!r} is given twice; give each member once")
    raw = tuple(number for number, member in enumerate(members) if member.raw is not None)
    folders = [member.scores for member in members] + [member.raw for member in members if member.raw is not None]
    with ThreadPoolExecutor(table3.READERS) as pool:
        found = outcomes.gather(joined.shards(folders, manifest, split, pool), len(members), raw)
    return _analysis(found, names, raw, manifest, split)


def _analysis(found: Outcomes, names: Sequence[str], raw: tuple[int, ...], manifest: Manifest, split: str) -> Analysis:
    wrong = {
        (models, count): found.single((CROPS, count)) if models == 1 else found.ensemble((CROPS, count))
        for models, count in table3.keys(found.members)
    }
    means = resampling.bootstrap(np.hstack(list(wrong.values())))
    confused = confusions.confusions(found)
    return Analysis(
        split=split,
        member_names=tuple(names),
        class_names=manifest.titles or manifest.classes,
        table=table3.tabulated(wrong, means, found.bad, found.unlabelled, table3.is_ilsvrc(manifest.classes)),
        members=diversity.members(found, names),
        subsets=diversity.subsets(found),
        pairs=diversity.pairs(found, names),
        gains=diversity.gains(found, names),
        classes=confusions.classes(found, confused),
        confusions=tuple(confused[: confusions.MOST_CONFUSIONS]),
        calibration=calibration.calibrations(found),
        paired=comparison.between_cells(wrong, means),
        scales=comparison.scales(found),
        maximum=comparison.maximum(found),
        averaging=comparison.averaging(found, raw),
        averaged_members=tuple(names[number] for number in raw),
        selection=selection.greedy(found, names),
        mistakes=confusions.mistakes(found),
    )
