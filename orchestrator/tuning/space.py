"""Search spaces as plain data over dotted paths of the recipe. Importable without torch or ray.

A dimension that belongs to one kind only says so: `"schedule.power": {..., "when": {"schedule.kind": ["polynomial"]}}`.
What becomes of a space is a function of its dimensions, never of the order in which a file names them.
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

# More assignments than this are never listed, and nobody trains as many.
MAX_LISTED = 10_000
_DIGITS = 6  # of a number drawn from a range; people read and repeat them

Scalar = bool | int | float | str


class Dimension(Config):
    """What one path of the recipe may be: one of some values, or a number of a range."""

    values: tuple[Scalar | tuple[Scalar, ...] | None, ...] | None = Field(
        None, description="choices, as JSON has them; a pair such as augmentation.area is a list"
    )
    low: float | None = Field(None, description="least number of a range; instead of values")
    high: float | None = Field(None, description="greatest number of it")
    log: bool = Field(False, description="draw from the range on a logarithmic scale")
    whole: bool = Field(False, description="draw whole numbers only")
    points: int = Field(3, ge=2, le=1000, description="numbers that a grid takes of a range, its ends among them")
    when: dict[str, tuple[Scalar, ...]] = Field(
        {}, description="path of another dimension, or of the recipe, to the values under which this dimension exists"
    )

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.values is None:
            self._check_range()
            return self
        fields = type(self).model_fields
        of_ranges = ("low", "high", "log", "whole", "points")
        given = [name for name in of_ranges if getattr(self, name) != fields[name].default]
        if given:
            raise ValueError(f"{', '.join(given)} beside values is refused: give values or a range, not both")
        if not self.values:
            raise ValueError("values [] is refused: name at least one value, or leave the dimension out")
        known: set[Hashable] = set()
        for value in self.values:
            if to_hashable(value) in known:
                raise ValueError(f"values: {format_value(value)} is there twice; name each value once")
            known.add(to_hashable(value))
        return self

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        for path, values in self.when.items():
            if not values:
                raise ValueError(f"when: {path} [] is refused: name at least one value, or leave the condition out")
        return self

    def _check_range(self) -> None:
        if self.low is None or self.high is None:
            missing = " and ".join(name for name in ("low", "high") if getattr(self, name) is None)
            raise ValueError(f"{missing} must be given, or values instead of a range")
        shown = f"low {self.low:g}, high {self.high:g}"
        if self.low >= self.high:
            what = "an empty range" if self.low == self.high else "an inverted range"
            raise ValueError(f"{shown} is refused: {what}; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"{shown} is refused: with log, low must be above 0")
        if self.whole and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"{shown} is refused: with whole, both must be whole numbers")

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """Everything that it may be, as JSON has it; None for a range that is not whole, or over MOST_LISTED."""
        if self.values is not None:
            return tuple(list(value) if isinstance(value, tuple) else value for value in self.values)
        low, high = self.bounds
        if not self.whole or high - low >= MAX_LISTED:
            return None
        return tuple(range(int(low), int(high) + 1))

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest number of a range."""
        assert self.low is not None and self.high is not None, "values have no ends"
        return self.low, self.high

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All values, or the least and the greatest number."""
        if self.values is not None:
            return self.choices or ()
        return tuple(self.round_value(end) for end in self.bounds)

    @property
    def grid_values(self) -> tuple[Any, ...]:
        """What a grid takes: all values, or `points` numbers of a range, evenly spread on its scale."""
        if self.values is not None:
            return self.choices or ()
        # A whole range may have fewer numbers than points.
        found = (self.round_value(self._interpolate(point / (self.points - 1))) for point in range(self.points))
        return tuple(dict.fromkeys(found))

    def value_at(self, share: float) -> Any:
        """What it is at that share, from 0 to below 1, of all that it may be."""
        if self.values is not None:
            return (self.choices or ())[int(share * len(self.values))]
        # Half a number more on both sides gives the ends of a whole range their equal part.
        return self.round_value(self._interpolate(share, 0.5 if self.whole else 0.0))

    def accepts(self, value: Any) -> bool:
        """Whether it may be that."""
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
        """The number of the range that stands for `value`: six digits of it, or a whole one."""
        low, high = self.bounds
        short = round(value) if self.whole else float(f"{value:.{_DIGITS}g}")
        number = min(max(short, low), high)
        return int(number) if self.whole else number


class Space(Config):
    """What is searched: dotted path of the recipe to what may stand there."""

    dimensions: dict[str, Dimension] = Field(min_length=1, description="dotted path of the recipe to what it may be")

    @model_validator(mode="after")
    def _check_acyclic(self) -> Self:
        try:
            self.build_sorter().prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise ValueError(
                f"dimensions: when goes in a circle, so that none of these ever exists: {circle}"
            ) from None
        return self

    def build_sorter(self) -> TopologicalSorter[str]:
        """The dimensions as a graph: each after those that it depends on."""
        known = self.dimensions
        return TopologicalSorter({path: [on for on in known[path].when if on in known] for path in known})

    @property
    def ordered_paths(self) -> tuple[str, ...]:
        """The paths, each after those that it depends on, else by name."""
        sorter, found = self.build_sorter(), list[str]()
        sorter.prepare()
        while sorter.is_active():
            ready = sorted(sorter.get_ready())
            found.extend(ready)
            sorter.done(*ready)
        return tuple(found)


def to_hashable(value: Any) -> Hashable:
    """Equal for values that are the same in JSON: 1 and 1.0, a list and a tuple, but not 1 and true."""
    if isinstance(value, list | tuple):
        return tuple(map(to_hashable, value))
    return ("bool", value) if isinstance(value, bool) else value


def iter_assignments(
    space: Space, base: Recipe, options: Callable[[str, Dimension], Iterable[Any]]
) -> Iterator[dict[str, Any]]:
    """Every assignment that can be made of the options of each dimension; of those only that exist, in their order.

    A dimension exists when all of its `when` hold. One that looks at a dimension which does not exist itself, does not
    exist either; at a path that is no dimension, the base recipe decides.
    """
    known, order = overrides.flatten_config(base), space.ordered_paths

    def exists(path: str, chosen: Mapping[str, Any]) -> bool:
        for on, values in space.dimensions[path].when.items():
            source = chosen if on in space.dimensions else known
            if on not in source or to_hashable(source[on]) not in map(to_hashable, values):
                return False
        return True

    def further(rest: Sequence[str], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
        left = list(itertools.dropwhile(lambda path: not exists(path, chosen), rest))
        if not left:
            yield chosen
            return
        for value in options(left[0], space.dimensions[left[0]]):
            yield from further(left[1:], {**chosen, left[0]: value})

    return further(order, {})


def choose_assignment(space: Space, base: Recipe, pick: Callable[[str, Dimension], Any]) -> dict[str, Any]:
    """The assignment in which every dimension that exists is what `pick` says; it is asked for those only, in order."""
    return next(iter_assignments(space, base, lambda path, dimension: (pick(path, dimension),)))


def build_recipe(base: Recipe, assignment: Assignment) -> Recipe:
    """The recipe of a trial. Another kind keeps what it shares with the base's, and has its defaults for the rest.

    Raises:
        ConfigError: for an assignment that the recipe refuses.
    """
    return overrides.apply_overrides(base, assignment)


def list_grid(space: Space, base: Recipe) -> tuple[Assignment, ...]:
    """Every assignment of a grid whose recipe is valid, one for each recipe; the last paths change fastest.

    Raises:
        ConfigError: for more than MOST_LISTED, or when the recipe refuses every one.
    """
    listed = list(
        itertools.islice(iter_assignments(space, base, lambda _, dimension: dimension.grid_values), MAX_LISTED + 1)
    )
    if len(listed) > MAX_LISTED:
        points = max(space.dimensions, key=lambda path: len(space.dimensions[path].grid_values))
        reason = f"a grid of more than {MAX_LISTED} trials is refused: fewer points or values (most: {points}) will do"
        raise ConfigError(FieldError("dimensions", reason + ", or sampler tpe or random"))
    found: dict[Recipe, Assignment] = {}
    refusals: list[ConfigError] = []
    for assignment in listed:
        try:
            found.setdefault(build_recipe(base, assignment), assignment)
        except ConfigError as error:
            refusals.append(error)
    if not found:
        raise ConfigError(FieldError("dimensions", f"no trial of the grid is valid; the first: {refusals[0]}"))
    return tuple(found.values())


def list_assignments(space: Space, base: Recipe) -> tuple[Assignment, ...] | None:
    """Every assignment there is, valid or not; None where they have no end, or are more than MOST_LISTED."""
    if any(dimension.choices is None for dimension in space.dimensions.values()):
        return None
    listed = itertools.islice(
        iter_assignments(space, base, lambda _, dimension: dimension.choices or ()), MAX_LISTED + 1
    )
    found = tuple(listed)
    return found if len(found) <= MAX_LISTED else None


def load_space(url: str) -> Space:
    """The space in a .json or .toml file at a path or URL; in TOML a dotted path is quoted: [dimensions."loss.x"].

    Raises:
        ConfigError: when the file is not there, cannot be read, or holds no space.
    """
    shown = redaction.redact(url)
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
    raise ConfigError(FieldError("space", f"{shown} is refused: {reason}"))


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_reject_duplicate_keys)


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two equal keys one would be lost without a word. Raises ValueError."""
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice")
    return dict(pairs)
