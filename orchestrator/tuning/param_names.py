"""Searched paths and their values as short texts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.tuning.trial import Assignment, Trial

LOG_SPAN = 10.0  # a range whose ends are this many times apart is drawn on a logarithmic scale
MAX_VALUE_CHARS = 28


def list_paths(trials: Iterable[Trial]) -> tuple[str, ...]:
    """Return the paths that any of the trials assigns, in the order of their first use."""
    return tuple(dict.fromkeys(path for trial in trials for path in trial.assignment))


def make_short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return the last dotted parts of each path, as many as no other path shares."""
    known = tuple(dict.fromkeys(paths))
    names = {}
    for path in known:
        parts = path.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [other for other in known if other != path]
        names[path] = next(
            (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others)), path
        )
    return names


def format_value(value: Any) -> str:
    """Return a value as one short line: numbers to four digits, long text cut."""
    text = f"{value:.4g}" if isinstance(value, float) else format_choice(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def format_choice(value: Any) -> str:
    """Return a value as one line, whole, which tells the values of a choice apart."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    return " ".join(text.split())


def format_assignment(assignment: Assignment, names: Mapping[str, str]) -> str:
    """Return an assignment in short, as in "base_rate=0.01 power=0.5"."""
    return " ".join(f"{names[path]}={format_value(value)}" for path, value in assignment.items())


def is_log(values: Sequence[float]) -> bool:
    """Return whether a logarithmic scale suits the values: all above 0, and far apart."""
    return bool(values) and min(values) > 0 and max(values) >= LOG_SPAN * min(values)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
