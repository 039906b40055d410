"""The next recipe of a sweep: a function of the space, a seed and all trials so far. Importable without torch or ray.

Samplers have no state, so a sweep that resumes continues with the same suggestions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from orchestrator.config.errors import ConfigError, FieldError
from orchestrator.data import rng
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.config import SamplerKind
from orchestrator.tuning.space import (
    Dimension,
    Space,
    build_recipe,
    choose_assignment,
    list_assignments,
    list_grid,
    to_hashable,
)
from orchestrator.tuning.trial import Assignment, Metric, State, Trial


class Sampler(Protocol):
    """A way to choose trials."""

    def suggest(self, trials: Sequence[Trial]) -> Assignment | None:
        """Return a valid assignment that was not tried before; None when the space is exhausted.

        trials: all trials so far, by number from 1. Raises ConfigError when no assignment drawn gives a valid recipe.
        """


@dataclass(frozen=True)
class RandomSampler:
    """Independent draws of each value, even on its scale."""

    space: Space
    base: Recipe
    seed: int

    def suggest(self, trials: Sequence[Trial]) -> Assignment | None:
        """Return the next assignment, whatever the scores of the trials."""
        draws = draw_assignments(self.space, self.base, self.seed, len(trials) + 1)
        return pick_untried(self.space, self.base, self.seed, trials, draws)


@dataclass(frozen=True)
class GridSampler:
    """All combinations of values, and of the points of ranges, in a fixed order."""

    space: Space
    base: Recipe

    def suggest(self, trials: Sequence[Trial]) -> Assignment | None:
        """Return the first assignment of the grid that was not tried."""
        tried = get_tried_recipes(self.base, trials)
        return next((assignment for recipe, assignment in self._assignments.items() if recipe not in tried), None)

    @cached_property
    def _assignments(self) -> dict[Recipe, Assignment]:
        return {build_recipe(self.base, assignment): assignment for assignment in list_grid(self.space, self.base)}


def make_sampler(kind: SamplerKind, space: Space, base: Recipe, metric: Metric, seed: int) -> Sampler:
    """Return the sampler of that kind; the space must have passed `validate_space.check_space`."""
    match kind:
        case "random":
            return RandomSampler(space, base, seed)
        case "grid":
            return GridSampler(space, base)
        case "tpe":
            return TpeSampler(space, base, metric, seed)


# If one draw in ten is valid and new, so many draws miss it once in a billion times.
MAX_DRAWS = 200


def draw_assignments(space: Space, base: Recipe, seed: int, number: int) -> Iterator[Assignment]:
    """Draw MAX_DRAWS assignments for a trial; each value depends on seed, number, draw and path alone."""
    for draw in range(MAX_DRAWS):

        def pick(path: str, dimension: Dimension, draw: int = draw) -> object:
            # A float holds 53 bits.
            return dimension.value_at((rng.derive_key(seed, f"sweep {path}", number, draw) >> 11) * 2.0**-53)

        yield choose_assignment(space, base, pick)


def pick_untried(
    space: Space, base: Recipe, seed: int, trials: Sequence[Trial], draws: Iterable[Assignment]
) -> Assignment | None:
    """Return the first draw whose recipe is valid and was not tried before; None when the space is exhausted.

    After the draws come all assignments of a finite space; an infinite one counts as exhausted then. Raises ConfigError
    when no draw is valid.
    """
    tried = get_tried_recipes(base, trials)
    refusals: list[ConfigError] = []
    is_any_valid = False
    for assignment in chain(draws, _iter_shuffled(space, base, rng.derive_key(seed, "sweep all", len(trials) + 1))):
        try:
            recipe = build_recipe(base, assignment)
        except ConfigError as error:
            refusals.append(error)
            continue
        if recipe not in tried:
            return assignment
        is_any_valid = True
    if is_any_valid:
        return None
    reason = f"none of {len(refusals)} trials drawn is valid; narrow the ranges, or change the recipe; the first: "
    raise ConfigError(FieldError("dimensions", reason + str(refusals[0])))


def get_tried_recipes(base: Recipe, trials: Sequence[Trial]) -> set[Recipe]:
    """Return the recipes tried so far, all under the name of the base."""
    return {trial.recipe.model_copy(update={"name": base.name}) for trial in trials}


def _iter_shuffled(space: Space, base: Recipe, key: int) -> Iterator[Assignment]:
    """Yield all assignments of a finite space, shuffled by the key; none of an infinite one."""
    assignments = list_assignments(space, base) or ()
    for place in rng.permutation(key, len(assignments)):
        yield assignments[place]


# Suggestions for one trial that may be invalid or tried before; then it is drawn at random.
_MAX_SUGGESTIONS = 20

# Nothing is learned from a failed trial: its recipe is not the cause. A trial that has not ended counts as bad for the
# time being, so that parallel trials differ ("constant liar").
_OPTUNA_STATES: dict[State, TrialState] = {
    "waiting": TrialState.RUNNING,
    "running": TrialState.RUNNING,
    "stopped": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "diverged": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class TpeSampler:
    """Optuna's TPE, which learns from the trials that ended; the first ten are drawn at random."""

    space: Space
    base: Recipe
    metric: Metric
    seed: int

    def suggest(self, trials: Sequence[Trial]) -> Assignment | None:
        """Return the next assignment, as `Sampler.suggest` does."""
        number = len(trials) + 1
        draws = chain(self._iter_suggestions(trials), draw_assignments(self.space, self.base, self.seed, number))
        return pick_untried(self.space, self.base, self.seed, trials, draws)

    def _iter_suggestions(self, trials: Sequence[Trial]) -> Iterator[Assignment]:
        study = self._build_study(trials)
        for _ in range(_MAX_SUGGESTIONS):
            # Optuna takes an unused suggestion for a running trial, and avoids its neighbourhood.
            trial = study.ask()

            def pick(path: str, dimension: Dimension, trial: optuna.Trial = trial) -> object:
                return _suggest_value(trial, path, dimension)

            yield choose_assignment(self.space, self.base, pick)

    def _build_study(self, trials: Sequence[Trial]) -> optuna.Study:
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
        for trial in trials:
            study.add_trial(self._to_frozen_trial(trial))
        return study

    def _to_frozen_trial(self, trial: Trial) -> FrozenTrial:
        """Return a trial in Optuna's form, with the part of its assignment that the space has. Less is better."""
        known = self.space.dimensions
        taken = {
            path: value for path, value in trial.assignment.items() if path in known and known[path].accepts(value)
        }
        metric, state = self.metric, _OPTUNA_STATES[trial.state]
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
        place = trial.suggest_categorical(path, range(len(dimension.values)))
        return dimension.extremes[place]
    low, high = dimension.bounds
    if dimension.whole:
        return trial.suggest_int(path, int(low), int(high), log=dimension.log)
    return dimension.round_value(trial.suggest_float(path, low, high, log=dimension.log))
