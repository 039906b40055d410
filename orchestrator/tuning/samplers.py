"""Which recipe is tried next: a function of the space, a seed and all trials so far. Importable without torch or ray.

Samplers keep nothing: a sweep whose driver died goes on with the same suggestions as soon as the trials are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from orchestrator.recipe.config import Recipe
from orchestrator.tuning.config import SamplerKind
from orchestrator.tuning.draws import fresh, known, random_draws
from orchestrator.tuning.space import Space, grid, recipe_of
from orchestrator.tuning.tpe import Tpe
from orchestrator.tuning.trials import Assignment, Metric, Trial


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
class Random:
    """Draws each value by itself, evenly on its scale."""

    space: Space
    base: Recipe
    seed: int

    def suggest(self, told: Sequence[Trial]) -> Assignment | None:
        """The next assignment; how trials went makes no difference, only which recipes they had."""
        draws = random_draws(self.space, self.base, self.seed, len(told) + 1)
        return fresh(self.space, self.base, self.seed, told, draws)


@dataclass(frozen=True)
class Grid:
    """Goes through all values, and through the points of ranges, in a fixed order."""

    space: Space
    base: Recipe

    def suggest(self, told: Sequence[Trial]) -> Assignment | None:
        """The first assignment of the grid that was not tried."""
        tried = known(self.base, told)
        return next((found for recipe, found in self._grid.items() if recipe not in tried), None)

    @cached_property
    def _grid(self) -> dict[Recipe, Assignment]:
        return {recipe_of(self.base, found): found for found in grid(self.space, self.base)}


def make(kind: SamplerKind, space: Space, base: Recipe, metric: Metric, seed: int) -> Sampler:
    """The sampler of that kind; the space must have passed `checking.check`."""
    match kind:
        case "random":
            return Random(space, base, seed)
        case "grid":
            return Grid(space, base)
        case "tpe":
            return Tpe(space, base, metric, seed)
