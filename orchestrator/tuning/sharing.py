"""Trials that share the beginning of their training. Importable without torch or ray.

Schedules that say the same rates up to an epoch lead to the same state there, bit for bit (recipe/prefix.py). Where all
trials are known before any is tried, as in a grid, each keeps a checkpoint at the epochs where a later one leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from orchestrator.recipe.config import Recipe
from orchestrator.recipe.prefix import count_shared_epochs
from orchestrator.tuning.trial import Trial

# Pairs are looked at: of more trials the first so many share.
MAX_TRIALS = 512


class PrefixSharing:
    """Which of these recipes, tried in this order, can begin with the weights of which, and how far."""

    def __init__(self, recipes: Sequence[Recipe], base: Recipe) -> None:
        """recipes: of all trials; empty where they share nothing. What trials are called makes no difference."""
        self._base = base
        self._recipes = [self._plain(recipe) for recipe in recipes[:MAX_TRIALS]]

    def get_mark_epochs(self, recipe: Recipe) -> tuple[int, ...]:
        """The epochs after which a later trial leaves this one, ascending."""
        return self._marks.get(self._plain(recipe), ())

    def find_origins(self, recipe: Recipe, trials: Sequence[Trial]) -> list[tuple[Trial, int]]:
        """Trials so far that a new one may begin with, and after which epoch; the longest way first."""
        if not self._recipes:
            return []
        found = [
            (trial, epoch)
            for trial in trials
            if (epoch := self._shared(self._plain(recipe), self._plain(trial.recipe)))
            and epoch in self.get_mark_epochs(trial.recipe)
            and trial.trained_epochs >= epoch
        ]
        return sorted(found, key=lambda one: (-one[1], one[0].number))

    @cached_property
    def _marks(self) -> dict[Recipe, tuple[int, ...]]:
        return {
            one: tuple(sorted({self._shared(later, one) for later in self._recipes[number + 1 :]} - {0}))
            for number, one in enumerate(self._recipes)
        }

    def _shared(self, one: Recipe, other: Recipe) -> int:
        """Whole epochs that they have in common; none where that is all of one, which then has no epoch of its own."""
        epochs = math.floor(count_shared_epochs(one, other))
        return epochs if epochs < min(one.epochs, other.epochs) else 0

    def _plain(self, recipe: Recipe) -> Recipe:
        return recipe.model_copy(update={"name": self._base.name})
