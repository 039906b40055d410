"""The base class of every configuration, and fingerprints: short stable names for configurations."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.config.errors import ConfigError, convert_validation_error
from orchestrator.config.introspection import get_model_variants
from orchestrator.config.json_text import parse_object


class Config(BaseModel):
    """A frozen set of values that rejects unknown keys, wrong types and non-finite numbers.

    Strict: "1", 1.5 and True are no int, but an int is a valid float. The string under a field is its description.
    Variants of a union are distinguished by `kind: Literal["..."]`.

    Building one in Python, `Recipe(epochs=-1)`, raises pydantic.ValidationError (a ValueError) and takes no list for a
    tuple; `from_dict` does, and raises ConfigError.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    own_fields: ClassVar[tuple[str, ...]] = ()  # that other kinds share by name only: a switch of kinds resets them
    unknown_is_error: ClassVar[bool] = False  # also in a record: an unknown field may change what the others mean

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them: tuples as lists, paths as strings."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return indented JSON with sorted keys; equal configurations give equal text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the configuration of `to_dict` or a JSON file; absent keys take their defaults. Raises ConfigError."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.__name__} must be a mapping of its fields, not {type(data).__name__}")
        try:
            # Through JSON text: only pydantic's JSON mode is strict about numbers and yet reads lists as tuples.
            return cls.model_validate_json(json.dumps(dict(data), default=to_jsonable))
        except ValidationError as error:
            raise convert_validation_error(error, cls) from None
        except TypeError as error:
            raise ConfigError(f"{cls.__name__} holds a value that JSON cannot: {error}") from None

    @classmethod
    def from_record(cls, data: bytes | str) -> Self:
        """Return the configuration in a record; fields of a newer version are ignored. Raises ConfigError, one line."""
        try:
            values = parse_object(data)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return cls.from_dict(_drop_unknown_fields(cls, values))


def _drop_unknown_fields(cls: type[Config], data: dict[str, Any]) -> dict[str, Any]:
    if cls.unknown_is_error:
        return data
    known = {name: value for name, value in data.items() if name in cls.model_fields}
    for name, value in known.items():
        below = get_model_variants(cls.model_fields[name].annotation)
        if len(below) == 1 and issubclass(below[0], Config) and isinstance(value, dict):
            known[name] = _drop_unknown_fields(below[0], value)
    return known


def to_jsonable(value: object) -> Any:
    """Return the JSON form of a Config, path or mapping, as `default` of json.dumps; else raise TypeError."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")


def compute_fingerprint(*parts: Any, length: int = 10) -> str:
    """Return up to 64 hex digits that name these values, on every machine and Python version.

    sha256 over canonical JSON (sorted keys, no whitespace, floats by repr, -0.0 as 0.0): the order of fields does not
    matter, that of parts does. Ten digits collide once in a million runs or so.

    Raises ValueError for a non-finite number, TypeError for a value with no JSON form.
    """
    text = json.dumps([_canonicalize(part) for part in parts], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:length]


def _canonicalize(value: Any) -> Any:
    if isinstance(value, float):
        return value + 0.0  # turns -0.0 into 0.0, leaves every other float as it is
    if isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, str)]:
            # JSON would write 1 and "1" alike, and could not sort a mixture.
            raise TypeError(f"the keys of a fingerprint's values must be text, got {other[0]!r}")
        return {key: _canonicalize(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonicalize(item) for item in value]
    return value if value is None or type(value) in (str, int, bool) else _canonicalize(to_jsonable(value))
