"""Command lines: presets as sub-commands, every field a flag, every user error one line and exit status 2."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, NoReturn, TypeVar

from orchestrator.config import flags
from orchestrator.config.base import Config, to_jsonable
from orchestrator.config.errors import ConfigError, FieldError, format_suggestion
from orchestrator.config.introspection import KIND
from orchestrator.config.output import prepare_output
from orchestrator.config.overrides import apply_overrides, build_draft
from orchestrator.config.redaction import find_credentials_problem, make_printable

C = TypeVar("C", bound=Config)

JSON_SUFFIX = ".json"  # of a first argument that names a file
# The first section of every help, of those that a command has.
COMMON_FLAGS = (
    "data", "model.kind", "epochs", "batch_size", "storage", "tracking", "experiment", "placement.workers", "weights",
    "new", "dry_run",
)  # fmt: skip
# The oldest tested version, and the first one whose interfaces may differ: `make newest` tests between.
SUPPORTED_VERSIONS = {"ray": ("2.60", "3"), "torch": ("2.10", "3"), "mlflow": ("3.11", "4")}
# The only flags whose URL may hold a password: those of databases have no other place for one.
_CREDENTIAL_FLAGS = {"tracking"}


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A named starting point: the whole configuration, and one line that describes it."""

    value: C
    summary: str = ""


def parse_args(
    prog: str, description: str, presets: Mapping[str, Preset[C]], default: str, argv: Sequence[str] | None = None,
    from_file: Callable[[str], Preset[C]] | None = None, common: Sequence[str] = COMMON_FLAGS, example: str = "",
) -> C:  # fmt: skip
    """Return the configuration that a command line asks for: a preset with its flags in place.

    The first argument names the preset, with hyphens or underscores, or a .json file that `from_file` loads by path or
    URL; without one it is the default. `--schedule.kind polynomial` switches a union, wherever it stands. A user error
    prints one line, `PROG: error: FIELD: must be ..., got ...`, and exits with status 2; help exits with 0.

    presets: name (with hyphens) to preset, all of one class. argv: arguments without the program's name; those of the
    process when None. common: names of the flags that the help lists first, with underscores. example: command lines
    at the end of the help.
    """
    prepare_output()
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        _check_no_credentials(arguments)
        if arguments and arguments[0] in flags.HELP_FLAGS and len(presets) > 1:
            sys.stdout.write(_format_preset_list(prog, description, presets, default, from_file is not None, example))
            raise SystemExit(0)
        name, preset, arguments = _select_preset(presets, default, arguments, from_file)
        leading, typed, rest = flags.split_arguments(arguments)
        if any(each.text in flags.HELP_FLAGS for each in typed):
            shape = build_draft(preset, _read_kinds(preset, typed))
            named = f"{prog} {name}" if len(presets) > 1 else prog
            sys.stdout.write(flags.format_help(named, description, shape, common, example))
            raise SystemExit(0)
        check_versions()
        return _apply_flags(preset, typed, [*leading, *rest])
    except ConfigError as error:
        exit_with_error(prog, error)


def apply_settings(preset: C, settings: Mapping[str, object]) -> C:
    """Return the preset with flags set from Python, such as {"schedule.kind": "cosine"}. Raises ConfigError."""
    check_versions()
    arguments = []
    for name, value in settings.items():
        is_json = isinstance(value, list | tuple | dict | Config)
        arguments.append(f"--{name}={json.dumps(value, default=to_jsonable) if is_json else value}")
    _check_no_credentials(arguments)
    return _apply_flags(preset, flags.split_arguments(arguments)[1], [])


def _apply_flags(preset: C, typed: Sequence[flags.TypedFlag], positionals: Sequence[str]) -> C:
    kinds = _read_kinds(preset, typed)
    shape = build_draft(preset, kinds)
    with_flags = {**kinds, **flags.parse_flags(shape, typed, positionals)}
    try:
        return apply_overrides(preset, with_flags)
    except ConfigError as error:
        raise _name_flags(error, flags.map_flags_to_paths(shape)) from None


def exit_with_error(prog: str, error: ConfigError) -> NoReturn:
    """Print in one line what is wrong, and exit with status 2, as argparse and the shells do."""
    sys.stderr.write(f"{prog}: error: {make_printable(' '.join(str(error).split()))}\n")
    raise SystemExit(2) from None


