"""Events of a run, and their form as a line of JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.config.json_text import parse_object
from orchestrator.config.redaction import redact

# JSON has no NaN or infinity, which a diverging run must record: these strings stand for them.
_NON_FINITE = re.compile(r"\\*(nan|inf|-inf)")


class JournalError(ValueError):
    """An unreadable journal object, or a value that cannot be written; the message names it."""


@dataclass(frozen=True)
class Event:
    """An occurrence in a run.

    kind: its type, for example "metrics", "epoch", "incident", "finished".
    time: unix seconds.
    samples: samples seen by then (the clock of a run), None without a clock.
    values: JSON scalars, lists and mappings with string keys; floats may be non-finite.
    """

    kind: str
    time: float
    samples: int | None = None
    values: Mapping[str, object] = field(default_factory=dict)


def encode_event(event: Event) -> str:
    """Return the event as a line of strict JSON without the line end. Raises JournalError for what JSON cannot hold."""
    record = {"kind": event.kind, "time": event.time, "samples": event.samples}
    record["values"] = {key: _to_json_value(value, f"{event.kind}.{key}") for key, value in event.values.items()}
    return json.dumps(record, allow_nan=False, separators=(",", ":"))


def decode_event(line: str) -> Event:
    """Return the event of a line made by `encode_event`, perhaps of a newer version. Raises ValueError otherwise."""
    record = parse_object(line)
    kind, time, samples, values = (record.get(name) for name in ("kind", "time", "samples", "values"))
    if isinstance(time, bool) or not (
        isinstance(kind, str) and isinstance(values, dict) and isinstance(time, int | float)
    ):
        raise ValueError("an event must have a kind, a time and values")
    if samples is not None and type(samples) is not int:
        raise ValueError(f"an event's samples must be a whole number, got {samples!r}")
    try:
        return Event(kind, float(time), samples, {key: _from_json_value(value) for key, value in values.items()})
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__} in an event") from None


def _to_json_value(value: object, path: str) -> object:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, str):
        value = redact(value)  # a journal is kept, and more people see it than the URL's user
        # A text that reads "nan" must stay a text: such texts get a backslash in front.
        return "\\" + value if _NON_FINITE.fullmatch(value) else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise JournalError(f"{path}: key {key!r} must be a string, got {type(key).__name__}")
        return {key: _to_json_value(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise JournalError(
        f"{path}: {value!r} must be a bool, int, float, str, None, list or mapping, got {type(value).__name__}"
        " (tensors and numpy scalars: .item() or float())"
    )


def _from_json_value(value: object) -> object:
    if isinstance(value, str) and _NON_FINITE.fullmatch(value):
        return value[1:] if value.startswith("\\") else float(value)
    if isinstance(value, dict):
        return {key: _from_json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json_value(item) for item in value]
    return value
