"""Flags of a configuration: every settable field is one, and the field's type reads what was typed.

The values stay text here. `overrides.parse_value` gives them their types, so a flag, a sweep and a dotted override read
`0.08,1.0` alike and reject a value in the same words.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.config.base import Config, to_jsonable
from orchestrator.config.errors import ConfigError, FieldError, format_suggestion
from orchestrator.config.introspection import KIND, get_model_variants, get_union_members, map_kinds
from orchestrator.config.overrides import ListItems, find_kinds_with_path

FLAG_PATTERN = re.compile(r"--(?P<name>[A-Za-z][\w.-]*)(?:=(?P<value>.*))?", re.DOTALL)
HELP_FLAGS = ("--help", "-h")
_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "STR", bool: "true|false", type(None): "none"}
_BOOLS = {"true": True, "false": False}
_HELP_COLUMN = 28
_MAX_HELP_WIDTH = 110


@dataclass(frozen=True)
class Flag:
    """An annotation of a field that changes its flag: `Annotated[tuple[str, ...], Flag(positional=True)]`."""

    name: str | None = None  # of the flag in place of the field's; "" leaves a level out of the flags
    positional: bool = False  # the field, a tuple, takes the arguments that belong to no flag
    settable: bool = True  # False: no command line sets the field


class FlagSpec(NamedTuple):
    """A field as the command line shows it. `name` and `path` are dotted, with underscores."""

    name: str
    path: str
    field: FieldInfo
    default: Any
    metavar: str
    topic: str
    is_bool: bool  # a switch, which needs no value


class TypedFlag(NamedTuple):
    """A flag as it was typed, its value after "=" if any, and the arguments up to the next flag."""

    text: str
    value: str | None
    following: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name without leading hyphens, with underscores."""
        return self.text.lstrip("-").replace("-", "_")


def map_flags_to_paths(config: Config) -> dict[str, str]:
    """Return flag to dotted path, {"schedule.kind": "recipe.schedule.kind"}; positional fields have no flag."""
    return {flag.name: flag.path for flag in _iter_flags(config) if not is_positional(flag.field)}


def is_positional(field: FieldInfo) -> bool:
    """Return whether the field takes the arguments that belong to no flag."""
    return _get_mark(field).positional


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[TypedFlag], list[str]]:
    """Split a command line into leading arguments, flags with what follows each, and what stands after "--"."""
    leading: list[str] = []
    typed: list[TypedFlag] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return leading, typed, list(arguments[index + 1 :])
        match = FLAG_PATTERN.fullmatch(argument)
        if match is not None:
            typed.append(TypedFlag(f"--{match['name']}", match["value"], ()))
        elif re.match(r"--|-[A-Za-z]", argument):
            typed.append(TypedFlag(argument, None, ()))
        elif typed:
            typed[-1] = typed[-1]._replace(following=(*typed[-1].following, argument))
        else:
            leading.append(argument)
    return leading, typed, []


def parse_flags(config: Config, typed: Sequence[TypedFlag], positionals: Sequence[str]) -> dict[str, Any]:
    """Return the overrides that a command line asks for: dotted path to text, ListItems or bool.

    config: gives the flags; its values need not be valid. typed: the flags in order; of equal ones the last counts.
    positionals: arguments before the first flag and after "--".

    Raises ConfigError for an unknown flag (with near misses), one that lacks its value, or an argument of no flag.
    """
    positional = next((flag for flag in _iter_flags(config) if is_positional(flag.field)), None)
    specs = {flag.name: flag for flag in _iter_flags(config) if not is_positional(flag.field)}
    negated = {f"no_{name}": flag.path for name, flag in specs.items() if flag.is_bool}
    negated |= {_negate_flag(name): flag.path for name, flag in specs.items() if flag.is_bool}
    overrides: dict[str, Any] = {}
    rest = list(positionals)
    for each in typed:
        if each.name in negated:
            if each.value is not None:
                raise ConfigError(FieldError(each.text, f"takes no value, got {each.value!r}"))
            overrides[negated[each.name]], taken = False, 0
        elif each.name in specs:
            overrides[specs[each.name].path], taken = _take_value(specs[each.name], each)
        else:
            raise make_unknown_flag_error(config, each.text)
        rest.extend(each.following[taken:])
    if rest and positional is None:
        raise ConfigError(FieldError(rest[0], "unexpected argument; flags begin with --"))
    return overrides | ({positional.path: ListItems(rest)} if rest and positional is not None else {})


def make_unknown_flag_error(config: Config, text: str) -> ConfigError:
    """Return the error for a flag that the configuration lacks; it names the flag that may have been meant."""
    known = map_flags_to_paths(config)
    branch, dot, last = text.lstrip("-").replace("-", "_").rpartition(".")
    # The flag may belong to another kind. The kind's own flag says which configuration that would be.
    kind_name = f"{branch}{dot}{KIND}"
    if kinds := find_kinds_with_path(config, known.get(kind_name, "").removesuffix(KIND) + last):
        return ConfigError(FieldError(text, f"belongs to {format_flag(kind_name)} {' or '.join(kinds)}; set that too"))
    suggestion = format_suggestion(text, [format_flag(name) for name in known], "flags")
    return ConfigError(FieldError(text, f"unknown flag{suggestion}"))


