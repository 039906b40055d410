"""Dotted overrides: `schedule.decay_factor=0.94`, typed by the field they name."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import product
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from orchestrator.config.base import Config, to_jsonable
from orchestrator.config.errors import (
    ConfigError,
    FieldError,
    convert_validation_error,
    format_suggestion,
    format_value,
)  # fmt: skip
from orchestrator.config.introspection import KIND, ModelTypes, get_model_variants, get_variant, map_kinds
from orchestrator.config.json_text import parse_json

C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=BaseModel)

_KEYWORDS = {"none": None, "null": None, "true": True, "false": False}
_MAX_MIXED_ITEMS = 4  # items up to which every mixture of texts and numbers is tried
_FIELD_MODEL_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)


class ListItems(tuple[str, ...]):
    """The texts of one list: `--scales 0.08 1.0`."""


def flatten_config(config: Config) -> dict[str, Any]:
    """Return every leaf, dotted path to value, in declared order; a container of configurations is one leaf."""
    leaves: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            leaves.update({f"{name}.{path}": leaf for path, leaf in flatten_config(value).items()})
        else:
            leaves[name] = value
    return leaves


def apply_overrides(config: C, overrides: Mapping[str, Any]) -> C:
    """Return a copy of the configuration with the overrides, dotted path to value, in place.

    Texts are read by the type of the field, other values are checked as they are. Overriding the `kind` of a union
    keeps the fields that the new kind has too, but for its `own_fields`; the rest have its defaults. The order of the
    overrides does not matter: whole branches come first, then kinds, then leaves.

    Raises ConfigError, one line that names every unknown path (with near misses) or invalid value.
    """
    return type(config).from_dict(_merge_overrides(config, overrides))


def build_draft(config: C, overrides: Mapping[str, Any]) -> C:
    """Return the configuration with the overrides in place, not validated. Raises ConfigError for an unknown path."""
    return _construct_unvalidated(type(config), _merge_overrides(config, overrides))


def find_kinds_with_path(config: Config, path: str) -> list[str]:
    """Return the kinds that have this path, which the present kind lacks; empty if none has it."""
    *branch, last = path.split(".")
    owner: Any = config
    models: ModelTypes = ()
    for name in branch:
        field = type(owner).model_fields.get(name) if isinstance(owner, Config) else None
        if field is None:
            return []
        models, owner = get_model_variants(field.annotation), getattr(owner, name)
    return [kind for kind, other in map_kinds(models).items() if last in other.model_fields]


def _merge_overrides(config: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    data = config.to_dict()
    problems: list[FieldError] = []
    for path in sorted(overrides, key=lambda path: (path.count("."), path.rpartition(".")[2] != KIND, path)):
        try:
            _set_path(type(config), data, path, overrides[path], config)
        except ConfigError as error:
            problems.extend(error.field_errors)
    if problems:
        raise ConfigError(*problems)
    return data


def _construct_unvalidated(model: type[M], data: Mapping[str, Any]) -> M:
    # A required field is None until it is given: every field must be there to be shown.
    values: dict[str, Any] = {name: None for name, field in model.model_fields.items() if field.is_required()}
    for name, value in data.items():
        models = get_model_variants(model.model_fields[name].annotation)
        is_branch = models and isinstance(value, dict)
        values[name] = _construct_unvalidated(_get_model(models, value), value) if is_branch else value
    return model.model_construct(**values)


def _set_path(model: type[BaseModel], data: dict[str, Any], path: str, value: Any, config: Config) -> None:
    """Set one path in the JSON form `data` of a `model`; `config` serves near misses only."""
    *branch, last = path.split(".")
    union: ModelTypes = ()
    for name in branch:
        field = model.model_fields.get(name)
        if field is not None and name not in data and not field.is_required():
            # An absent branch becomes its default first, so that a part of it can change.
            data[name] = _copy_branch(field.get_default(call_default_factory=True, validated_data=data))
        union = get_model_variants(field.annotation) if field is not None else ()
        below: Any = data.get(name)
        if not union or not isinstance(below, dict):
            raise _make_unknown_path_error(path, config)
        data = below
        model = _get_model(union, data)
    if last == KIND and len(union) > 1:
        _switch_kind(union, model, data, value, path)
    elif last in model.model_fields:
        is_text = isinstance(value, str | ListItems)
        data[last] = parse_value(value, model, last, path) if is_text else _copy_branch(value)
    else:
        raise _make_unknown_path_error(path, config)


def _get_model(union: ModelTypes, data: Mapping[str, Any]) -> type[BaseModel]:
    return get_variant(union, data.get(KIND)) or union[0]


def _copy_branch(value: Any) -> Any:
    # Deeper overrides may change the branch, so it must be a copy.
    return to_jsonable(value) if isinstance(value, Config | Mapping) else value


def _switch_kind(union: ModelTypes, before: type[BaseModel], data: dict[str, Any], kind: Any, path: str) -> None:
    """Turn `data` into another variant in place: shared fields stay, the others take their defaults."""
    variant = get_variant(union, kind)
    if variant is None:
        kinds = list(map_kinds(union))
        reason = f"must be one of {', '.join(kinds)}, got {format_value(kind)}{format_suggestion(kind, kinds)}"
        raise ConfigError(FieldError(path, reason))
    own = getattr(variant, "own_fields", ()) if variant is not before else ()
    for name in [name for name in data if name not in variant.model_fields or name in own]:
        del data[name]
    data[KIND] = kind


def _make_unknown_path_error(path: str, config: Config) -> ConfigError:
    if elsewhere := find_kinds_with_path(config, path):
        kind = f"{path.rpartition('.')[0]}.{KIND}"
        return ConfigError(FieldError(path, f"belongs to {kind} {' or '.join(elsewhere)}; set that too"))
    suggestion = format_suggestion(path, list(flatten_config(config)), "paths")
    return ConfigError(FieldError(path, f"unknown path{suggestion}"))


def parse_value(text: str | ListItems, model: type[BaseModel], name: str, path: str) -> Any:
    """Return the JSON-ready value that `text` means for the field `name` of `model`.

    The field decides: "1" is the text 1 for a str, one for an int. "none", "true" and "false" are keywords where the
    field takes them; a tuple is written [0.08, 1.0] or 0.08,1.0; a mapping is written as JSON. Raises ConfigError,
    which names the dotted `path`, when the field takes none of the text's meanings; it is about the likeliest one.
    """
    probe = _make_field_model(model, name)
    likeliest: tuple[tuple[bool, int], ValidationError] | None = None
    for reading in _iter_candidates(text):
        try:
            probe.model_validate_json(json.dumps({name: reading}), strict=True)
        except ValidationError as error:
            distance = _rank_error(error)
            # Strictly nearer only: of equally near meanings, the first one is the most literal.
            if likeliest is None or distance < likeliest[0]:
                likeliest = distance, error
        else:
            return reading
    assert likeliest is not None, "every text has at least one reading: itself"
    raise convert_validation_error(likeliest[1], model, path.rpartition(".")[0])


@lru_cache(maxsize=1024)
def _make_field_model(model: type[BaseModel], name: str) -> type[BaseModel]:
    """Return a model of that one field, since the others may not be valid yet."""
    field = model.model_fields[name]
    definitions: dict[str, Any] = {name: (field.annotation, field)}
    return create_model("Probe", __config__=_FIELD_MODEL_CONFIG, **definitions)


def _iter_candidates(text: str | ListItems) -> Iterator[Any]:
    items = list(text)
    if isinstance(text, str):
        word = text.strip()
        if (scalar := _parse_scalar(word)) is not word:
            yield scalar
        yield text
        if word[:1] in ("[", "{", '"'):
            with suppress(ValueError):  # not JSON: the other readings still stand
                yield parse_json(word)
        inner = word[1:-1] if (word[:1], word[-1:]) in (("[", "]"), ("(", ")")) else word
        items = [item.strip() for item in inner.split(",")]
        if items[-1] == "":  # "0.5," is a list of one, "[]" a list of none
            items.pop()
    scalars = [_parse_scalar(item) for item in items]
    if len(items) > _MAX_MIXED_ITEMS:
        yield from (items, scalars)
    else:  # a pair may be a text and a number
        yield from map(list, product(*zip(items, scalars, strict=True)))
    with suppress(ValueError):
        yield [parse_json(item) for item in items]


def _parse_scalar(item: str) -> Any:
    if item.lower() in _KEYWORDS:
        return _KEYWORDS[item.lower()]
    for number in (int, float):
        with suppress(ValueError):
            return number(item)
    return item


def _rank_error(error: ValidationError) -> tuple[bool, int]:
    """Return a sort key for how far a reading is from valid: a wrong type first, then the number of errors."""
    details = error.errors(include_url=False)
    wrong = any(len(d["loc"]) == 1 and d["type"].endswith(("_type", "_required")) for d in details)
    return wrong, len(details)
