"""Command lines: presets as sub-commands, every field a flag, every refusal one line and exit status 2."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from orchestrator.config import flags
from orchestrator.config.base import Config, to_jsonable
from orchestrator.config.errors import ConfigError, FieldError, format_suggestion, format_value
from orchestrator.config.help_text import CommandHelp, format_common_flags, format_examples, format_help
from orchestrator.config.introspection import KIND
from orchestrator.config.output import prepare_output
from orchestrator.config.overrides import apply_overrides, build_draft
from orchestrator.config.redaction import find_credentials_problem, make_printable

C = TypeVar("C", bound=Config)

_USAGE_ERROR_STATUS = 2  # exit status of every user error, as argparse and the shells have it
_HELP_FLAGS = ("--help", "-h")
JSON_SUFFIX = ".json"  # of a first argument that names a file
_BOOL_FLAG_PREFIXES = {"true": "", "false": "no_"}  # a word, and what its flag begins with
# The only flags whose URL may hold a password: those of databases have no other place for one.
_CREDENTIAL_FLAGS = {"tracking"}
_FLAG_PATTERN = re.compile(r"--(?P<name>[A-Za-z][\w.-]*)(?:=(?P<value>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A named starting point: the whole configuration, and one line that says what it is."""

    value: C
    summary: str = ""


def parse_args(
    prog: str,
    description: str,
    presets: Mapping[str, Preset[C]],
    default: str,
    argv: Sequence[str] | None = None,
    from_file: Callable[[str], Preset[C]] | None = None,
    details: CommandHelp | None = None,
) -> C:
    """The configuration that the command line asks for: a preset with its flags in place.

    The first argument names the preset, with hyphens or underscores, or a file that holds one; without one the default
    is taken.
    `--schedule.kind polynomial` switches a union, wherever it stands. A user error prints one line,
    `PROG: error: FIELD: VALUE is refused: why`, and exits with status 2; help exits with 0.

    Args:
        prog: name of the program for help and errors.
        description: head of the help.
        presets: name (with hyphens) to preset, all of one class.
        default: name of the preset taken when none is given.
        argv: arguments without the program's name; those of the process when None.
        from_file: the preset in a file, by the path or URL that was given, ending in .json; without it none is read.
        details: examples, common flags and notes of the help.

    Raises:
        ValueError: when the default is no preset; our own slip, not the user's.
    """
    if default not in presets:
        raise ValueError(f"default: {default!r} is refused: must be one of {', '.join(presets)}")
    prepare_output()
    details = details or CommandHelp()
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        _check_no_credentials(arguments)
        if arguments and arguments[0] in _HELP_FLAGS and len(presets) > 1:
            sys.stdout.write(_format_preset_list(prog, description, presets, default, from_file is not None, details))
            raise SystemExit(0)
        name, preset, arguments = _select_preset(presets, default, arguments, from_file)
        program = f"{prog} {name}" if len(presets) > 1 else prog
        return _apply_flags(program, description, preset, arguments, details)
    except ConfigError as error:
        exit_with_error(prog, error)


def apply_settings(preset: C, settings: Mapping[str, object]) -> C:
    """Return the preset with flags set from Python, such as {"schedule.kind": "cosine", "batch_size": 64}.

    Names and values mean what they mean on the command line. Raises ConfigError as the command line would.
    """
    arguments = [f"--{name}={_format_setting(value)}" for name, value in settings.items()]
    _check_no_credentials(arguments)
    return _apply_flags("", "", preset, arguments, CommandHelp())


