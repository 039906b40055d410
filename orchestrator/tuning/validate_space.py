"""The check that a space suits a recipe, before anything is trained. Importable without torch or ray."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.config import overrides
from orchestrator.config.errors import ConfigError, FieldError, format_value
from orchestrator.config.introspection import KIND
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.space import Dimension, Space, build_recipe, iter_assignments

# First part of a path -> why a sweep leaves it alone.
FIXED_PATHS = {
    "name": "it only names runs",
    "version": "it defines the meaning of a recipe",
    "epochs": "trials are compared after equally many, and pruned by them",
    "seeds": "the luckiest seed would win; --repeats compares gain and luck",
    "initial_weights": "trials that start from other weights do not compare; set it in the recipe",
}
_MAX_TRIES = 1000  # settings of the other dimensions, before a value is reported to suit none of them


def check_space(space: Space, base: Recipe) -> None:
    """Check that every value of every dimension, and both ends of every range, give some valid recipe.

    A value that suits only some values of other dimensions, such as a final rate above a few of the base rates, passes:
    samplers draw again. Raises ConfigError, which names every invalid dimension, its value, and what to do.
    """
    problems = [problem for path in sorted(space.dimensions) for problem in _find_problems(space, base, path)]
    if not problems and not next(iter_assignments(space, base, lambda _, dimension: dimension.extremes)):
        problems = [
            FieldError("dimensions", "none exists with this recipe: no `when` holds; change one, or the recipe")
        ]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _find_problems(space: Space, base: Recipe, path: str) -> list[FieldError]:
    """Return what is wrong with a dimension: the first kind of problem only, because others follow from it."""
    place, dimension = f"dimensions.{path}", space.dimensions[path]
    if (why := FIXED_PATHS.get(path.partition(".")[0])) is not None:
        return [FieldError(place, f"must not be searched: {why}; leave it out")]
    if reasons := [reason for on in sorted(dimension.when) for reason in _check_condition(space, base, path, on)]:
        return [FieldError(f"{place}.when", reason) for reason in reasons]
    if fields := [leaf for leaf in overrides.flatten_config(base) if leaf.startswith(f"{path}.")]:
        return [FieldError(place, f"holds several fields; name one of them: {', '.join(fields[:12])}")]
    names = ("low", "high") if dimension.values is None else map("values.{}".format, itertools.count())
    values = zip(names, dimension.extremes, strict=False)
    problems = [problem for name, value in values for problem in _check_value(space, base, path, name, value)]
    # A path that does not exist is no problem of its values.
    return [problem for problem in problems if problem.path == place][:1] or problems


def _check_condition(space: Space, base: Recipe, path: str, on: str) -> Iterator[str]:
    """Yield why the dimension's condition on a path can never hold."""
    values, other = space.dimensions[path].when[on], space.dimensions.get(on)
    if other is not None and other.choices is None:
        yield f"{on} is a range, which hardly ever is one of these; give it values, or whole"
    elif other is not None:
        choices = ", ".join(map(format_value, (other.choices or ())[:12]))
        for value in values:
            if not other.accepts(value):
                yield f"{on} must be one of the dimension's values ({choices}), got {format_value(value)}"
    else:
        for value in values:
            if (reason := _find_own_reason(_validate_assignment(base, {on: value}), on)) is not None:
                yield f"{on}: {reason}"


def _check_value(space: Space, base: Recipe, path: str, name: str, value: Any) -> Iterator[FieldError]:
    """Yield why no recipe has the value at the path; nothing when one has."""
    place, dimension = f"dimensions.{path}", space.dimensions[path]

    def list_options(other: str, other_dimension: Dimension) -> tuple[Any, ...]:
        return (value,) if other == path else other_dimension.extremes

    tries = itertools.islice(iter_assignments(space, base, list_options), _MAX_TRIES)
    # Without one the dimension does not exist with this recipe: its values are checked all the same.
    conditions = {on: values[0] for on, values in dimension.when.items()}
    assignments = [tried for tried in tries if path in tried] or [{**conditions, path: value}]
    problems: tuple[FieldError, ...] = ()
    for assignment in assignments:
        found = _validate_assignment(base, assignment)
        if not found:
            return
        problems = problems or found
    for problem in problems:
        # Also of another dimension, which one value of this one leaves without its path.
        if problem.path in space.dimensions and (hint := _explain_unknown_path(base, assignments[0], problem.path)):
            yield FieldError(f"dimensions.{problem.path}", hint)
            return
    own = _find_own_reason(problems, path)
    if own is not None:
        is_whole = dimension.values is None and "whole number" in own
        yield FieldError(f"{place}.{name}", own + ("; set whole" if is_whole else ""))
        return
    under = "".join(f" with {on} {format_value(assignments[0].get(on))}" for on in dimension.when)
    reasons = "; ".join(problem.reason for problem in problems)
    yield FieldError(f"{place}.{name}", f"{format_value(value)}{under}: {reasons}")


def _explain_unknown_path(base: Recipe, assignment: Mapping[str, Any], path: str) -> str | None:
    """Return why the recipe has no such path under the kinds of an assignment; None when it has one."""
    kinds = {other: value for other, value in assignment.items() if other.endswith(f".{KIND}") and other != path}
    try:
        draft = overrides.build_draft(base, kinds)
    except ConfigError:
        return None  # reported as a problem of the kind
    leaves = overrides.flatten_config(draft)
    if path in leaves:
        return None
    if homes := overrides.find_kinds_with_path(draft, path):
        kind = f"{path.rpartition('.')[0]}.{KIND}"
        listed = ", ".join(f'"{home}"' for home in homes)
        return f'belongs to {kind} {" or ".join(homes)}, not to {leaves[kind]}; add when: {{"{kind}": [{listed}]}}'
    return _find_own_reason(_validate_assignment(base, {path: assignment.get(path)}), path)


def _validate_assignment(base: Recipe, assignment: Mapping[str, Any]) -> tuple[FieldError, ...]:
    """Return the problems of an assignment; none when its recipe is valid."""
    try:
        build_recipe(base, assignment)
    except ConfigError as error:
        return error.field_errors
    return ()


def _find_own_reason(problems: tuple[FieldError, ...], path: str) -> str | None:
    """Return the problem of the field at the path itself, whatever the other fields are."""
    return next((one.reason for one in problems if one.path == path or one.path.startswith(f"{path}.")), None)
