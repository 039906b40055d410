"""The flags of a configuration: tyro splits the command line and writes the help, the fields do the reading.

tyro hands back the texts as they were typed; `readings` gives them their types. So a flag, a sweep and a
dotted override understand `0.08,1.0` alike and refuse a value in the same words.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tyro import _errors  # private, but the only structured account of a refusal; tyro's version is pinned
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from orchestrator.config.base import Config, to_jsonable
from orchestrator.config.errors import ConfigError, FieldError, format_suggestion
from orchestrator.config.introspection import KIND, get_model_variants, get_union_members, map_kinds
from orchestrator.config.overrides import ListItems, find_kinds_with_path, flatten_config

_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", bool: "true|false", type(None): "none"}


@dataclass(frozen=True)
class _FlagText:
    """What was typed after one flag; tells it from a default that was left alone."""

    tokens: tuple[str, ...]


def map_flags_to_paths(config: Config) -> dict[str, str]:
    """Flag to dotted path, both with underscores: {"schedule.kind": "recipe.schedule.kind"}.

    They differ where `tyro.conf.arg(name="")` leaves a level out of the flags. Positionals have no flag, and fixed
    fields none either.
    """
    found: dict[str, str] = {}
    for name, field in get_settable_fields(type(config)).items():
        shown, value = get_flag_name(name, field), getattr(config, name)
        if isinstance(value, Config):
            below = map_flags_to_paths(value)
            found.update({".".join(filter(None, (shown, f))): f"{name}.{path}" for f, path in below.items()})
        elif not is_positional(field):
            found[shown] = name
    return found


def is_positional(field: FieldInfo) -> bool:
    """Whether the field is declared as `tyro.conf.Positional[...]`."""
    return tyro.conf.Positional in field.metadata


def get_settable_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields that a command line may set: all but those declared as `tyro.conf.Fixed[...]`."""
    return {name: field for name, field in model.model_fields.items() if tyro.conf.Fixed not in field.metadata}


def parse_flags(prog: str, description: str, config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """The overrides that the flags in `arguments` ask for: dotted path to text, Words or bool.

    Prints the help and exits for --help.

    Args:
        prog: name of the program in the help.
        description: head of the help.
        config: gives the flags and their defaults; its values need not be valid.
        arguments: the command line without what names the preset.

    Raises:
        ConfigError: for an unknown flag (with near misses), or one that lacks its value.
    """
    registry = ConstructorRegistry()
    registry.struct_rule(_make_struct_rule(collect_kind_choices(config)))
    with _errors.on_parse_error(_make_error_handler(config)):
        values: Any = tyro.cli(
            type(config),
            prog=prog,
            description=description,
            args=arguments,
            default=config,
            registry=registry,
        )
    found = _collect_overrides(config, values)
    for flag, path in map_flags_to_paths(config).items():
        if found.get(path) == ListItems():
            raise ConfigError(FieldError(format_flag(flag), "needs a value, [] for none"))
    return found


def _collect_overrides(config: Config, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in get_settable_fields(type(config)).items():
        default, value = getattr(config, name), values[name]
        if isinstance(default, Config):
            found.update({f"{name}.{path}": v for path, v in _collect_overrides(default, value).items()})
        elif isinstance(value, _FlagText):
            alone = len(value.tokens) == 1 and not (is_positional(field) and _takes_many(field.annotation))
            found[name] = value.tokens[0] if alone else ListItems(value.tokens)
        elif field.annotation is bool and value != default:
            found[name] = value
    return found


def _make_struct_rule(choices: Mapping[int, str]) -> Callable[[StructTypeInfo], StructConstructorSpec | None]:
    """How tyro is to see a Config: as a dict of texts; `choices` is the metavar of kind by id of variant."""

    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, Config)):
            return None
        fields = [
            _make_field_spec(name, field, getattr(info.default, name), choices.get(id(info.default)))
            for name, field in get_settable_fields(info.type).items()
        ]
        return StructConstructorSpec(instantiate=_collect_values, fields=tuple(fields))

    return rule


def _collect_values(**values: Any) -> dict[str, Any]:
    return values


def _make_field_spec(name: str, field: FieldInfo, default: Any, choices: str | None) -> StructFieldSpec:
    help_text = field.description or ""
    seen: Any
    if isinstance(default, Config):
        seen = type(default)
        help_text = help_text or type(default).__doc__ or ""
    elif field.annotation is bool:
        seen = bool
    else:
        many = _takes_many(field.annotation)
        spec: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
            nargs="*" if many else 1,
            metavar=choices if choices is not None and name == KIND else format_metavar(field.annotation),
            instance_from_str=lambda tokens: _FlagText(tuple(tokens)),
            is_instance=lambda value: True,
            str_from_instance=format_default,
        )
        seen = Annotated[object, spec]
    marks = tuple(mark for mark in field.metadata if type(mark).__module__.startswith("tyro."))
    seen = cast(Any, Annotated[(seen, *marks)]) if marks else seen
    return StructFieldSpec(name=name, type=seen, default=default, helptext=help_text)


