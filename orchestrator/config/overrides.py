"""Dotted overrides: `schedule.decay_factor=0.94`, typed by the field they name."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.config.base import Config, plain
from orchestrator.config.errors import ConfigError, Problem, one_of, show, suggestion
from orchestrator.config.readings import Words, read
from orchestrator.config.tree import KIND, Models, kinds, variants

C = TypeVar("C", bound=Config)
M = TypeVar("M", bound=BaseModel)


def paths(config: Config) -> dict[str, Any]:
    """Every leaf of the configuration: dotted path to value, in declared order.

    A container of configurations is one leaf, and so is a configuration that is None.
    """
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            found.update({f"{name}.{path}": leaf for path, leaf in paths(value).items()})
        else:
            found[name] = value
    return found


def apply(config: C, overrides: Mapping[str, Any]) -> C:
    """The configuration with the overrides in place; the given one stays as it is.

    Texts are read by the type of the field, other values are checked as they are. Overriding the `kind` of
    a union keeps the fields that the new kind has too and takes its defaults for the rest. The order of
    the overrides does not matter: whole branches come first, then kinds, then leaves.

    Args:
        config: where to start from.
        overrides: dotted path to value.

    Raises:
        ConfigError: one line naming every unknown path (with near misses) or refused value.
    """
    return type(config).from_dict(_edited(config, overrides))


def draft(config: C, overrides: Mapping[str, Any]) -> C:
    """Like `apply`, but its values are not validated: the shape of a configuration still being written.

    Raises:
        ConfigError: for an unknown path or kind.
    """
    return _unchecked(type(config), _edited(config, overrides))


def homes(config: Config, path: str) -> list[str]:
    """The kinds that would have this path, for a path that the present kind lacks; empty if none would."""
    *branch, last = path.split(".")
    model: type[BaseModel] = type(config)
    value: Any = config
    models: Models = ()
    for name in branch:
        if not isinstance(value, Config) or name not in model.model_fields:
            return []
        models = variants(model.model_fields[name].annotation)
        value = getattr(value, name)
        model = type(value)
    return [kind for kind, other in kinds(models).items() if last in other.model_fields]


def _edited(config: Config, overrides: Mapping[str, Any]) -> dict[str, Any]:
    data = config.to_dict()
    problems: list[Problem] = []
    for path in sorted(overrides, key=_order):
        try:
            _set(type(config), data, path, overrides[path], config)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(*problems)
    return data


def _unchecked(model: type[M], data: Mapping[str, Any]) -> M:
    # What has no default and is not said yet is none for now: every field has to be there to be shown.
    values: dict[str, Any] = {name: None for name, field in model.model_fields.items() if field.is_required()}
    for name, value in data.items():
        models = variants(model.model_fields[name].annotation)
        if models and isinstance(value, dict):
            values[name] = _unchecked(kinds(models).get(str(value.get(KIND)), models[0]), value)
        else:
            values[name] = value
    return model.model_construct(**values)


def _order(path: str) -> tuple[int, bool, str]:
    *_, last = path.split(".")
    return path.count("."), last != KIND, path


def _set(model: type[BaseModel], data: dict[str, Any], path: str, value: Any, config: Config) -> None:
    """Set one path in the JSON form `data` of a `model`; `config` is only asked for near misses."""
    *branch, last = path.split(".")
    union: Mapping[str, type[BaseModel]] = {}
    for name in branch:
        field = model.model_fields.get(name)
        models = variants(field.annotation) if field is not None else ()
        below = _below(data, name, field)
        if not models or not isinstance(below, dict):
            raise _unknown(path, config)
        union, data = kinds(models), below
        model = union.get(str(data.get(KIND)), models[0])
    if last == KIND and len(union) > 1:
        _switch(union, data, value, path)
    elif last in model.model_fields:
        is_text = isinstance(value, str | Words)
        data[last] = read(value, model, last, path) if is_text else _branch_or_leaf(value)
    else:
        raise _unknown(path, config)


def _below(data: dict[str, Any], name: str, field: FieldInfo | None) -> Any:
    """What `data` has at `name`; a branch left to its default is written out first, to be changed in part."""
    if field is not None and name not in data and not field.is_required():
        default = field.get_default(call_default_factory=True, validated_data=data)
        data[name] = _branch_or_leaf(default)
    return data.get(name)


def _branch_or_leaf(value: Any) -> Any:
    # Deeper overrides may change what a whole branch brings, so it must be a dict of our own.
    return plain(value) if isinstance(value, Config | Mapping) else value


def _switch(union: Mapping[str, type[BaseModel]], data: dict[str, Any], kind: Any, path: str) -> None:
    """Turn `data` into another variant in place: shared fields stay, the others are left to defaults."""
    if not isinstance(kind, str) or kind not in union:
        raise ConfigError(Problem(path, f"{show(kind)} is refused: {one_of(str(kind), union)}"))
    shared = union[kind].model_fields
    for name in [name for name in data if name not in shared]:
        del data[name]
    data[KIND] = kind


def _unknown(path: str, config: Config) -> ConfigError:
    elsewhere = homes(config, path)
    if elsewhere:
        kind = f"{path.rpartition('.')[0]}.{KIND}"
        return ConfigError(Problem(path, f"belongs to {kind} {' or '.join(elsewhere)}; set that too"))
    return ConfigError(Problem(path, "unknown path" + suggestion(path, list(paths(config)), "paths")))
