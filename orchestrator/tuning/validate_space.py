"""Whether a space suits a recipe, told before anything is trained. Importable without torch or ray."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.config import overrides
from orchestrator.config.errors import ConfigError, FieldError, format_value
from orchestrator.config.introspection import KIND
from orchestrator.recipe.config import Recipe
from orchestrator.tuning.space import Dimension, Space, build_recipe, iter_assignments, to_hashable

# First part of a path -> why a sweep leaves it alone.
FIXED_PATHS = {
    "name": "it is only what runs are called",
    "version": "it says what a recipe means",
    "epochs": "trials are compared after equally many, and ended early by them",
    "seeds": "the winner would be the luckiest one; --repeats tells luck from gain",
    "initial_weights": "trials that start from other weights cannot be compared; set it in the recipe",
}
_MAX_CONTEXTS = 64
_MAX_TRIES = 1000  # ways to set the other dimensions, before a value is said to fit none of them


def check_space(space: Space, base: Recipe) -> None:
    """Nothing when every value of every dimension, and both ends of every range, gives some valid recipe.

    Values that suit only some values of other dimensions, such as a final rate above a few of the base rates, pass:
    samplers draw again.

    Raises:
        ConfigError: naming every dimension that is refused, the value, and what to do.
    """
    problems = [problem for path in sorted(space.dimensions) for problem in _find_problems(space, base, path)]
    if not problems and not next(iter_assignments(space, base, lambda _, dimension: dimension.extremes)):
        problems = [FieldError("dimensions", "none exists with this recipe: no `when` holds; mend one, or the recipe")]
    if problems:
        raise ConfigError(*problems)


def _find_problems(space: Space, base: Recipe, path: str) -> list[FieldError]:
    """What is wrong with one dimension; the first sort of trouble only, since others follow from it."""
    where, dimension = f"dimensions.{path}", space.dimensions[path]
    kept = FIXED_PATHS.get(path.partition(".")[0])
    if kept is not None:
        return [FieldError(where, f"is refused: {kept}; leave it out")]
    found = [
        FieldError(f"{where}.when", reason)
        for on in sorted(dimension.when)
        for reason in _check_condition(space, base, path, on)
    ]
    if found:
        return found
    contexts = list(itertools.islice(_iter_contexts(space, base, path, frozenset()), _MAX_CONTEXTS))
    for context in contexts:
        reason = _explain_unknown_path(base, context, path, dimension.extremes[0])
        if reason is not None:
            return [FieldError(where, reason)]
    values = {f"{where}.{name}": value for name, value in _iter_named_values(dimension)}
    reasons = {place: _explain_invalid_value(space, base, contexts, path, value) for place, value in values.items()}
    return [FieldError(place, reason) for place, reason in reasons.items() if reason is not None]


def _iter_named_values(dimension: Dimension) -> Iterator[tuple[str, Any]]:
    if dimension.values is None:
        yield from zip(("low", "high"), dimension.extremes, strict=True)
    else:
        yield from ((f"values.{number}", value) for number, value in enumerate(dimension.extremes))


def _check_condition(space: Space, base: Recipe, path: str, on: str) -> Iterator[str]:
    """Why the dimension's `when` can never hold as it says."""
    values = space.dimensions[path].when[on]
    other = space.dimensions.get(on)
    if other is not None and other.choices is None:
        yield f"{on} is a range, which hardly ever is one of these; give it values, or whole"
    elif other is not None:
        never = [value for value in values if not other.accepts(value)]
        taken = ", ".join(map(format_value, (other.choices or ())[:12]))
        yield from (
            f"{on} {format_value(value)} is refused: the dimension {on} is never that, but {taken}" for value in never
        )
    else:
        for value in values:
            reason = _explain_unknown_path(base, {}, on, value)
            own = None if reason is not None else _find_own_reason(_validate_assignment(base, {on: value}), on)
            if reason is not None or own is not None:
                yield f"{on}: {reason or own}"


