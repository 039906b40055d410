"""Which searched paths the score hangs on, by a random forest over the trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.tuning.param_axes import ParamAxis, build_axes
from orchestrator.tuning.trial import MetricName, Trial

MIN_TRIALS = 8  # trials, below which a forest tells nothing
_TREES = 300
_SHUFFLES = 3  # of each path for each tree
_SEED = 0
_LEAST_EXPLAINED = 0.1  # of the variance, below which shares are told to be noise

Matrix = NDArray[np.float32]  # a tree's own type: nothing is rounded on the way to it
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """What each searched path matters for the score.

    shares: by path, most important first, together 1; None where the trials cannot tell. trials: how many were used.
    explained: the share of the scores' variance that the forest foretells of trials that it was not fitted to; below 0
    it is worse than their mean. told: the reason for None, or else which trials were used and how far to trust it.
    """

    shares: Mapping[str, float] | None
    trials: int
    explained: float | None
    told: str


def compute_importance(trials: Sequence[Trial], metric: MetricName) -> Importance:
    """How much worse a forest foretells the score when a path's values are shuffled, as shares of all paths.

    Scores of unlike epochs do not compare. So it takes the finished trials where there are 8, each at its end; else
    all that reached the latest epoch that 8 trials reached, at that epoch.
    """
    chosen, which = _select_comparable(trials, metric)
    if len(chosen) < MIN_TRIALS:
        told = f"{len(chosen)} trials with comparable scores are too few to tell what matters; it takes {MIN_TRIALS}."
        return Importance(None, len(chosen), None, told)
    scores = np.array([score for _, score in chosen], dtype=np.float64)
    if float(np.ptp(scores)) <= 0:
        return Importance(None, len(chosen), None, f"All {len(chosen)} trials have the same score: nothing matters.")
    matrix, groups = encode_assignments([trial for trial, _ in chosen])
    if not groups:
        return Importance(None, len(chosen), None, "No path was searched.")
    losses, explained = _measure_shuffles(matrix, scores, list(groups.values()))
    kept = np.maximum(losses, 0.0)
    if float(kept.sum()) <= 0:
        told = f"The {len(chosen)} trials do not show that any searched path matters for the score."
        return Importance(None, len(chosen), explained, told)
    found = zip(groups, (kept / kept.sum()).tolist(), strict=True)
    shares = dict(sorted(found, key=lambda one: (-one[1], one[0])))
    return Importance(shares, len(chosen), explained, f"{which} {_describe_trust(explained)}")


def encode_assignments(trials: Sequence[Trial]) -> tuple[Matrix, dict[str, list[int]]]:
    """The assignments as numbers, trials by columns, and the columns of each path.

    A choice has a column of 0 and 1 for each value. Where a path is absent its number is the median of the others, and
    a column of its own says so, unless a choice says the same already: the credit is then the choice's.
    """
    searched = build_axes(trials)
    columns: list[list[float]] = []
    groups: dict[str, list[int]] = {axis.path: [] for axis in searched}
    for axis in searched:
        for column in _build_columns(axis, trials):
            groups[axis.path].append(len(columns))
            columns.append(column)
    told = {tuple(column) for column in columns if set(column) <= {0.0, 1.0}}
    for axis in searched:
        absent = [float(axis.path not in trial.assignment) for trial in trials]
        present = [1.0 - one for one in absent]
        if axis.has_absent and tuple(absent) not in told and tuple(present) not in told:
            groups[axis.path].append(len(columns))
            columns.append(absent)
            told.add(tuple(absent))
    matrix = np.array(columns, dtype=np.float32).reshape(len(columns), len(trials)).T
    return np.ascontiguousarray(matrix), groups


def _select_comparable(trials: Sequence[Trial], metric: MetricName) -> tuple[list[tuple[Trial, float]], str]:
    """Trials with the scores to compare, and which they are, in words."""
    finished = [
        (trial, score)
        for trial in trials
        if trial.state == "finished" and (score := trial.get_score(metric)) is not None
    ]
    if len(finished) >= MIN_TRIALS:
        told = f"Of the {len(finished)} finished trials, each at its end."
        if early := sum(trial.state == "pruned" for trial in trials):
            # A path that sent the bad ones out early varies little among those that stayed.
            told += f" The {early} that were pruned are not in it: what sent them out early looks too small here."
        return finished, told
    reached: dict[int, list[tuple[Trial, float]]] = {}
    for trial in trials:
        for epoch, score in trial.get_curve(metric):
            if np.isfinite(score):
                reached.setdefault(epoch, []).append((trial, score))
    enough = [epoch for epoch, found in reached.items() if len(found) >= MIN_TRIALS]
    if not enough:
        return max(reached.values(), key=len, default=[]), ""
    last = max(enough)
    return reached[last], (
        f"Too few trials finished ({len(finished)}), so of the {len(reached[last])} that reached epoch {last}, at that "
        "epoch: what matters later may differ."
    )


def _build_columns(axis: ParamAxis, trials: Sequence[Trial]) -> list[list[float]]:
    values = [axis.get_coordinate(trial.assignment) for trial in trials]
    if axis.scale == "choice":
        return [[float(value == place) for value in values] for place in range(len(axis.choices))]
    middle = float(np.median([value for value in values if value is not None]))
    return [[middle if value is None else value for value in values]]


def _measure_shuffles(matrix: Matrix, scores: Vector, groups: Sequence[Sequence[int]]) -> tuple[Vector, float]:
    """What shuffling each group of columns adds to the mean squared error, and the share of variance foretold.

    Both on what each tree was not grown from: on its own trials a forest takes noise for knowledge.
    """
    forest = _make_forest().fit(matrix, scores)
    random = np.random.default_rng(_SEED)
    losses = np.zeros(len(groups))
    foretold, votes = np.zeros(len(scores)), np.zeros(len(scores))
    for tree, grown in zip(forest.estimators_, forest.estimators_samples_, strict=True):
        out = np.setdiff1d(np.arange(len(scores)), grown)
        if not len(out):
            continue
        rows = matrix[out]
        answers = tree.tree_.predict(rows).ravel()
        foretold[out] += answers
        votes[out] += 1
        error = np.mean((answers - scores[out]) ** 2)
        for number, group in enumerate(groups):
            for _ in range(_SHUFFLES):
                mixed = rows.copy()
                mixed[:, group] = rows[random.permutation(len(out))][:, group]
                losses[number] += np.mean((tree.tree_.predict(mixed).ravel() - scores[out]) ** 2) - error
    seen = votes > 0
    rest = np.mean((foretold[seen] / votes[seen] - scores[seen]) ** 2)
    return losses / (_TREES * _SHUFFLES), float(1.0 - rest / np.var(scores))


def _make_forest() -> Any:
    # Late: scikit-learn takes a second to import, which only a sweep's end should pay.
    forests = import_module("sklearn.ensemble")
    return forests.RandomForestRegressor(n_estimators=_TREES, random_state=_SEED, n_jobs=1)


def _describe_trust(explained: float) -> str:
    if explained < _LEAST_EXPLAINED:
        return (
            "The forest foretells scores that it has not seen hardly better than their mean would: "
            "take these shares for noise."
        )
    return f"The forest foretells {100 * explained:.0f}% of the variance of scores that it has not seen."
