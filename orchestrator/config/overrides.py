"""Dotted overrides: `schedule.decay_factor=0.94`, typed by the field they name."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import product
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

from orchestrator.config.base import Config, to_jsonable
from orchestrator.config.errors import (
    ConfigError,
    FieldError,
    convert_validation_error,
    format_choices,
    format_suggestion,
)
from orchestrator.config.introspection import KIND, ModelTypes, get_model_variants, get_variant, map_kinds
from orchestrator.config.json_text import parse_json

C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=BaseModel)


def flatten_config(config: Config) -> dict[str, Any]:
    """Return every leaf of the configuration: dotted path to value, in declared order.

    A container of configurations is one leaf, and so is a configuration that is None.
    """
    leaves: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            leaves.update({f"{name}.{path}": leaf for path, leaf in flatten_config(value).items()})
        else:
            leaves[name] = value
    return leaves


def apply_overrides(config: C, overrides: Mapping[str, Any]) -> C:
    """Return a copy of the configuration with the overrides in place.

    Texts are read by the type of the field, other values are checked as they are. Overriding the `kind` of
    a union keeps the fields that the new kind has too, but for its `own_fields`; the rest have its defaults. The order
    of the overrides does not matter: whole branches come first, then kinds, then leaves.

    Args:
        config: where to start from.
        overrides: dotted path to value.

    Raises:
        ConfigError: one line that names every unknown path (with near misses) or invalid value.
    """
    return type(config).from_dict(_merge_overrides(config, overrides))


def build_draft(config: C, overrides: Mapping[str, Any]) -> C:
    """Return the configuration with the overrides in place, not validated: its shape while it is still being written.

    Raises:
        ConfigError: for an unknown path or kind.
    """
    return _construct_unvalidated(type(config), _merge_overrides(config, overrides))


def find_kinds_with_path(config: Config, path: str) -> list[str]:
    """Return the kinds that have this path, which the present kind lacks; empty if none has it."""
    *branch, last = path.split(".")
    model: type[BaseModel] = type(config)
    value: Any = config
    models: ModelTypes = ()
    for name in branch:
        if not isinstance(value, Config) or name not in model.model_fields:
            return []
        models = get_model_variants(model.model_fields[name].annotation)
        value = getattr(value, name)
        model = type(value)
    return [kind for kind, other in map_kinds(models).items() if last in other.model_fields]


def _merge_overrides(config: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    data = config.to_dict()
    problems: list[FieldError] = []
    for path in sorted(overrides, key=_get_sort_key):
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
        if models and isinstance(value, dict):
            values[name] = _construct_unvalidated(get_variant(models, value.get(KIND)) or models[0], value)
        else:
            values[name] = value
    return model.model_construct(**values)


def _get_sort_key(path: str) -> tuple[int, bool, str]:
    *_, last = path.split(".")
    return path.count("."), last != KIND, path


def _set_path(model: type[BaseModel], data: dict[str, Any], path: str, value: Any, config: Config) -> None:
    """Set one path in the JSON form `data` of a `model`; `config` serves near misses only."""
    *branch, last = path.split(".")
    union: ModelTypes = ()
    for name in branch:
        field = model.model_fields.get(name)
        models = get_model_variants(field.annotation) if field is not None else ()
        below = _get_branch(data, name, field)
        if not models or not isinstance(below, dict):
            raise _make_unknown_path_error(path, config)
        union, data = models, below
        model = get_variant(models, data.get(KIND)) or models[0]
    if last == KIND and len(union) > 1:
        _switch_kind(union, model, data, value, path)
    elif last in model.model_fields:
        is_text = isinstance(value, str | ListItems)
        data[last] = parse_value(value, model, last, path) if is_text else _copy_branch(value)
    else:
        raise _make_unknown_path_error(path, config)


def _get_branch(data: dict[str, Any], name: str, field: FieldInfo | None) -> Any:
    """Return `data[name]`; an absent branch becomes its default first, so that a part of it can change."""
    if field is not None and name not in data and not field.is_required():
        default = field.get_default(call_default_factory=True, validated_data=data)
        data[name] = _copy_branch(default)
    return data.get(name)


def _copy_branch(value: Any) -> Any:
    # Deeper overrides may change the branch, so it must be a copy.
    return to_jsonable(value) if isinstance(value, Config | Mapping) else value


def _switch_kind(union: ModelTypes, before: type[BaseModel], data: dict[str, Any], kind: Any, path: str) -> None:
    """Turn `data` into another variant in place: shared fields stay, the others take their defaults."""
    variant = get_variant(union, kind)
    if variant is None:
        raise ConfigError(FieldError(path, format_choices(kind, map_kinds(union))))
    own = getattr(variant, "own_fields", ()) if variant is not before else ()
    for name in [name for name in data if name not in variant.model_fields or name in own]:
        del data[name]
    data[KIND] = kind


def _make_unknown_path_error(path: str, config: Config) -> ConfigError:
    elsewhere = find_kinds_with_path(config, path)
    if elsewhere:
        kind = f"{path.rpartition('.')[0]}.{KIND}"
        return ConfigError(FieldError(path, f"belongs to {kind} {' or '.join(elsewhere)}; set that too"))
    return ConfigError(
        FieldError(path, "unknown path" + format_suggestion(path, list(flatten_config(config)), "paths"))
    )


_KEYWORDS = {"none": None, "null": None, "true": True, "false": False}
_MAX_MIXED_ITEMS = 4  # items up to which every mixture of texts and numbers is tried
_FIELD_MODEL_CONFIG = ConfigDict(strict=True, allow_inf_nan=False)


class ListItems(tuple[str, ...]):
    """The texts of one list: `--scales 0.08 1.0`."""


def parse_value(text: str | ListItems, model: type[BaseModel], name: str, path: str) -> Any:
    """Return the JSON-ready value that `text` means for the field `name` of `model`.

    The field decides: "1" is the text 1 for a str, one for an int. "none", "true" and "false" are keywords
    where the field takes them; a tuple is written [0.08, 1.0] or 0.08,1.0; a mapping is written as JSON.

    Args:
        text: as typed on a command line or written in a sweep; ListItems for several.
        model: the class that has the field.
        name: name of the field.
        path: dotted path for the error message.

    Raises:
        ConfigError: when the field takes none of the text's meanings; it is about the likeliest one.
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
    if isinstance(text, ListItems):
        yield from _iter_candidate_lists(text)
        with suppress(ValueError):  # not JSON: the readings above still stand
            yield [parse_json(item) for item in text]
        return
    word = text.strip()
    if word.lower() in _KEYWORDS:
        yield _KEYWORDS[word.lower()]
    number = _parse_number(word)
    if number is not None:
        yield number
    yield text
    if word[:1] in ("[", "{", '"'):
        with suppress(ValueError):  # not JSON: the readings below still stand
            yield parse_json(word)
    inner = word[1:-1] if (word[:1], word[-1:]) in (("[", "]"), ("(", ")")) else word
    items = [item.strip() for item in inner.split(",")]
    if items[-1] == "":  # "0.5," is a list of one, "[]" a list of none
        items.pop()
    yield from _iter_candidate_lists(items)


def _iter_candidate_lists(items: Sequence[str]) -> Iterator[list[Any]]:
    if len(items) > _MAX_MIXED_ITEMS:
        yield list(items)
        yield [_parse_scalar(item) for item in items]
    else:  # a pair may be a text and a number
        yield from map(list, product(*([item, _parse_scalar(item)] for item in items)))


def _parse_number(word: str) -> int | float | None:
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return None


def _parse_scalar(item: str) -> Any:
    if item.lower() in _KEYWORDS:
        return _KEYWORDS[item.lower()]
    number = _parse_number(item)
    return item if number is None else number


def _rank_error(error: ValidationError) -> tuple[bool, int]:
    """Return a sort key for how far a reading is from valid: a wrong type first, then the number of errors."""
    details = error.errors(include_url=False)
    wrong = any(len(d["loc"]) == 1 and d["type"].endswith(("_type", "_required")) for d in details)
    return wrong, len(details)