def _iter_contexts(space: Space, base: Recipe, path: str, below: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The ways to set the kinds and conditions that decide whether the path exists, and in which form."""
    on = {other: list(values) for other, values in space.dimensions[path].when.items()}
    known = overrides.flatten_config(base)
    for other, values in on.items():
        # What is no dimension is as the recipe has it, unless the dimension does not exist with this recipe at all.
        if other not in space.dimensions and other in known:
            on[other] = [value for value in values if to_hashable(value) == to_hashable(known[other])] or values
    branches = path.split(".")[:-1]
    for depth in range(1, len(branches) + 1):
        kind = ".".join((*branches[:depth], KIND))
        if kind in space.dimensions and kind != path:
            on.setdefault(kind, list(space.dimensions[kind].choices or ()))
    above = {
        other: list(itertools.islice(_iter_contexts(space, base, other, below | {path}), _MAX_CONTEXTS))
        for other in on
        if other in space.dimensions and other not in below
    }
    for chosen in itertools.product(*([(other, value) for value in values] for other, values in on.items())):
        for parts in itertools.product(*above.values()):
            merged = _merge_assignments([dict(chosen), *parts])
            if merged is not None:
                yield merged


def _merge_assignments(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """All of them together, None where two contradict each other."""
    found: dict[str, Any] = {}
    for part in parts:
        for path, value in part.items():
            if to_hashable(found.setdefault(path, value)) != to_hashable(value):
                return None
    return found


def _explain_unknown_path(base: Recipe, context: Mapping[str, Any], path: str, value: Any) -> str | None:
    """Why there is no such leaf in the recipe with the kinds of the context; None when there is one."""
    try:
        shape = overrides.build_draft(base, context)
    except ConfigError:
        return None  # told where the context comes from
    leaves = overrides.flatten_config(shape)
    if path in leaves:
        return None
    inside = [leaf for leaf in leaves if leaf.startswith(f"{path}.")]
    if inside:
        return f"holds several fields; name one of them: {', '.join(inside[:12])}"
    homes = overrides.find_kinds_with_path(shape, path)
    if homes:
        kind = f"{path.rpartition('.')[0]}.{KIND}"
        listed = ", ".join(f'"{home}"' for home in homes)
        return f'belongs to {kind} {" or ".join(homes)}, not to {leaves[kind]}; add when: {{"{kind}": [{listed}]}}'
    reasons = [
        problem.reason for problem in _validate_assignment(base, {**context, path: value}) if problem.path == path
    ]
    return reasons[0] if reasons else "unknown path"


def _explain_invalid_value(
    space: Space, base: Recipe, contexts: list[dict[str, Any]], path: str, value: Any
) -> str | None:
    """Why no recipe has the value at the path in one of the contexts; None when each has one."""
    dimension = space.dimensions[path]
    for context in contexts:
        fixed = {**context, path: value}
        problems = _validate_assignment(base, fixed)
        if not problems:
            continue
        own = _find_own_reason(problems, path)
        if own is not None:
            whole = "; say whole" if dimension.values is None and "whole number" in own else ""
            return own + whole
        if not _can_complete(space, base, fixed):
            under = "".join(f" with {other} {format_value(chosen)}" for other, chosen in context.items())
            return f"{format_value(value)}{under}: {'; '.join(problem.reason for problem in problems)}"
    return None


def _can_complete(space: Space, base: Recipe, fixed: Mapping[str, Any]) -> bool:
    """Whether the others can be set so that the recipe is valid; also when this is never asked for."""

    def options(path: str, dimension: Dimension) -> tuple[Any, ...]:
        return (fixed[path],) if path in fixed else dimension.extremes

    wanted = [path for path in fixed if path in space.dimensions]
    tries = itertools.islice(iter_assignments(space, base, options), _MAX_TRIES)
    fitting = [found for found in tries if all(path in found for path in wanted)]
    return not fitting or any(not _validate_assignment(base, found) for found in fitting)


def _validate_assignment(base: Recipe, assignment: Mapping[str, Any]) -> tuple[FieldError, ...]:
    """What the recipe refuses of an assignment; empty when it is valid."""
    try:
        build_recipe(base, assignment)
    except ConfigError as error:
        return error.field_errors
    return ()


def _find_own_reason(problems: tuple[FieldError, ...], path: str) -> str | None:
    """What the field itself refuses, whatever the others are."""
    for problem in problems:
        if problem.path == path or problem.path.startswith(f"{path}."):
            return problem.reason
    return None