def _format_setting(value: object) -> str:
    """Return a Python value as it would be typed."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple | dict | Config):
        return json.dumps(value, default=to_jsonable)
    return str(value)


def exit_with_error(prog: str, error: ConfigError) -> NoReturn:
    """Tell the user in one line what is wrong, and exit with status 2."""
    sys.stderr.write(f"{prog}: error: {make_printable(' '.join(str(error).split()))}\n")
    raise SystemExit(_USAGE_ERROR_STATUS) from None


def _check_no_credentials(arguments: Sequence[str]) -> None:
    """Raise ConfigError for the first argument that is a URL with a user name or password, whatever flag it is of.

    Before anything else is read: so no flag, of any job, can bring a password into a record, a message or a report.
    """
    name = ""
    for argument in arguments:
        match = _FLAG_PATTERN.fullmatch(argument)
        if match is not None:
            name = match["name"]
        value = argument if match is None else match["value"] or ""
        if name.rpartition(".")[2] not in _CREDENTIAL_FLAGS:
            reason = find_credentials_problem(value, f"--{name}" if name else "argument")
            if reason is not None:
                raise ConfigError(reason)
        if match is None or match["value"] is not None:
            name = ""


def _select_preset(
    presets: Mapping[str, Preset[C]], default: str, arguments: list[str], from_file: Callable[[str], Preset[C]] | None
) -> tuple[str, C, list[str]]:
    """The name of the preset that is asked for, the preset, and the arguments after it."""
    if not arguments or arguments[0].startswith("-"):
        return default, presets[default].value, arguments
    first = arguments[0]
    if (named := _match_preset_name(first, presets)) is not None:
        return named, presets[named].value, arguments[1:]
    if from_file is not None and first.endswith(JSON_SUFFIX):
        return first, from_file(first).value, arguments[1:]
    if any(flags.is_positional(field) for field in type(presets[default].value).model_fields.values()):
        return default, presets[default].value, arguments
    raise ConfigError(FieldError(first, "unknown preset" + format_suggestion(first, list(presets), "presets")))


def _apply_flags(prog: str, description: str, preset: C, arguments: list[str], details: CommandHelp) -> C:
    """Return the preset with the flags in place."""
    chosen, arguments = _extract_kinds(preset, arguments)
    shape = build_draft(preset, chosen)
    flag_like = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if not set(_HELP_FLAGS).isdisjoint(flag_like):
        sys.stdout.write(format_help(prog, description, shape, details))
        raise SystemExit(0)
    given = flags.parse_flags(prog, description, shape, _expand_bool_flags(shape, arguments))
    try:
        return apply_overrides(preset, {**chosen, **given})
    except ConfigError as error:
        shown = flags.map_flags_to_paths(shape)
        raise ConfigError(*(FieldError(_path_to_flag(p.path, shown), p.reason) for p in error.field_errors)) from None


def _match_preset_name(argument: str, presets: Mapping[str, Preset[C]]) -> str | None:
    wanted = argument.replace("_", "-")
    return next((name for name in presets if name.replace("_", "-") == wanted), None)


def _format_preset_list(
    prog: str,
    description: str,
    presets: Mapping[str, Preset[C]],
    default: str,
    takes_files: bool,
    details: CommandHelp,
) -> str:
    width = max(len(name) for name in presets)
    lines = []
    for name, preset in presets.items():
        summary = (preset.summary.strip().splitlines() or [""])[0]
        mark = " (default)" if name == default else ""
        lines.append(f"  {name:<{width}}  {summary}{mark}".rstrip())
    return "\n".join(
        [
            f"usage: {prog} [{'PRESET | FILE.json' if takes_files else 'PRESET'}] [--FLAG VALUE ...]",
            "",
            description.strip(),
            *format_examples(details),
            "",
            "presets:",
            *lines,
            *format_common_flags(presets[default].value, details),
            "",
            f"`{prog} PRESET --help` shows the flags of a preset with their types and defaults.",
            *([f"`{prog} FILE.json` starts from the recipe in a file, by path or URL."] if takes_files else []),
            "",
        ]
    )


def _extract_kinds(preset: Config, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Kinds by dotted path, and the arguments without them: they decide which flags there are."""

    def is_kind(flag: str) -> bool:
        return flag.rpartition(".")[2] == KIND

    def take(flag: str, kind: str) -> list[str]:
        taken[flag] = kind
        return []

    taken: dict[str, str] = {}
    rest = _replace_flags(arguments, is_kind, lambda value: not value.startswith("--"), take)
    chosen: dict[str, Any] = {}
    for flag in sorted(taken, key=lambda flag: flag.count(".")):
        # An outer kind may bring the union that an inner one is about.
        shape = build_draft(preset, chosen)
        shown = flags.map_flags_to_paths(shape)
        if flag not in shown:
            raise flags.make_unknown_flag_error(shape, "--" + flag.replace("_", "-"))
        try:
            build_draft(preset, {**chosen, shown[flag]: taken[flag]})
        except ConfigError as error:
            raise ConfigError(
                *(FieldError(_path_to_flag(p.path, shown), p.reason) for p in error.field_errors)
            ) from None
        chosen[shown[flag]] = taken[flag]
    return chosen, rest


def _expand_bool_flags(shape: Config, arguments: Sequence[str]) -> list[str]:
    """The arguments with `--flag=true` and `--flag false` as --flag and --no-flag, all that tyro knows."""
    shown = flags.map_flags_to_paths(shape)

    def is_truth(flag: str) -> bool:
        owner: Any = shape
        *branch, last = shown.get(flag, "").split(".")
        for name in branch:
            owner = getattr(owner, name)
        field = type(owner).model_fields.get(last)
        return field is not None and field.annotation is bool

    def spelled(flag: str, value: str) -> list[str]:
        if value.lower() not in _BOOL_FLAG_PREFIXES:
            raise ConfigError(FieldError(flag, f"{format_value(value)} is refused: must be true or false"))
        branch, dot, last = flag.rpartition(".")
        return [f"--{branch}{dot}{_BOOL_FLAG_PREFIXES[value.lower()]}{last}"]

    return _replace_flags(arguments, is_truth, lambda value: value.lower() in _BOOL_FLAG_PREFIXES, spelled)


def _replace_flags(
    arguments: Sequence[str],
    wanted: Callable[[str], bool],
    is_value: Callable[[str], bool],
    instead: Callable[[str, str], list[str]],
) -> list[str]:
    """The arguments, with what `instead(flag, value)` says in place of every wanted flag and its value."""
    result: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        following = arguments[position + 1] if position + 1 < len(arguments) else None
        position += 1
        if argument == "--":  # what follows is no flag, whatever it looks like
            return [*result, *arguments[position - 1 :]]
        match = _FLAG_PATTERN.fullmatch(argument)
        flag = match["name"].replace("-", "_") if match else ""
        if match is None or not wanted(flag):
            result.append(argument)
        elif match["value"] is not None:
            result.extend(instead(flag, match["value"]))
        elif following is not None and is_value(following):
            result.extend(instead(flag, following))
            position += 1
        else:
            result.append(argument)
    return result


def _path_to_flag(path: str, shown: Mapping[str, str]) -> str:
    """A dotted path as the user sees it: without the levels that its flag leaves out."""
    for flag, leaf in shown.items():
        if path == leaf or path.startswith(leaf + "."):
            return flag + path[len(leaf) :]
        if leaf.startswith(path + "."):
            below = leaf[len(path) :].count(".")
            return ".".join(flag.split(".")[:-below])
    return path
