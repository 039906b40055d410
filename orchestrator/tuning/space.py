"""Search spaces as plain data over dotted paths of the recipe, and their check. Importable without torch or ray.

A dimension that only one kind has names it: `"schedule.power": {..., "when": {"schedule.kind": ["polynomial"]}}`.
The order of dimensions in a file makes no difference.
"""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from orchestrator.config import overrides, redaction
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError, FieldError, format_value
from orchestrator.config.introspection import KIND
from orchestrator.recipe.config import Recipe, pin_code
from orchestrator.storage import file_io, urls
from orchestrator.tuning.trial import Assignment

MAX_LISTED = 10_000  # assignments; no sweep trains more
_DIGITS = 6  # of a number drawn from a range, so that it is easy to read and repeat

# First part of a path -> why a sweep leaves it alone.
FIXED_PATHS = {
    "name": "it only names runs",
    "version": "it defines the meaning of a recipe",
    "epochs": "trials are compared after equally many, and pruned by them",
    "seeds": "the luckiest seed would win; --repeats compares gain and luck",
    "initial_weights": "trials that start from other weights do not compare; set it in the recipe",
}
_MAX_TRIES = 1000  # settings of the other dimensions, before a value is reported to suit none of them

Scalar = bool | int | float | str


class Dimension(Config):
    """The values of one path of the recipe: a choice, or the numbers of a range."""

    values: Annotated[tuple[Scalar | tuple[Scalar, ...] | None, ...], Field(min_length=1)] | None = Field(
        None, description="choices, as JSON has them; a pair such as augmentation.area is a list"
    )
    low: float | None = Field(None, description="least number of a range, instead of values")
    high: float | None = Field(None, description="greatest number of the range")
    log: bool = Field(False, description="draw from the range on a logarithmic scale")
    whole: bool = Field(False, description="draw whole numbers only")
    points: int = Field(3, ge=2, le=1000, description="numbers that a grid takes from a range, its ends included")
    when: dict[str, Annotated[tuple[Scalar, ...], Field(min_length=1)]] = Field(
        {}, description="path of another dimension, or of the recipe, to the values under which this dimension exists"
    )

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.values is None:
            self._check_range()
            return self
        fields, range_fields = type(self).model_fields, ("low", "high", "log", "whole", "points")
        if extra := [name for name in range_fields if getattr(self, name) != fields[name].default]:
            raise ValueError(f"must have values or a range, got both values and {', '.join(extra)}; leave one out")
        hashed = [to_hashable(value) for value in self.values]
        for number, value in enumerate(self.values):
            if hashed[number] in hashed[:number]:
                raise ValueError(f"values must differ, got {format_value(value)} twice; name each value once")
        return self

    def _check_range(self) -> None:
        if self.low is None or self.high is None:
            missing = " and ".join(name for name in ("low", "high") if getattr(self, name) is None)
            raise ValueError(f"{missing} must be given, or values instead of a range")
        ends = f"got low {self.low:g}, high {self.high:g}"
        if self.low >= self.high:
            raise ValueError(f"low must be below high, {ends}; set other ends")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be above 0 with log, {ends}; set a higher one, or leave log out")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(
                f"low and high must be whole numbers with whole, {ends}; set whole ones, or leave whole out"
            )

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """All values, as JSON has them; None for a range that is not whole, or of MAX_LISTED numbers or more."""
        if self.values is not None:
            return tuple(list(value) if isinstance(value, tuple) else value for value in self.values)
        low, high = self.bounds
        if not self.whole or high - low >= MAX_LISTED:
            return None
        return tuple(range(int(low), int(high) + 1))

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest number of a range."""
        assert self.low is not None and self.high is not None, "values have no ends"
        return self.low, self.high

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values, or the least and the greatest number of a range."""
        return self.list_values(2)

    @property
    def grid_values(self) -> tuple[Any, ...]:
        """All values, or `points` numbers of a range."""
        return self.list_values(self.points)

    def list_values(self, points: int) -> tuple[Any, ...]:
        """Return all values, or so many numbers of a range, evenly spread on its scale; a whole one may have fewer."""
        if self.values is not None:
            return self.choices or ()
        numbers = (self.round_value(self._interpolate(point / (points - 1))) for point in range(points))
        return tuple(dict.fromkeys(numbers))

    def value_at(self, share: float) -> Any:
        """Return the value at a share, from 0 to below 1, of the choices or the range."""
        if self.values is not None:
            return (self.choices or ())[int(share * len(self.values))]
        # Half a number more on both sides makes the ends of a whole range as likely as the others.
        return self.round_value(self._interpolate(share, 0.5 if self.whole else 0.0))

    def accepts(self, value: Any) -> bool:
        """Return whether the dimension has that value."""
        if self.values is not None:
            return to_hashable(value) in map(to_hashable, self.values)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.bounds
        return low <= value <= high and (not self.whole or value == int(value))

    def _interpolate(self, share: float, margin: float = 0.0) -> float:
        low, high = self.bounds[0] - margin, self.bounds[1] + margin
        if self.log:
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        return low + share * (high - low)

    def round_value(self, value: float) -> Any:
        """Return the number of the range nearest to `value`: to six digits, or whole."""
        low, high = self.bounds
        short = round(value) if self.whole else float(f"{value:.{_DIGITS}g}")
        number = min(max(short, low), high)
        return int(number) if self.whole else number


