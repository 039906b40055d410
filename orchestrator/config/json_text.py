"""JSON from outside, perhaps damaged: every defect is one ValueError."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError, one line, for bytes that are not UTF-8, bad syntax, deep nesting, NaN, Infinity and 1e999.
    """
    try:
        return json.loads(data, parse_constant=_parse_float, parse_float=_parse_float, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start} cannot be decoded") from None


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Return the JSON object of a text; ValueError as for `parse_json`, and when the text holds another type."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {type(value).__name__}")
    return value


def _parse_int(text: str) -> int:
    _parse_float(text)
    return int(text)


def _parse_float(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return float(text)
