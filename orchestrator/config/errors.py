"""Texts for the terminal: one-line explanations of invalid configurations, and commands as the user spells them."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.config.introspection import KIND, ModelTypes, find_models, get_kind, get_union_members

PROGRAM = "orchestrator"
JOBS_FOLDER = "jobs"
_MAX_VALUE_LENGTH = 60
_MAX_KEYS_LISTED = 12

# pydantic's error types in the user's words; the braces are filled from the error's context.
_REASONS = {
    "missing": "must be given",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of its fields",
    "model_attributes_type": "must be a mapping of its fields",
    "too_short": "must have at least {min_length} item(s), has {actual_length}",
    "too_long": "must have at most {max_length} item(s), has {actual_length}",
    "union_tag_not_found": "must be given",
    "value_error": "{error}",
    # The JSON is made here; its texts are the user's.
    "json_invalid": "holds text that is no valid Unicode; give names in UTF-8, with PYTHONUTF8=1 in an ASCII locale",
}
_CHOICE_ERRORS = ("literal_error", "union_tag_invalid")
_VALUELESS_ERRORS = ("missing", "extra_forbidden", "union_tag_not_found", "json_invalid")


@dataclass(frozen=True)
class FieldError:
    """An invalid field: its dotted path (empty for the whole configuration) and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


class ConfigError(ValueError):
    """An invalid configuration, override or command line; its text is one line. It survives pickling."""

    @property
    def field_errors(self) -> tuple[FieldError, ...]:
        """Every invalid field, in declared order."""
        return tuple(p if isinstance(p, FieldError) else FieldError("", str(p)) for p in self.args)

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.field_errors)


def format_value(value: Any) -> str:
    """Return a value as one short line: text quoted, None as none, long values cut."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float) else json.dumps(value, default=str)
    return text if len(text) <= _MAX_VALUE_LENGTH else text[: _MAX_VALUE_LENGTH - 3] + "..."


def find_near_misses(name: str, candidates: Sequence[str]) -> list[str]:
    """Return up to three names that resemble `name`; hyphens, underscores and case do not count."""
    plain_name, *plain_candidates = (each.lstrip("-").replace("-", "_").lower() for each in (name, *candidates))
    by_plain, prefix = dict(zip(plain_candidates, candidates, strict=True)), len(plain_name) + 1
    # As a whole, by the last dotted part (decay_factor: schedule.decay_factor), by the beginning (poly: polynomial).
    ways: list[Callable[[str], str]] = [str, lambda plain: plain.rpartition(".")[2], lambda plain: plain[:prefix]]
    for key in ways:
        close = get_close_matches(key(plain_name), {key(plain) for plain in by_plain}, n=3, cutoff=0.7)
        if close:
            return [known for match in close for plain, known in by_plain.items() if key(plain) == match][:3]
    return []


def format_suggestion(name: object, known: Sequence[str], noun: str = "") -> str:
    """Return `; did you mean a or b?` when a known name resembles `name`, else the first known names, called `noun`."""
    if near := find_near_misses(str(name), known):
        return f"; did you mean {' or '.join(near)}?"
    listed = ", ".join(known[:_MAX_KEYS_LISTED]) + (", ..." if len(known) > _MAX_KEYS_LISTED else "")
    return f"; known {noun}: {listed}" if listed and noun else ""


def format_command(command: str, arguments: Sequence[str] = ()) -> str:
    """Return the shell line that runs a command such as "train-ensemble", spelled as this process was started."""
    folder, script = os.path.split(sys.argv[0]) if sys.argv else ("", "")
    words = [PROGRAM, command]
    if script.endswith(".py") and os.path.basename(os.path.abspath(folder)) == JOBS_FOLDER:
        name, _, subcommand = command.partition(" ")
        words = ["python", shlex.quote(os.path.join(folder, f"{name.replace('-', '_')}.py")), subcommand]
    return " ".join(filter(None, (*words, shlex.join(arguments))))


def convert_validation_error(error: ValidationError, root: Any, prefix: str = "") -> ConfigError:
    """Return pydantic's error as a ConfigError of one line, for `root`, the class or annotation that was validated.

    prefix: dotted path of `root` inside the user's configuration, empty for the top.
    """
    reasons: dict[str, list[str]] = {}
    endings: dict[str, str] = {}
    for details in error.errors(include_url=False):
        parts, owners = _locate_error(details["loc"], root)
        is_tag = details["type"].startswith("union_tag")
        path = ".".join(filter(None, (prefix, *parts, KIND if is_tag else "")))
        reason, ending = _explain(details, parts, owners)
        if reason not in reasons.setdefault(path, []):
            reasons[path].append(reason)
        endings.setdefault(path, ending)
    # Several reasons for one field are those of a union's branches, each of which states what it would take.
    return ConfigError(*(FieldError(path, " or ".join(texts) + endings[path]) for path, texts in reasons.items()))


def _locate_error(loc: tuple[int | str, ...], root: Any) -> tuple[list[str], ModelTypes]:
    """Return the parts of the path that users know, and the models that own the last."""
    annotation, owners = root, find_models(root)
    parts: list[str] = []
    for item in loc:
        tagged = tuple(model for model in owners if len(owners) > 1 and get_kind(model) == item)
        known = owners[0].model_fields.get(str(item)) if len(owners) == 1 else None
        if tagged:
            owners = tagged
        elif known is not None and isinstance(item, str):
            parts.append(item)
            annotation = known.annotation
            owners = find_models(annotation)
        # pydantic names the branch of a plain union ("float", "str") as if it were a key.
        elif isinstance(item, int) or owners or {dict, Mapping} & set(map(get_origin, get_union_members(annotation))):
            parts.append(str(item))
    return parts, owners


def _explain(details: ErrorDetails, parts: Sequence[str], owners: ModelTypes) -> tuple[str, str]:
    """Return the reason, and `, got VALUE` with a near miss where that helps."""
    kind, value = details["type"], details["input"]
    # Bounds come as floats even where an int was declared: 1.0 reads better as 1.
    context = {key: f"{v:g}" if isinstance(v, float) else v for key, v in details.get("ctx", {}).items()}
    if kind == "extra_forbidden":
        return "unknown key" + format_suggestion(parts[-1], list(owners[0].model_fields) if owners else [], "keys"), ""
    if kind in _CHOICE_ERRORS:
        listed = str(context.get("expected") or context["expected_tags"]).replace(" or ", ", ")
        choices = [choice.strip("'") for choice in listed.split(", ")]
        value = context.get("tag", value)
        return f"must be one of {', '.join(choices)}", f", got {format_value(value)}{format_suggestion(value, choices)}"
    if kind in _REASONS:
        reason = " ".join(_REASONS[kind].format_map(context).split())
    else:  # such as "String should match pattern '...'"
        reason = details["msg"].replace("Input should ", "must ").replace("String should ", "must ")
    is_named = kind == "value_error" and format_value(value) in reason
    if kind in _VALUELESS_ERRORS or is_named or isinstance(value, dict | BaseModel):
        return reason, ""
    return reason, f", got {format_value(value)}"
