"""Base class of every configuration in the project."""

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.config.errors import ConfigError, convert_validation_error
from orchestrator.config.introspection import get_union_members
from orchestrator.config.json_text import parse_object


class Config(BaseModel):
    """A frozen set of values that rejects unknown keys, wrong types and non-finite numbers.

    Strict: "1", 1.5 and True are no int, but an int is a valid float. The string under a field is its description.
    Variants of a union are distinguished by `kind: Literal["..."]`.

    Building one in Python, `Recipe(epochs=-1)`, raises pydantic.ValidationError (a ValueError) and takes tuples and
    enum members only; `from_dict` also takes lists and strings, and raises ConfigError.
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
    unknown_is_error: ClassVar[bool] = False  # also in a record, which a newer version may have written

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError, when the class is made, for a field that `to_dict` and `from_dict` would not preserve."""
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if any(isinstance(b, type) and issubclass(b, PurePath) for b in get_union_members(field.annotation)):
                # A place may be a URL, and pydantic's JSON mode rejects a Path as a default.
                raise TypeError(f"{cls.__name__}.{name}: must be declared as str, got {field.annotation}")

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them: tuples as lists, enums and paths as strings."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return indented JSON with sorted keys; equal configurations give equal text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the configuration that `to_dict` or a JSON file describes; absent keys take their defaults.

        Raises ConfigError, one line that names every invalid field, its value and the reason.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.__name__} must be a mapping of its fields, not {type(data).__name__}")
        try:
            # Through JSON text, because only pydantic's JSON mode is strict about numbers and yet reads lists as tuples
            # and strings as enums.
            return cls.model_validate_json(json.dumps(dict(data), default=to_jsonable))
        except ValidationError as error:
            raise convert_validation_error(error, cls) from None
        except TypeError as error:
            raise ConfigError(f"{cls.__name__} holds a value that JSON cannot: {error}") from None

    @classmethod
    def from_record(cls, data: bytes | str) -> Self:
        """Return the configuration in a record of this project; unknown fields, of a newer version, are ignored.

        Not so those of classes with `unknown_is_error`, where an unknown field may change what the others mean.

        Raises ConfigError, a line without the name of the file, for an invalid record.
        """
        try:
            values = parse_object(data)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return cls.from_dict(_drop_unknown_fields(cls, values))


def _drop_unknown_fields(cls: type[Config], data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that the class knows; below it likewise, except for kinds of a union."""
    if cls.unknown_is_error:
        return data
    known = {name: value for name, value in data.items() if name in cls.model_fields}
    for name, value in known.items():
        below = [branch for branch in get_union_members(cls.model_fields[name].annotation) if branch is not type(None)]
        if len(below) == 1 and isinstance(below[0], type) and issubclass(below[0], Config) and isinstance(value, dict):
            known[name] = _drop_unknown_fields(below[0], value)
    return known


def to_jsonable(value: object) -> Any:
    """Return the JSON form of a Config, enum, path or mapping, as `default` of json.dumps; else raise TypeError."""
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form")