def _check_no_credentials(arguments: Sequence[str]) -> None:
    """Raise ConfigError for the first argument that is a URL with a user name or password, whatever its flag.

    This precedes all other parsing, so that no flag of any job can bring a password into a record or a message.
    """
    flag = ""
    for argument in arguments:
        match = flags.FLAG_PATTERN.fullmatch(argument)
        flag, value = (f"--{match['name']}", match["value"]) if match else (flag, argument)
        problem = find_credentials_problem(value or "", flag or "argument")
        if problem is not None and flag.lstrip("-").rpartition(".")[2] not in _CREDENTIAL_FLAGS:
            raise ConfigError(problem)
        if value is not None:
            flag = ""


def _select_preset(
    presets: Mapping[str, Preset[C]], default: str, arguments: list[str], from_file: Callable[[str], Preset[C]] | None
) -> tuple[str, C, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        return default, presets[default].value, arguments
    first = arguments[0]
    plain = first.replace("_", "-")
    if (name := next((name for name in presets if name.replace("_", "-") == plain), None)) is not None:
        return name, presets[name].value, arguments[1:]
    if from_file is not None and first.endswith(JSON_SUFFIX):
        return first, from_file(first).value, arguments[1:]
    if any(flags.is_positional(field) for field in type(presets[default].value).model_fields.values()):
        return default, presets[default].value, arguments
    raise ConfigError(FieldError(first, "unknown preset" + format_suggestion(first, list(presets), "presets")))


def _format_preset_list(
    prog: str, description: str, presets: Mapping[str, Preset[C]], default: str, takes_files: bool, example: str
) -> str:
    width, first = max(map(len, presets)), "PRESET | FILE.json" if takes_files else "PRESET"
    lines = [f"usage: {prog} [{first}] [--FLAG VALUE ...]", "", description.strip(), "", "presets:"]
    for name, preset in presets.items():
        lines.append(f"  {name:<{width}}  {preset.summary}{' (default)' if name == default else ''}".rstrip())
    lines += ["", f"`{prog} PRESET --help` shows the flags of a preset with their types and defaults."]
    if takes_files:
        lines.append(f"`{prog} FILE.json` starts from the recipe in a file, by path or URL.")
    if example:
        lines += ["", "examples:", *(f"  {line}" for line in example.strip().splitlines())]
    return "\n".join([*lines, ""])


def _read_kinds(preset: Config, typed: Sequence[flags.TypedFlag]) -> dict[str, Any]:
    """Return the kinds that flags choose, by dotted path: they decide which other flags there are."""
    texts: dict[str, str] = {}
    for each in typed:
        values = each.following if each.value is None else (each.value,)
        if each.name.rpartition(".")[2] == KIND and values:
            texts[each.name] = values[0]
    chosen: dict[str, Any] = {}
    # Outer kinds first: they may bring the union that an inner one chooses from.
    for name in sorted(texts, key=lambda name: name.count(".")):
        shape = build_draft(preset, chosen)
        paths = flags.map_flags_to_paths(shape)
        if name not in paths:
            raise flags.make_unknown_flag_error(shape, flags.format_flag(name))
        try:
            build_draft(preset, {**chosen, paths[name]: texts[name]})
        except ConfigError as error:
            raise _name_flags(error, paths) from None
        chosen[paths[name]] = texts[name]
    return chosen


def _name_flags(error: ConfigError, paths: Mapping[str, str]) -> ConfigError:
    return ConfigError(*(FieldError(_path_to_flag(each.path, paths), each.reason) for each in error.field_errors))


def _path_to_flag(path: str, paths: Mapping[str, str]) -> str:
    for flag, leaf in paths.items():
        if f"{path}.".startswith(f"{leaf}."):
            return flag + path[len(leaf) :]
        if leaf.startswith(f"{path}."):  # a level that has no flag of its own
            return ".".join(flag.split(".")[: -leaf[len(path) :].count(".")])
    return path


def check_versions() -> None:
    """Raise ConfigError, one line, when a package is missing, too old, or of a major version that is not supported."""
    for package, (oldest, excluded) in SUPPORTED_VERSIONS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = ""
        # (2, 13) for 2.13.0+cu128, (3, 0) for 3.0.0rc1.
        least, found, limit = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (oldest, version, excluded))
        if not least <= found < limit:
            raise ConfigError(
                f"{package} must be of version {oldest} or newer and below {excluded}, got {version or 'none'}; run: "
                f"pip install '{package}>={oldest},<{excluded}'"
            )
