"""Draws that are worth a trial: valid, and not tried before. Importable without torch or ray."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from orchestrator.config.errors import ConfigError, Problem
from orchestrator.data import keyed
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.space import Dimension, Space, choose, everything, recipe_of
from orchestrator.tuning.trials import Assignment, Trial

# Where one draw in ten is valid and new, missing it so often happens once in a billion.
MOST_DRAWS = 200


def random_draws(space: Space, base: Recipe, seed: int, number: int) -> Iterator[Assignment]:
    """MOST_DRAWS assignments for the trial of that number; each value depends on seed, number, draw and path alone."""
    for draw in range(MOST_DRAWS):

        def pick(path: str, dimension: Dimension, draw: int = draw) -> object:
            # The 53 bits that a float holds, as keyed.uniforms takes them.
            return dimension.at((keyed.key(seed, f"sweep {path}", number, draw) >> 11) * 2.0**-53)

        yield choose(space, base, pick)


def fresh(
    space: Space, base: Recipe, seed: int, told: Sequence[Trial], draws: Iterable[Assignment]
) -> Assignment | None:
    """The first of the draws whose recipe is valid and was not tried before; None when the space is exhausted.

    When none is, all that a space with an end holds is looked through; one without an end counts as exhausted.

    Raises:
        ConfigError: when no draw is valid.
    """
    tried = known(base, told)
    refusals: list[ConfigError] = []
    is_any_valid = False
    for assignment in chain(draws, _all(space, base, keyed.key(seed, "sweep all", len(told) + 1))):
        try:
            recipe = recipe_of(base, assignment)
        except ConfigError as error:
            refusals.append(error)
            continue
        if recipe not in tried:
            return assignment
        is_any_valid = True
    if is_any_valid:
        return None
    reason = f"{len(refusals)} trials drawn in a row are refused; narrow the ranges, or change the recipe; the first: "
    raise ConfigError(Problem("dimensions", reason + str(refusals[0])))


def known(base: Recipe, told: Sequence[Trial]) -> set[Recipe]:
    """The recipes tried so far; what they are called makes no difference."""
    return {trial.recipe.model_copy(update={"name": base.name}) for trial in told}


def _all(space: Space, base: Recipe, key: int) -> Iterator[Assignment]:
    """Everything in a space with an end, shuffled by the key; nothing of a space without one."""
    found = everything(space, base) or ()
    for place in keyed.permutation(key, len(found)):
        yield found[place]
