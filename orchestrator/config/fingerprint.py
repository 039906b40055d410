"""Fingerprints: short stable names for configurations."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from orchestrator.config.base import Config, to_jsonable

_MAX_DIGITS = 64  # hex digits of a sha256

FingerprintInput = Config | Mapping[str, Any] | tuple[Any, ...] | list[Any] | str | int | float | None


def compute_fingerprint(*parts: FingerprintInput, length: int = 10) -> str:
    """Return hex digits that name these values: equal parts, equal name, on every machine and Python version.

    sha256 over canonical JSON (sorted keys, no whitespace, floats by repr, -0.0 as 0.0), so the order of
    fields does not matter; the order of parts does. Class names are not part of it.

    Args:
        parts: configurations, JSON-like values.
        length: digits to return, 4 to 64. Ten digits collide once in a million runs or so.

    Raises:
        ValueError: for a length out of range, or a non-finite number.
        TypeError: for a value with no JSON form.
    """
    if not 4 <= length <= _MAX_DIGITS:
        raise ValueError(f"length must be between 4 and {_MAX_DIGITS}, got {length}")
    text = json.dumps([_canonicalize(part) for part in parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:length]


def _canonicalize(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a fingerprint must be of finite numbers, got {value}")
        return value + 0.0  # turns -0.0 into 0.0, leaves every other float as it is
    if isinstance(value, Mapping):
        return {_check_key(key): _canonicalize(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonicalize(item) for item in value]
    if value is None or (isinstance(value, str | int) and type(value) in (str, int, bool)):
        return value
    return _canonicalize(to_jsonable(value))


def _check_key(key: object) -> str:
    # JSON would write 1 and "1" alike, and could not sort a mixture.
    if not isinstance(key, str):
        raise TypeError(f"the keys of a fingerprint's values must be text, got {key!r}")
    return key
