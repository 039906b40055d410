"""Which recipe is tried next: a function of the space, a seed and all trials so far. Importable without torch or ray.

Samplers keep nothing: a sweep whose driver died goes on with the same suggestions as soon as the trials are known.
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
from orchestrator.tuning.trial import Assignment, MetricName, State, Trial


class Sampler(Protocol):
    """Chooses trials."""

    def suggest(self, told: Sequence[Trial]) -> Assignment | None:
        """The assignment of trial len(told) + 1, valid and not tried before; None when the space is exhausted.

        Args:
            told: all trials so far, by number from 1, as they stand now.

        Raises:
            ConfigError: when all that the sampler draws is refused by the recipe.
        """


@dataclass(frozen=True)
class RandomSampler:
    """Draws each value by itself, evenly on its scale."""

    space: Space
    base: Recipe
    seed: int

    def suggest(self, told: Sequence[Trial]) -> Assignment | None:
        """The next assignment; how trials went makes no difference, only which recipes they had."""
        draws = draw_assignments(self.space, self.base, self.seed, len(told) + 1)
        return pick_untried(self.space, self.base, self.seed, told, draws)


@dataclass(frozen=True)
class GridSampler:
    """Goes through all values, and through the points of ranges, in a fixed order."""

    space: Space
    base: Recipe

    def suggest(self, told: Sequence[Trial]) -> Assignment | None:
        """The first assignment of the grid that was not tried."""
        tried = get_tried_recipes(self.base, told)
        return next((found for recipe, found in self._assignments.items() if recipe not in tried), None)

    @cached_property
    def _assignments(self) -> dict[Recipe, Assignment]:
        return {build_recipe(self.base, found): found for found in list_grid(self.space, self.base)}


def make_sampler(kind: SamplerKind, space: Space, base: Recipe, metric: MetricName, seed: int) -> Sampler:
    """The sampler of that kind; the space must have passed `checking.check`."""
    match kind:
        case "random":
            return RandomSampler(space, base, seed)
        case "grid":
            return GridSampler(space, base)
        case "tpe":
            return TpeSampler(space, base, metric, seed)


# Where one draw in ten is valid and new, missing it so often happens once in a billion.
MAX_DRAWS = 200


def draw_assignments(space: Space, base: Recipe, seed: int, number: int) -> Iterator[Assignment]:
    """MOST_DRAWS assignments for the trial of that number; each value depends on seed, number, draw and path alone."""
    for draw in range(MAX_DRAWS):

        def pick(path: str, dimension: Dimension, draw: int = draw) -> object:
            # The 53 bits that a float holds, as keyed.uniforms takes them.
            return dimension.value_at((rng.derive_key(seed, f"sweep {path}", number, draw) >> 11) * 2.0**-53)

        yield choose_assignment(space, base, pick)


def pick_untried(
    space: Space, base: Recipe, seed: int, told: Sequence[Trial], draws: Iterable[Assignment]
) -> Assignment | None:
    """The first of the draws whose recipe is valid and was not tried before; None when the space is exhausted.

    When none is, all that a space with an end holds is looked through; one without an end counts as exhausted.

    Raises:
        ConfigError: when no draw is valid.
    """
    tried = get_tried_recipes(base, told)
    refusals: list[ConfigError] = []
    is_any_valid = False
    for assignment in chain(draws, _iter_shuffled(space, base, rng.derive_key(seed, "sweep all", len(told) + 1))):
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
    reason = f"{len(refusals)} trials drawn in a row are refused; narrow the ranges, or change the recipe; the first: "
    raise ConfigError(FieldError("dimensions", reason + str(refusals[0])))


def get_tried_recipes(base: Recipe, told: Sequence[Trial]) -> set[Recipe]:
    """The recipes tried so far; what they are called makes no difference."""
    return {trial.recipe.model_copy(update={"name": base.name}) for trial in told}


def _iter_shuffled(space: Space, base: Recipe, key: int) -> Iterator[Assignment]:
    """Everything in a space with an end, shuffled by the key; nothing of a space without one."""
    found = list_assignments(space, base) or ()
    for place in rng.permutation(key, len(found)):
        yield found[place]


# Suggestions of one trial that may be refused or tried before; then it is drawn at random.
_MAX_SUGGESTIONS = 20
# In percent, of a trial that diverged: worse than any error there is, so that its neighbourhood is left.
_DIVERGED_ERROR = 101.0

# Failed: of no fault of its recipe's, so nothing is learned from it. What has not ended yet counts as bad for the
# while, so that trials side by side differ ("constant liar").
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
    """Learns from the trials that ended; the first ten are drawn at random."""

    space: Space
    base: Recipe
    metric: MetricName
    seed: int

    def suggest(self, told: Sequence[Trial]) -> Assignment | None:
        """The next assignment, as `samplers.Sampler` says."""
        number = len(told) + 1
        draws = chain(self._iter_suggestions(told), draw_assignments(self.space, self.base, self.seed, number))
        return pick_untried(self.space, self.base, self.seed, told, draws)

    def _iter_suggestions(self, told: Sequence[Trial]) -> Iterator[Assignment]:
        study = self._build_study(told)
        for _ in range(_MAX_SUGGESTIONS):
            # Optuna takes one that is not wanted for running, and keeps away from it.
            trial = study.ask()

            def pick(path: str, dimension: Dimension, trial: optuna.Trial = trial) -> object:
                return _suggest_value(trial, path, dimension)

            yield choose_assignment(self.space, self.base, pick)

    def _build_study(self, told: Sequence[Trial]) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # each study would be announced
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group, since 2021
            sampler = optuna.samplers.TPESampler(
                seed=rng.derive_key(self.seed, "sweep tpe", len(told) + 1) % 2**32,
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        study = optuna.create_study(sampler=sampler, direction="minimize")
        for trial in told:
            study.add_trial(self._to_frozen_trial(trial))
        return study

    def _to_frozen_trial(self, trial: Trial) -> FrozenTrial:
        """What Optuna is told of a trial; of its assignment only what the space has."""
        known = self.space.dimensions
        taken = {
            path: value for path, value in trial.assignment.items() if path in known and known[path].accepts(value)
        }
        curve = {epoch: score for epoch, score in trial.get_curve(self.metric) if math.isfinite(score)}
        state, score = _OPTUNA_STATES[trial.state], trial.get_score(self.metric)
        if trial.state == "diverged" or score is None:
            score = _DIVERGED_ERROR
        return optuna.trial.create_trial(
            state=state,
            value=score if state == TrialState.COMPLETE else None,
            params={path: _to_parameter(known[path], value) for path, value in taken.items()},
            distributions={path: _to_distribution(known[path]) for path in taken},
            intermediate_values=curve,
        )


def _to_distribution(dimension: Dimension) -> BaseDistribution:
    """A choice is known to Optuna by its place: it takes no lists."""
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
