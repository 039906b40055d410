"""Optuna's TPE as a function of the trials so far. Importable without torch or ray.

TPE (Bergstra et al. 2011) models where good trials lie and where the others, and suggests what is likelier among the
good. Everything that Optuna knows is made anew from the trials for each suggestion.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from orchestrator.data import keyed
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.draws import fresh, random_draws
from orchestrator.tuning.space import Dimension, Space, as_key, choose
from orchestrator.tuning.trials import Assignment, Metric, State, Trial

# Suggestions of one trial that may be refused or tried before; then it is drawn at random.
_MOST_ASKED = 20
# In percent, of a trial that diverged: worse than any error there is, so that its neighbourhood is left.
_WORST = 101.0

# Failed: of no fault of its recipe's, so nothing is learned from it. What has not ended yet counts as bad for the
# while, so that trials side by side differ ("constant liar").
_STATES: dict[State, TrialState] = {
    "waiting": TrialState.RUNNING,
    "running": TrialState.RUNNING,
    "stopped": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Tpe:
    """Learns from the trials that ended; the first ten are drawn at random."""

    space: Space
    base: Recipe
    metric: Metric
    seed: int

    def suggest(self, told: Sequence[Trial]) -> Assignment | None:
        """The next assignment, as `samplers.Sampler` says."""
        number = len(told) + 1
        draws = chain(self._asked(told), random_draws(self.space, self.base, self.seed, number))
        return fresh(self.space, self.base, self.seed, told, draws)

    def _asked(self, told: Sequence[Trial]) -> Iterator[Assignment]:
        study = self._study(told)
        for _ in range(_MOST_ASKED):
            # Optuna takes one that is not wanted for running, and keeps away from it.
            trial = study.ask()

            def pick(path: str, dimension: Dimension, trial: optuna.Trial = trial) -> object:
                return _suggested(trial, path, dimension)

            yield choose(self.space, self.base, pick)

    def _study(self, told: Sequence[Trial]) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # each study would be announced
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group, since 2021
            sampler = optuna.samplers.TPESampler(
                seed=keyed.key(self.seed, "sweep tpe", len(told) + 1) % 2**32,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        study = optuna.create_study(sampler=sampler, direction="minimize")
        for trial in told:
            study.add_trial(self._as_optunas(trial))
        return study

    def _as_optunas(self, trial: Trial) -> FrozenTrial:
        """What Optuna is told of a trial; of its assignment only what the space has."""
        known = self.space.dimensions
        taken = {path: value for path, value in trial.assignment.items() if path in known and known[path].takes(value)}
        curve = {epoch: score for epoch, score in trial.curve(self.metric) if math.isfinite(score)}
        state, score = _STATES[trial.state], trial.score(self.metric)
        if trial.state == "diverged" or score is None:
            score = _WORST
        return optuna.trial.create_trial(
            state=state,
            value=score if state == TrialState.COMPLETE else None,
            params={path: _as_parameter(known[path], value) for path, value in taken.items()},
            distributions={path: _distribution(known[path]) for path in taken},
            intermediate_values=curve,
        )


def _distribution(dimension: Dimension) -> BaseDistribution:
    """A choice is known to Optuna by its place: it takes no lists."""
    if dimension.values is not None:
        return CategoricalDistribution(range(len(dimension.values)))
    low, high = dimension.bounds
    if dimension.whole:
        return IntDistribution(int(low), int(high), log=dimension.log)
    return FloatDistribution(low, high, log=dimension.log)


def _as_parameter(dimension: Dimension, value: object) -> object:
    if dimension.values is not None:
        return [as_key(choice) for choice in dimension.values].index(as_key(value))
    return value


def _suggested(trial: optuna.Trial, path: str, dimension: Dimension) -> object:
    if dimension.values is not None:
        place = trial.suggest_categorical(path, range(len(dimension.values)))
        return dimension.ends[place]
    low, high = dimension.bounds
    if dimension.whole:
        return trial.suggest_int(path, int(low), int(high), log=dimension.log)
    return dimension.shown(trial.suggest_float(path, low, high, log=dimension.log))