class Space(Config):
    """A search space: dotted paths of the recipe and their dimensions."""

    dimensions: dict[str, Dimension] = Field(min_length=1, description="dotted path of the recipe to its dimension")

    @model_validator(mode="after")
    def _check_acyclic(self) -> Self:
        try:
            self.build_sorter().prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise ValueError(
                f"dimensions must not depend on each other in a circle, got {circle}; leave a `when` out"
            ) from None
        return self

    def build_sorter(self) -> TopologicalSorter[str]:
        """Return the graph of the dimensions: each after those that it depends on."""
        known = self.dimensions
        return TopologicalSorter({path: [on for on in known[path].when if on in known] for path in known})

    @property
    def ordered_paths(self) -> tuple[str, ...]:
        """The paths, each after those that it depends on, else in the order of names."""
        sorter, ordered = self.build_sorter(), list[str]()
        sorter.prepare()
        while sorter.is_active():
            ready = sorted(sorter.get_ready())
            ordered.extend(ready)
            sorter.done(*ready)
        return tuple(ordered)

    def pin_code(self, base: Recipe) -> Recipe:
        """Return the recipe with digests of its plug-ins' code, and of that of the plug-ins in this space.

        Raises ConfigError for a plug-in whose module cannot be found.
        """
        values = [{path.rpartition(".")[2]: there.values} for path, there in self.dimensions.items()]
        return pin_code(base, values)


def to_hashable(value: Any) -> Hashable:
    """Return a key that is equal for values that JSON takes for the same: 1 and 1.0, list and tuple, not 1 and true."""
    if isinstance(value, list | tuple):
        return tuple(map(to_hashable, value))
    return ("bool", value) if isinstance(value, bool) else value


