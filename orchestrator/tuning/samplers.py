"""The next recipe of a sweep: a function of the space, a seed and all trials so far. Importable without torch or ray.

Samplers have no state, so a sweep that resumes continues with the same suggestions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from orchestrator.config.errors import ConfigError
from orchestrator.config.overrides import apply_overrides
from orchestrator.data import rng
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.config import SamplerKind
from orchestrator.tuning.space import (
    Dimension,
    Space,
    choose_assignment,
    list_assignments,
    list_grid,
    to_hashable,
)
from orchestrator.tuning.trial import Assignment, Metric, State, Trial

# If one draw in ten is valid and new, so many draws miss it once in a billion times.
MAX_DRAWS = 200
# Suggestions of TPE for one trial that may be invalid or tried before; then it is drawn at random.
_MAX_SUGGESTIONS = 20

# Nothing is learned from a failed trial: its recipe is not the cause. A trial that has not ended counts as bad for the
# time being, so that parallel trials differ ("constant liar").
_OPTUNA_STATES: dict[State, TrialState] = {
    "finished": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Sampler:
    """A way to choose trials of a space that has passed `space.check_space`.

    random: independent draws of each value, even on its scale. grid: all combinations of values, and of the points of
    ranges, in a fixed order. tpe: Optuna's, which learns from the trials that ended; the first ten are drawn at random.
    """

    kind: SamplerKind
    space: Space
    base: Recipe
    metric: Metric
    seed: int

    def suggest(self, trials: Sequence[Trial]) -> Assignment | None:
        """Return a valid assignment that was not tried before; None when the space is exhausted.

        Draws come first, then all assignments of a finite space; an infinite one counts as exhausted then.

        trials: all trials so far, by number from 1. Raises ConfigError when no assignment drawn gives a valid recipe.
        """
        # All under the name and the code of the base.
        common = {"name": self.base.name, "code": self.base.code}
        tried = {trial.recipe.model_copy(update=common) for trial in trials}
        if self.kind == "grid":
            return next((assignment for recipe, assignment in self._grid.items() if recipe not in tried), None)
        number = len(trials) + 1
        suggestions = self._iter_suggestions(trials) if self.kind == "tpe" else ()
        draws = draw_assignments(self.space, self.base, self.seed, number)
        refusals: list[ConfigError] = []
        is_any_valid = False
        for assignment in chain(suggestions, draws, self._iter_shuffled(number)):
            try:
                recipe = apply_overrides(self.base, assignment)
            except ConfigError as error:
                refusals.append(error)
                continue
            if recipe not in tried:
                return assignment
            is_any_valid = True
        if is_any_valid:
            return None
        raise ConfigError(
            f"dimensions: none of {len(refusals)} trials drawn is valid; narrow the ranges, or change the recipe; the "
            f"first: {refusals[0]}"
        )

    @cached_property
    def _grid(self) -> dict[Recipe, Assignment]:
        return list_grid(self.space, self.base)

    def _iter_shuffled(self, number: int) -> Iterator[Assignment]:
        """Yield all assignments of a finite space in an order of this trial's; none of an infinite one."""
        assignments = list_assignments(self.space, self.base) or ()
        for place in rng.permutation(rng.derive_key(self.seed, "sweep all", number), len(assignments)):
            yield assignments[place]

    def _iter_suggestions(self, trials: Sequence[Trial]) -> Iterator[Assignment]:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else Optuna announces each study
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group, since 2021
            sampler = optuna.samplers.TPESampler(
                seed=rng.derive_key(self.seed, "sweep tpe", len(trials) + 1) % 2**32,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        study = optuna.create_study(sampler=sampler, direction="minimize")
        study.add_trials(map(self._to_frozen_trial, trials))
        for _ in range(_MAX_SUGGESTIONS):
            # Optuna takes an unused suggestion for a running trial, and avoids its neighbourhood.
            trial = study.ask()

            def pick(path: str, dimension: Dimension, trial: optuna.Trial = trial) -> object:
                return _suggest_value(trial, path, dimension)

            yield choose_assignment(self.space, self.base, pick)

    def _to_frozen_trial(self, trial: Trial) -> FrozenTrial:
        """Return a trial in Optuna's form, with the part of its assignment that the space has. Less is better."""
        known = self.space.dimensions
        taken = {
            path: value for path, value in trial.assignment.items() if path in known and known[path].accepts(value)
        }
        metric, state = self.metric, _OPTUNA_STATES.get(trial.state, TrialState.RUNNING)
        curve = {epoch: metric.to_loss(score) for epoch, score in trial.get_curve(metric) if math.isfinite(score)}
        loss = trial.get_loss(metric)
        if trial.state == "diverged" or not math.isfinite(loss):
            loss = metric.worst_loss + 1  # worse than any score, so that its neighbourhood is avoided
        return optuna.trial.create_trial(
            state=state,
            value=loss if state == TrialState.COMPLETE else None,
            params={path: _to_parameter(known[path], value) for path, value in taken.items()},
            distributions={path: _to_distribution(known[path]) for path in taken},
            intermediate_values=curve,
        )


def draw_assignments(space: Space, base: Recipe, seed: int, number: int) -> Iterator[Assignment]:
    """Draw MAX_DRAWS assignments for a trial; each value depends on seed, number, draw and path alone."""
    for draw in range(MAX_DRAWS):

        def pick(path: str, dimension: Dimension, draw: int = draw) -> object:
            # A float holds 53 bits.
            return dimension.value_at((rng.derive_key(seed, f"sweep {path}", number, draw) >> 11) * 2.0**-53)

        yield choose_assignment(space, base, pick)


def _to_distribution(dimension: Dimension) -> BaseDistribution:
    """Return a dimension as Optuna's; a choice becomes its place, because Optuna takes no lists."""
    if dimension.values is not None:
        return CategoricalDistribution(range(len(dimension.values)))
    low, high = dimension.bounds
    if dimension.whole:
        return IntDistribution(int(low), int(high), log=dimension.log)
    return FloatDistribution(low, high, log=dimension.log)


def _to_parameter(dimension: Dimension, value: object) -> object:
    if dimension.values is not None:
        return [to_hashable(choice) for choice in dimension.values].index(to_hashable(value))
    return value


def _suggest_value(trial: optuna.Trial, path: str, dimension: Dimension) -> object:
    if dimension.values is not None:
        return dimension.extremes[trial.suggest_categorical(path, range(len(dimension.values)))]
    low, high = dimension.bounds
    if dimension.whole:
        return trial.suggest_int(path, int(low), int(high), log=dimension.log)
    return dimension.round_value(trial.suggest_float(path, low, high, log=dimension.log))
