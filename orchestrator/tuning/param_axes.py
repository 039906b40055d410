"""What a sweep searched: its paths, their short names, and the scale that tells their values apart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.tuning.trial import Assignment, Trial

AxisScale = Literal["choice", "linear", "log"]

LOG_SPAN = 10.0  # values, all above 0, whose largest is this many times the smallest are told apart by their logarithms
MAX_VALUE_CHARS = 28  # characters of a value


@dataclass(frozen=True)
class ParamAxis:
    """A searched path with what the trials took of it.

    name: its last parts, as many as no other path shares. choices: the texts of a choice's values, in their order.
    numbers: the values of any other axis, ascending, each once. some_absent: whether a trial's kinds have no such path.
    """

    path: str
    name: str
    scale: AxisScale
    choices: tuple[str, ...]
    numbers: tuple[float, ...]
    has_absent: bool

    def get_coordinate(self, assignment: Assignment) -> float | None:
        """A number that the scale is even in: the value, its logarithm, or a choice's index; None when absent."""
        if self.path not in assignment:
            return None
        found = assignment[self.path]
        if self.scale == "choice":
            return float(self.choices.index(format_choice(found)))
        return math.log10(found) if self.scale == "log" else float(found)

    def normalize(self, value: float) -> float:
        """Where such a number lies on the axis, from 0 to 1; 0.5 where all are the same."""
        low, high = self.bounds
        return (value - low) / (high - low) if high > low else 0.5

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest that `value` is."""
        if self.scale == "choice":
            return 0.0, len(self.choices) - 1.0
        low, high = self.numbers[0], self.numbers[-1]
        return (math.log10(low), math.log10(high)) if self.scale == "log" else (low, high)


def build_axes(trials: Sequence[Trial]) -> tuple[ParamAxis, ...]:
    """An axis for each path that a trial assigns, in the order of their first use."""
    paths = tuple(dict.fromkeys(path for trial in trials for path in trial.assignment))
    names = make_short_names(paths)
    return tuple(_build_axis(path, names[path], trials) for path in paths)


def make_short_names(paths: Iterable[str]) -> dict[str, str]:
    """The last dotted parts of each path, as many as tell it from the others."""
    known = tuple(dict.fromkeys(paths))
    found = {}
    for path in known:
        parts = path.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        found[path] = next(
            (end for end in endings if not any(other != path and _has_suffix(other, end) for other in known)), path
        )
    return found


def format_value(value: Any) -> str:
    """A value as one short line: numbers to four digits, long text cut."""
    text = f"{value:.4g}" if isinstance(value, float) else format_choice(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def format_choice(value: Any) -> str:
    """A value as one line, whole: what tells the values of a choice apart."""
    if value is None:
        return "none"
    words = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    return " ".join(words.split())


def format_assignment(assignment: Assignment, names: dict[str, str]) -> str:
    """An assignment in short, as in "base_rate=0.01 power=0.5"."""
    return " ".join(f"{names[path]}={format_value(value)}" for path, value in assignment.items())


def is_log(values: Sequence[float]) -> bool:
    """Whether an axis shows these better by their logarithms: all above 0, and far apart."""
    return bool(values) and min(values) > 0 and max(values) >= LOG_SPAN * min(values)


def _build_axis(path: str, name: str, trials: Sequence[Trial]) -> ParamAxis:
    values = [trial.assignment[path] for trial in trials if path in trial.assignment]
    absent = len(values) < len(trials)
    if all(_is_number(value) for value in values):
        scale: AxisScale = "log" if is_log(values) else "linear"
        return ParamAxis(path, name, scale, (), tuple(sorted({float(value) for value in values})), absent)
    choices = dict.fromkeys(format_choice(value) for value in sorted(values, key=_get_sort_key))
    return ParamAxis(path, name, "choice", tuple(choices), (), absent)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _get_sort_key(value: Any) -> tuple[bool, float, str]:
    """Numbers behind words, and by size."""
    return (True, float(value), "") if _is_number(value) else (False, 0.0, format_choice(value))


def _has_suffix(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
