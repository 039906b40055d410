"""The text that --help prints: what a command does, examples, common flags first, the other flags by topic."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from orchestrator.config import flags
from orchestrator.config.base import Config
from orchestrator.config.command_line import PROGRAM, format_command
from orchestrator.config.introspection import KIND

_MAX_WIDTH = 110  # columns
_HELP_COLUMN = 30  # where the text beside a flag begins
_COMMAND = re.compile(rf"(?<!\S){PROGRAM} ([a-z-]+)")


@dataclass(frozen=True)
class CommandHelp:
    """What the help of a command says beside its flags."""

    examples: str = ""  # lines such as "orchestrator train ...", each followed by indented lines that explain it
    common: tuple[str, ...] = ()  # flags that come first, without dashes: "data", "placement.workers"
    notes: str = ""  # at the end, such as exit statuses
    positional: str = ""  # how the usage names what stands before the flags, such as "RUN ..."


@dataclass(frozen=True)
class _Flag:
    name: str  # as typed, without dashes, with underscores; empty for a positional argument
    field: FieldInfo
    default: Any
    owner: Config
    topic: str
    choices: str | None  # of a kind


def format_help(program: str, description: str, config: Config, details: CommandHelp) -> str:
    """Return the help of a command whose flags have the values of `config` as defaults."""
    found = list(_list_flags(config, "", "", flags.collect_kind_choices(config)))
    positionals = [flag for flag in found if not flag.name]
    usage = f"usage: {program}{f' [{details.positional}]' if details.positional else ''} [--FLAG VALUE ...]"
    lines = [usage, "", description.strip(), *format_examples(details)]
    for flag in positionals:
        lines += ["", "arguments:", *_format_entry(details.positional or flag.topic, flag.field.description or "")]
    named = {flag.name: flag for flag in found if flag.name}
    common = [named.pop(name) for name in details.common if name in named]
    lines += _format_topic("common flags:", common)
    topics: dict[str, list[_Flag]] = {}
    for flag in named.values():
        topics.setdefault(flag.topic, []).append(flag)
    for topic, members in topics.items():
        about = " ".join((type(members[0].owner).__doc__ or "").strip().partition("\n\n")[0].split())
        lines += _format_topic(f"{topic}: {about}" if topic else "flags:" if not common else "other flags:", members)
    lines += ["", *_wrap(details.notes, "")] if details.notes else []
    return "\n".join([*lines, ""])


def format_examples(details: CommandHelp) -> list[str]:
    """Return the lines with the examples of a command, spelled as this process was started; none without examples."""
    lines = details.examples.strip().splitlines()
    spelled = [_COMMAND.sub(lambda match: format_command(match[1]), line) for line in lines]
    return ["", "examples:", *(f"  {line}" for line in spelled)] if lines else []


def format_common_flags(config: Config, details: CommandHelp) -> list[str]:
    """Return the lines with the common flags of a command, none without them."""
    named = {flag.name: flag for flag in _list_flags(config, "", "", flags.collect_kind_choices(config))}
    return _format_topic("common flags:", [named[name] for name in details.common if name in named])


def _list_flags(config: Config, prefix: str, topic: str, choices: Mapping[int, str]) -> Iterator[_Flag]:
    """Yield every flag below `config`, plain fields before nested ones, as they are declared."""
    fields = flags.get_settable_fields(type(config))
    nested = {name: field for name, field in fields.items() if isinstance(getattr(config, name), Config)}
    for name, field in fields.items():
        if name in nested:
            continue
        shown = "" if flags.is_positional(field) else prefix + flags.get_flag_name(name, field)
        kinds = choices.get(id(config)) if name == KIND else None
        yield _Flag(shown, field, getattr(config, name), config, topic or ("" if shown else name), kinds)
    for name, field in nested.items():
        shown = flags.get_flag_name(name, field)
        below = f"{prefix}{shown}." if shown else prefix
        yield from _list_flags(getattr(config, name), below, below.rstrip(".") or name, choices)


def _format_topic(title: str, members: list[_Flag]) -> list[str]:
    if not members:
        return []
    lines = ["", *_wrap(title, "")]
    for flag in members:
        lines += _format_entry(_format_name(flag), _format_description(flag))
    return lines


def _format_name(flag: _Flag) -> str:
    name = flags.format_flag(flag.name)
    if flag.field.annotation is bool:
        branch, dot, last = flag.name.rpartition(".")
        return f"{name}, {flags.format_flag(f'{branch}{dot}no_{last}')}"
    return f"{name} {flag.choices or flags.format_metavar(flag.field.annotation)}"


def _format_description(flag: _Flag) -> str:
    """Return a flag's description with its default, unless that is empty and so means nothing to a reader."""
    text = flag.field.description or ""
    if flag.default in ("", (), None) and "default" in text:
        return text
    if isinstance(flag.default, bool):
        default = str(flag.default).lower()
    else:
        default = " ".join(flags.format_default(flag.default))
    return f"{text} (default: {default or 'none'})".strip()


def _format_entry(name: str, text: str) -> list[str]:
    """Return the lines of a flag: its name, and its text beside or below it."""
    lines = _wrap(text, " " * _HELP_COLUMN)
    if lines and len(name) + 4 <= _HELP_COLUMN:
        return [f"  {name}".ljust(_HELP_COLUMN) + lines[0].lstrip(), *lines[1:]]
    return [f"  {name}", *lines]


def _wrap(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size((_MAX_WIDTH, 24)).columns, _MAX_WIDTH)
    return [
        line
        for paragraph in text.strip().splitlines()
        for line in textwrap.wrap(
            paragraph,
            max(40, width),
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