def format_flag(name: str) -> str:
    """Return a flag as it is typed."""
    return "--" + name.replace("_", "-")


def format_help(prog: str, description: str, config: Config, common: Iterable[str] = (), example: str = "") -> str:
    """Return the help: common flags first, then the others by topic, each with its type, text and default.

    common: names of flags, with underscores, that come first, of those that there are. example: lines for the end.
    """
    specs = {flag.name: flag for flag in _iter_flags(config)}
    first = [specs[name] for name in dict.fromkeys(common) if name in specs]
    arguments = [flag for flag in specs.values() if is_positional(flag.field)]
    sections = {"arguments": arguments, "common flags": first}
    for flag in specs.values():
        if flag not in first and flag not in arguments:
            sections.setdefault(flag.topic or ("other flags" if first else "flags"), []).append(flag)
    width = min(_MAX_HELP_WIDTH, shutil.get_terminal_size().columns)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s{''.join(f' [{flag.name.upper()} ...]' for flag in arguments)} [--FLAG VALUE ...]",
        description=description.strip(),
        epilog="\n  ".join(["examples:", *example.strip().splitlines()]) if example else "",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, _HELP_COLUMN, width),
        add_help=False,
    )
    for title, flags in sections.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag_help(group, flag)
    return parser.format_help()


def _add_flag_help(group: Any, flag: FlagSpec) -> None:
    text = (flag.field.description or "").replace("%", "%%")
    if is_positional(flag.field):
        group.add_argument(flag.name, nargs="*", metavar=flag.name.upper(), help=text)
    elif flag.is_bool:
        names = format_flag(flag.name), format_flag(_negate_flag(flag.name))
        group.add_argument(*names, action="store_true", help=f"{text} (default: {flag.default})".strip())
    else:
        default = _format_default(flag.default).replace("%", "%%")
        group.add_argument(format_flag(flag.name), metavar=flag.metavar, help=f"{text} (default: {default})".strip())


def _iter_flags(
    config: Config, name_prefix: str = "", path_prefix: str = "", topic: str = "", kinds: Sequence[str] = ()
) -> Iterator[FlagSpec]:
    """Yield the settable fields in declared order; their defaults are the values in `config`, valid or not."""
    for name, field in type(config).model_fields.items():
        mark, value = _get_mark(field), getattr(config, name)
        if not mark.settable:
            continue
        flag = ".".join(filter(None, (name_prefix, name if mark.name is None else mark.name)))
        path = f"{path_prefix}{name}"
        if isinstance(value, Config):
            summary = (field.description or type(value).__doc__ or "").strip().splitlines()
            title = ": ".join(filter(None, (flag, summary[0].rstrip(".") if summary else "")))
            below = list(map_kinds(get_model_variants(field.annotation)))
            yield from _iter_flags(value, flag, f"{path}.", topic if name_prefix else title, below)
        else:
            choices = f"{{{','.join(kinds)}}}" if name == KIND and len(kinds) > 1 else ""
            metavar = choices or _format_metavar(field.annotation)
            yield FlagSpec(flag, path, field, value, metavar, topic, field.annotation is bool)


def _get_mark(field: FieldInfo) -> Flag:
    return next((mark for mark in field.metadata if isinstance(mark, Flag)), Flag())


def _take_value(flag: FlagSpec, typed: TypedFlag) -> tuple[Any, int]:
    """Return the value of a flag, and how many of the arguments that follow it were used."""
    values = typed.following if typed.value is None else (typed.value,)
    if flag.is_bool:
        if typed.value is None and (not values or values[0].lower() not in _BOOLS):
            return True, 0
        return values[0], int(typed.value is None)
    takes_many = any(get_origin(branch) is tuple for branch in get_union_members(flag.field.annotation))
    if not values:
        needed = ", [] for none" if takes_many else f": {flag.metavar}"
        raise ConfigError(FieldError(format_flag(flag.name), f"needs a value{needed}"))
    if takes_many and len(values) > 1:
        return ListItems(values), len(values)
    return values[0], int(typed.value is None)


def _negate_flag(name: str) -> str:
    branch, dot, last = name.rpartition(".")
    return f"{branch}{dot}no_{last}"


def _format_metavar(annotation: Any) -> str:
    return "|".join(dict.fromkeys(_format_branch(branch) for branch in get_union_members(annotation)))


def _format_branch(branch: Any) -> str:
    if get_origin(branch) is tuple:
        items = [_format_metavar(item) for item in get_args(branch) if item is not Ellipsis]
        return f"{items[0]} ..." if Ellipsis in get_args(branch) else " ".join(items)
    if get_origin(branch) is Literal:
        return f"{{{','.join(map(str, get_args(branch)))}}}"
    return _METAVARS.get(branch, "JSON")


def _format_default(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(_format_default, value)) or "[]"
    if isinstance(value, Mapping | BaseModel):
        return json.dumps(value, default=to_jsonable)
    return "none" if value is None else repr(value) if value == "" else str(value)
