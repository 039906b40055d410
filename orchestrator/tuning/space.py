"""Search spaces as plain data over dotted paths of the recipe. Importable without torch or ray.

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
from typing import Any, Self

from pydantic import Field, model_validator

from orchestrator.config import overrides, redaction
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError, FieldError, format_value
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io, urls
from orchestrator.tuning.trial import Assignment

MAX_LISTED = 10_000  # assignments; no sweep trains more
_DIGITS = 6  # of a number drawn from a range, so that it is easy to read and repeat

Scalar = bool | int | float | str


class Dimension(Config):
    """The values of one path of the recipe: a choice, or the numbers of a range."""

    values: tuple[Scalar | tuple[Scalar, ...] | None, ...] | None = Field(
        None, description="choices, as JSON has them; a pair such as augmentation.area is a list"
    )
    low: float | None = Field(None, description="least number of a range, instead of values")
    high: float | None = Field(None, description="greatest number of the range")
    log: bool = Field(False, description="draw from the range on a logarithmic scale")
    whole: bool = Field(False, description="draw whole numbers only")
    points: int = Field(3, ge=2, le=1000, description="numbers that a grid takes from a range, its ends included")
    when: dict[str, tuple[Scalar, ...]] = Field(
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
        if not self.values:
            raise ValueError("values must hold at least one value, got []; name one, or leave the dimension out")
        hashed = [to_hashable(value) for value in self.values]
        for number, value in enumerate(self.values):
            if hashed[number] in hashed[:number]:
                raise ValueError(f"values must differ, got {format_value(value)} twice; name each value once")
        return self

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        for path, values in self.when.items():
            if not values:
                raise ValueError(f"when: {path} must hold at least one value, got []; name one, or leave it out")
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
        if self.values is not None:
            return self.choices or ()
        return tuple(self.round_value(end) for end in self.bounds)

    @property
    def grid_values(self) -> tuple[Any, ...]:
        """All values, or `points` numbers of a range, evenly spread on its scale."""
        if self.values is not None:
            return self.choices or ()
        # A whole range may have fewer numbers than points.
        numbers = (self.round_value(self._interpolate(point / (self.points - 1))) for point in range(self.points))
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
    known, order = overrides.flatten_config(base), space.ordered_paths

    def exists(path: str, chosen: Mapping[str, Any]) -> bool:
        for on, values in space.dimensions[path].when.items():
            source = chosen if on in space.dimensions else known
            if on not in source or to_hashable(source[on]) not in map(to_hashable, values):
                return False
        return True

    def extend(rest: Sequence[str], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        left = list(itertools.dropwhile(lambda path: not exists(path, chosen), rest))
        if not left:
            yield chosen
            return
        for value in options(left[0], space.dimensions[left[0]]):
            yield from extend(left[1:], {**chosen, left[0]: value})

    return extend(order, {})


def choose_assignment(space: Space, base: Recipe, pick: Callable[[str, Dimension], Any]) -> dict[str, Any]:
    """Return the assignment with the value that `pick` returns for each dimension that exists, in order."""
    return next(iter_assignments(space, base, lambda path, dimension: (pick(path, dimension),)))


def build_recipe(base: Recipe, assignment: Assignment) -> Recipe:
    """Return the recipe of a trial. Another kind keeps the fields that it shares with the base's, else its defaults.

    Raises ConfigError for an invalid assignment.
    """
    return overrides.apply_overrides(base, assignment)


def list_grid(space: Space, base: Recipe) -> tuple[Assignment, ...]:
    """Return every assignment of a grid whose recipe is valid, one for each recipe; the last paths change fastest.

    Raises ConfigError for more than MAX_LISTED, or when none is valid.
    """
    listed = list(
        itertools.islice(iter_assignments(space, base, lambda _, dimension: dimension.grid_values), MAX_LISTED + 1)
    )
    if len(listed) > MAX_LISTED:
        longest = max(space.dimensions, key=lambda path: len(space.dimensions[path].grid_values))
        reason = (
            f"a grid must have at most {MAX_LISTED} trials, got more; set fewer points or values, first of {longest}"
        )
        raise ConfigError(FieldError("dimensions", f"{reason}, or sampler tpe or random"))
    assignments: dict[Recipe, Assignment] = {}
    refusals: list[ConfigError] = []
    for assignment in listed:
        try:
            assignments.setdefault(build_recipe(base, assignment), assignment)
        except ConfigError as error:
            refusals.append(error)
    if not assignments:
        raise ConfigError(FieldError("dimensions", f"no trial of the grid is valid; the first: {refusals[0]}"))
    return tuple(assignments.values())


def list_assignments(space: Space, base: Recipe) -> tuple[Assignment, ...] | None:
    """Return all assignments, valid or not; None when they are infinite, or more than MAX_LISTED."""
    if any(dimension.choices is None for dimension in space.dimensions.values()):
        return None
    listed = itertools.islice(
        iter_assignments(space, base, lambda _, dimension: dimension.choices or ()), MAX_LISTED + 1
    )
    assignments = tuple(listed)
    return assignments if len(assignments) <= MAX_LISTED else None


def load_space(url: str) -> Space:
    """Return the space in a .json or .toml file at a path or URL; in TOML a path is quoted: [dimensions."loss.x"].

    Raises ConfigError when the file is missing, cannot be read, or holds no space.
    """
    parsers: dict[str, Callable[[str], Any]] = {"json": _parse_json, "toml": tomllib.loads}
    try:
        parse = parsers[urls.get_basename(url).rpartition(".")[2]]
        return Space.from_dict(parse(file_io.read_bytes(url).decode()))
    except KeyError:
        reason = "its name must end in .json or .toml"
    except FileNotFoundError:
        reason = "no such file"
    except ConfigError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
    raise ConfigError(FieldError("space", f"{redaction.redact(url)}: {reason}"))


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_reject_duplicate_keys)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError for a repeated key, of which JSON would silently drop one."""
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{repeated[0]} is there twice; name it once")
    return dict(pairs)