def iter_assignments(
    space: Space, base: Recipe, options: Callable[[str, Dimension], Iterable[Any]]
) -> Iterator[dict[str, Any]]:
    """Return every assignment of the options of each dimension that exists, in the order of the paths.

    A dimension exists when all conditions of its `when` hold. A condition on a dimension that does not exist does not
    hold; one on any other path looks at the base recipe.
    """
    known = {path: value for path, value in overrides.flatten_config(base).items() if path not in space.dimensions}

    def extend(paths: Sequence[str], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not paths:
            yield chosen
            return
        path, *rest = paths
        dimension, present = space.dimensions[path], known | chosen
        if all(
            on in present and to_hashable(present[on]) in map(to_hashable, values)
            for on, values in dimension.when.items()
        ):
            for value in options(path, dimension):
                yield from extend(rest, {**chosen, path: value})
        else:
            yield from extend(rest, chosen)

    return extend(space.ordered_paths, {})


def choose_assignment(space: Space, base: Recipe, pick: Callable[[str, Dimension], Any]) -> dict[str, Any]:
    """Return the assignment with the value that `pick` returns for each dimension that exists, in order."""
    return next(iter_assignments(space, base, lambda path, dimension: (pick(path, dimension),)))


def list_grid(space: Space, base: Recipe) -> dict[Recipe, Assignment]:
    """Return each valid recipe of a grid and its assignment; the last paths change fastest.

    Raises ConfigError for more than MAX_LISTED assignments, or when none is valid.
    """
    assignments = _list_limited(space, base, lambda dimension: dimension.grid_values)
    if assignments is None:
        longest = max(space.dimensions, key=lambda path: len(space.dimensions[path].grid_values))
        raise ConfigError(
            f"dimensions: a grid must have at most {MAX_LISTED} trials, got more; set fewer points or values, first of "
            f"{longest}, or sampler tpe or random"
        )
    recipes: dict[Recipe, Assignment] = {}
    refusals: list[ConfigError] = []
    for assignment in assignments:
        try:
            recipes.setdefault(overrides.apply_overrides(base, assignment), assignment)
        except ConfigError as error:
            refusals.append(error)
    if not recipes:
        raise ConfigError(f"dimensions: no trial of the grid is valid; the first: {refusals[0]}")
    return recipes


def list_assignments(space: Space, base: Recipe) -> list[dict[str, Any]] | None:
    """Return all assignments, valid or not; None when they are infinite, or more than MAX_LISTED."""
    if any(dimension.choices is None for dimension in space.dimensions.values()):
        return None
    return _list_limited(space, base, lambda dimension: dimension.choices or ())


def _list_limited(
    space: Space, base: Recipe, options: Callable[[Dimension], Iterable[Any]]
) -> list[dict[str, Any]] | None:
    assignments = iter_assignments(space, base, lambda _, dimension: options(dimension))
    listed = list(itertools.islice(assignments, MAX_LISTED + 1))
    return listed if len(listed) <= MAX_LISTED else None


def load_space(url: str) -> Space:
    """Return the space in a .json or .toml file at a path or URL; in TOML a path is quoted: [dimensions."loss.x"].

    Raises ConfigError when the file is missing, cannot be read, or holds no space.
    """
    ending = urls.get_basename(url).rpartition(".")[2]
    try:
        if ending not in ("json", "toml"):
            raise ConfigError("its name must end in .json or .toml")
        text = file_io.read_bytes(url).decode()
        return Space.from_dict(
            tomllib.loads(text) if ending == "toml" else json.loads(text, object_pairs_hook=_reject_duplicate_keys)
        )
    except FileNotFoundError:
        reason = "no such file"
    except ConfigError as error:
        reason = str(error)
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read: {error}"
    raise ConfigError(FieldError("space", f"{redaction.redact(url)}: {reason}"))


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a repeated key, of which JSON would silently drop one."""
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is there twice; name it once")
    return dict(pairs)


def check_space(space: Space, base: Recipe) -> None:
    """Check that every value of every dimension, and both ends of every range, give some valid recipe.

    A value that suits only some values of other dimensions, such as a final rate above a few of the base rates, passes:
    samplers draw again. Raises ConfigError, which names every invalid dimension, its value, and what to do.
    """
    problems = [problem for path in sorted(space.dimensions) for problem in _find_problems(space, base, path)]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    if not next(iter_assignments(space, base, lambda _, dimension: dimension.extremes)):
        raise ConfigError("dimensions: none exists with this recipe: no `when` holds; change one, or the recipe")


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
    return [problem for name, value in values for problem in _check_value(space, base, path, name, value)]


def _check_condition(space: Space, base: Recipe, path: str, on: str) -> Iterator[str]:
    other = space.dimensions.get(on)
    for value in space.dimensions[path].when[on]:
        if other is None:
            if (reason := _find_own_reason(_validate_assignment(base, {on: value}), on)) is not None:
                yield f"{on}: {reason}"
        elif other.choices is None or not other.accepts(value):
            choices = ", ".join(map(format_value, (other.choices or ())[:12])) or "none of a range"
            yield f"{on} must be one of the dimension's values ({choices}), got {format_value(value)}"


def _check_value(space: Space, base: Recipe, path: str, name: str, value: Any) -> Iterator[FieldError]:
    """Yield why no recipe has the value at the path; nothing when one has."""
    place, dimension = f"dimensions.{path}", space.dimensions[path]
    tries = iter_assignments(space, base, lambda other, there: (value,) if other == path else there.extremes)
    # Without one the dimension does not exist with this recipe: its values are checked all the same.
    conditions = {on: values[0] for on, values in dimension.when.items()}
    assignments = [tried for tried in itertools.islice(tries, _MAX_TRIES) if path in tried]
    assignments = assignments or [{**conditions, path: value}]
    problems: tuple[FieldError, ...] = ()
    for assignment in assignments:
        if not (found := _validate_assignment(base, assignment)):
            return
        problems = problems or found
    for problem in problems:
        # Also of another dimension, which one value of this one leaves without its path.
        if problem.path in space.dimensions and problem.reason.startswith("belongs to"):
            kind = f"{problem.path.rpartition('.')[0]}.{KIND}"
            homes = overrides.find_kinds_with_path(base, problem.path)
            present = assignments[0].get(kind, overrides.flatten_config(base)[kind])
            hint = f"add when: {json.dumps({kind: homes})}"
            reason = f"belongs to {kind} {' or '.join(homes)}, not to {present}; {hint}"
            yield FieldError(f"dimensions.{problem.path}", reason)
            return
    if (own := _find_own_reason(problems, path)) is None:
        under = "".join(f" with {on} {format_value(assignments[0].get(on))}" for on in dimension.when)
        reasons = "; ".join(problem.reason for problem in problems)
        yield FieldError(f"{place}.{name}", f"{format_value(value)}{under}: {reasons}")
        return
    hint = "; set whole" if dimension.values is None and "whole number" in own else ""
    yield FieldError(place if own.startswith("unknown path") else f"{place}.{name}", own + hint)


def _validate_assignment(base: Recipe, assignment: Mapping[str, Any]) -> tuple[FieldError, ...]:
    try:
        overrides.apply_overrides(base, assignment)
    except ConfigError as error:
        return error.field_errors
    return ()


def _find_own_reason(problems: tuple[FieldError, ...], path: str) -> str | None:
    """Return the problem of the field at the path itself, whatever the other fields are."""
    return next((one.reason for one in problems if one.path == path or one.path.startswith(f"{path}.")), None)