def collect_kind_choices(config: Config) -> dict[int, str]:
    """Return how help shows the kinds of each union below `config`, by id of its present variant."""
    found: dict[int, str] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            union = map_kinds(get_model_variants(field.annotation))
            found.update(collect_kind_choices(value))
            found.update({id(value): f"{{{','.join(union)}}}"} if union else {})
    return found


def _takes_many(annotation: Any) -> bool:
    return any(get_origin(branch) is tuple for branch in get_union_members(annotation))


def format_metavar(annotation: Any) -> str:
    """Return how help shows the values that a flag takes, such as INT or {fast,exact}."""
    return "|".join(dict.fromkeys(_format_branch(branch) for branch in get_union_members(annotation)))


def _format_branch(branch: Any) -> str:
    if get_origin(branch) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(branch)) + "}"
    if get_origin(branch) is tuple:
        items = [format_metavar(item) for item in get_args(branch) if item is not Ellipsis]
        return f"{items[0]} ..." if Ellipsis in get_args(branch) else " ".join(items)
    if isinstance(branch, type) and issubclass(branch, Enum):
        return "{" + ",".join(str(member.value) for member in branch) + "}"
    return _METAVARS.get(branch, "JSON")


def format_default(value: Any) -> list[str]:
    """A default as it would be typed."""
    if isinstance(value, tuple | list):
        return [text for item in value for text in format_default(item)] or ["[]"]
    if isinstance(value, dict | BaseModel):
        return [json.dumps(value, default=to_jsonable)]
    if isinstance(value, Enum):
        return [str(value.value)]
    return ["none" if value is None else str(value)]


def get_flag_name(name: str, field: FieldInfo) -> str:
    """Return the name of a field on the command line, empty when its level is left out."""
    for mark in field.metadata:
        shown = getattr(mark, "name", None) if type(mark).__module__.startswith("tyro.") else None
        if shown is not None:
            return str(shown)
    return name


def _make_error_handler(config: Config) -> Callable[[_errors.ParseErrorEvent], None]:
    def refuse(event: _errors.ParseErrorEvent) -> None:
        if isinstance(event, _errors.UnrecognizedArgs):
            raise make_unknown_flag_error(config, event.tokens[0])
        if isinstance(event, _errors.BadValue):
            wanted = event.argument.lowered.metavar
            raise ConfigError(FieldError(event.argument.display_name(), f"needs a value: {wanted}"))
        raise ConfigError(f"the command line is refused: {event}")

    return refuse


def format_flag(flag: str) -> str:
    """Return a flag as it is typed."""
    return "--" + flag.replace("_", "-")


def _find_negated_flag(config: Config, known: Mapping[str, str], flag: str) -> str | None:
    """Return how a flag is switched off that was written --no-BRANCH.NAME; None when it is something else."""
    name = flag.lstrip("-").replace("-", "_").removeprefix("no_")
    if (
        not flag.startswith("--no-")
        or name not in known
        or not isinstance(flatten_config(config).get(known[name]), bool)
    ):
        return None
    branch, dot, last = name.rpartition(".")
    return f"{format_flag(f'{branch}{dot}no_{last}')} or {format_flag(name)} false"


def make_unknown_flag_error(config: Config, token: str) -> ConfigError:
    """Why a token is no flag of this configuration, and which flag may have been meant."""
    flag = token.partition("=")[0]
    if not flag.startswith("-"):
        return ConfigError(FieldError(flag, "unexpected argument; flags begin with --"))
    known = map_flags_to_paths(config)
    if (proper := _find_negated_flag(config, known, flag)) is not None:
        return ConfigError(FieldError(flag, f"unknown flag; write {proper}"))
    branch, _, last = flag.lstrip("-").replace("-", "_").rpartition(".")
    # The flag may be one of another kind; its neighbour tells where such a kind would be.
    neighbour = known.get(f"{branch}.{KIND}" if branch else KIND)
    elsewhere = find_kinds_with_path(config, f"{neighbour.rpartition('.')[0]}.{last}") if neighbour else []
    if elsewhere:
        kind = f"--{branch}.{KIND}" if branch else f"--{KIND}"
        return ConfigError(FieldError(flag, f"belongs to {kind} {' or '.join(elsewhere)}; set that too"))
    return ConfigError(
        FieldError(flag, "unknown flag" + format_suggestion(flag, [format_flag(name) for name in known], "flags"))
    )
