"""The importance of the searched paths for the score, as Optuna's PED-ANOVA (arXiv 2304.10255) estimates it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from orchestrator.tuning.param_names import format_choice, is_log, is_number, list_paths
from orchestrator.tuning.trial import Metric, Trial

MIN_TRIALS = 8  # fewer say nothing about importance
_BEST_SHARE = 0.25  # of the trials that count as the best ones; Optuna's default, 0.1, suits larger studies

ScoredTrial = tuple[Trial, float]


@dataclass(frozen=True)
class Importance:
    """The importance of each searched path.

    shares: by path, most important first, together 1; None when the trials cannot tell. trials: how many were compared.
    note: why there are no shares, or which trials were compared.
    """

    shares: Mapping[str, float] | None
    trials: int
    note: str


def compute_importance(trials: Sequence[Trial], metric: Metric) -> Importance:
    """Return how much the values of each path among the best quarter of the trials differ from those among all.

    Scores of different epochs do not compare. So it takes the finished trials if there are 8, each at its end; else
    all that reached the latest epoch that 8 trials reached, at that epoch. Paths that only some trials have count, too.
    """
    scored, note = _select_comparable(trials, metric)
    count = len(scored)
    if count < MIN_TRIALS:
        return Importance(None, count, f"{count} trials with comparable scores are too few; it takes {MIN_TRIALS}.")
    if len({score for _, score in scored}) == 1:
        return Importance(None, count, f"All {count} trials have the same score: no path matters.")
    study = build_study(scored, metric)
    distributions = [distribution for trial in study.trials for distribution in trial.distributions.values()]
    if all(distribution.single() for distribution in distributions):
        return Importance(None, count, f"No searched path has several values among the {count} trials.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials under a condition, which the report's caveat covers
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return Importance({path: float(share) for path, share in shares.items()}, count, note)


def build_study(scored: Sequence[ScoredTrial], metric: Metric, names: Mapping[str, str] | None = None) -> optuna.Study:
    """Return an Optuna study of completed trials with these scores; it knows choices by their texts.

    names: of the parameters, by path; by default the paths.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else Optuna announces each study
    study = optuna.create_study(direction="maximize" if metric.maximize else "minimize")
    distributions = {path: _build_distribution(path, scored) for path in list_paths(trial for trial, _ in scored)}
    names = names or {path: path for path in distributions}
    for trial, score in scored:
        params = {
            path: value if isinstance(distributions[path], FloatDistribution) else format_choice(value)
            for path, value in trial.assignment.items()
        }
        study.add_trial(
            optuna.trial.create_trial(
                params={names[path]: value for path, value in params.items()},
                distributions={names[path]: distributions[path] for path in params},
                value=score,
            )
        )
    return study


def _build_distribution(path: str, scored: Sequence[ScoredTrial]) -> BaseDistribution:
    """Return the range or the choice that the trials' values of a path span."""
    values = [trial.assignment[path] for trial, _ in scored if path in trial.assignment]
    if all(map(is_number, values)):
        return FloatDistribution(float(min(values)), float(max(values)), log=is_log(values))
    return CategoricalDistribution(sorted({format_choice(value) for value in values}))


def _select_comparable(trials: Sequence[Trial], metric: Metric) -> tuple[list[ScoredTrial], str]:
    """Return the trials whose scores compare, and a sentence that says which they are."""
    ended = [trial for trial in trials if trial.state == "finished"]
    finished = [(trial, score) for trial in ended if (score := trial.get_score(metric)) is not None]
    if len(finished) >= MIN_TRIALS:
        note = f"Of the {len(finished)} finished trials, each at its end."
        if pruned := sum(trial.state == "pruned" for trial in trials):
            # A path that had bad trials pruned varies little among those that stayed.
            note += f" The {pruned} pruned trials are left out: a path that had them pruned looks too unimportant here."
        return finished, note
    reached: dict[int, list[ScoredTrial]] = {}
    for trial in trials:
        for epoch, score in trial.get_curve(metric):
            if math.isfinite(score):
                reached.setdefault(epoch, []).append((trial, score))
    last = max((epoch for epoch, scored in reached.items() if len(scored) >= MIN_TRIALS), default=None)
    if last is None:
        return max(reached.values(), key=len, default=[]), ""
    return reached[last], (
        f"Too few trials finished ({len(finished)}), so of the {len(reached[last])} that reached epoch {last}, at that "
        "epoch: other paths may matter later."
    )
