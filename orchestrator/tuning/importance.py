"""The importance of the searched paths for the score, as Optuna's PED-ANOVA (arXiv 2304.10255) estimates it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from orchestrator.tuning.trial import Metric, Trial, format_choice

MIN_TRIALS = 8  # fewer say nothing about importance
LOG_SPAN = 10.0  # a range whose ends are this many times apart is drawn on a logarithmic scale
_BEST_SHARE = 0.25  # of the trials that count as the best ones; Optuna's default, 0.1, suits larger studies

ScoredTrial = tuple[Trial, float]


class Importance(NamedTuple):
    """The importance of each searched path.

    shares: by path, most important first, together 1; None when the trials cannot tell. trials: how many were compared.
    note: why there are no shares, or which trials were compared.
    """

    shares: Mapping[str, float] | None
    trials: int
    note: str


def compute_importance(trials: Sequence[Trial], metric: Metric) -> Importance:
    """Return how much the values of each path among the best quarter of the trials differ from those among all.

    Scores of different epochs do not compare, so it takes the latest epoch that 8 trials reached, and all trials that
    reached it, with their scores there. Paths that only some trials have count, too.
    """
    reached: dict[int, list[ScoredTrial]] = {}
    for trial in trials:
        for epoch, score in trial.get_curve(metric):
            if math.isfinite(score):
                reached.setdefault(epoch, []).append((trial, score))
    last = max((epoch for epoch, group in reached.items() if len(group) >= MIN_TRIALS), default=None)
    if last is None:
        count = max(map(len, reached.values()), default=0)
        return Importance(None, count, f"{count} trials with comparable scores are too few; it takes {MIN_TRIALS}.")
    scored = reached[last]
    count = len(scored)
    study = _build_study(scored, metric)
    is_single = all(there.single() for trial in study.trials for there in trial.distributions.values())
    if is_single or len({score for _, score in scored}) == 1:
        return Importance(None, count, f"All {count} trials have the same values or the same score: no path matters.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials under a condition, which the report's caveat covers
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    epochs = max(trial.recipe.epochs for trial, _ in scored)
    note = f"Of the {count} trials that reached epoch {last} of {epochs}, at that epoch"
    if last < epochs:
        note += ": other paths may matter later"
    if count < len(trials):
        note += ", and a path that had trials end early looks too unimportant"
    return Importance({path: float(share) for path, share in shares.items()}, count, f"{note}.")


def _build_study(scored: Sequence[ScoredTrial], metric: Metric) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else Optuna announces each study
    study = optuna.create_study(direction="maximize" if metric.maximize else "minimize")
    paths = dict.fromkeys(path for trial, _ in scored for path in trial.assignment)
    distributions = {path: _build_distribution(path, scored) for path in paths}
    for trial, score in scored:
        params = {
            path: value if isinstance(distributions[path], FloatDistribution) else format_choice(value)
            for path, value in trial.assignment.items()
        }
        own = {path: distributions[path] for path in params}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=own, value=score))
    return study


def _build_distribution(path: str, scored: Sequence[ScoredTrial]) -> BaseDistribution:
    values = [trial.assignment[path] for trial, _ in scored if path in trial.assignment]
    if all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values):
        return FloatDistribution(float(min(values)), float(max(values)), log=is_log(values))
    return CategoricalDistribution(sorted({format_choice(value) for value in values}))


def is_log(values: Sequence[float]) -> bool:
    """Return whether a logarithmic scale suits the values: all above 0, and far apart."""
    return bool(values) and min(values) > 0 and max(values) >= LOG_SPAN * min(values)
