"""One-line explanations of invalid configurations."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.config.introspection import KIND, ModelTypes, find_models, get_kind, get_union_members

_MAX_VALUE_LENGTH = 60
_MAX_HINT_LENGTH = 90
_MAX_KEYS_LISTED = 12

# pydantic's error types in the user's words; the braces are filled from the error's context.
_REASONS = {
    "missing": "must be given",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "none_required": "must be none",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of its fields",
    "model_attributes_type": "must be a mapping of its fields",
    "too_short": "must have at least {min_length} item(s), has {actual_length}",
    "too_long": "must have at most {max_length} item(s), has {actual_length}",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} character(s)",
    "string_pattern_mismatch": "must match {pattern}",
    "union_tag_not_found": "must be given",
    "value_error": "{error}",
    # The JSON is made here; its texts are the user's.
    "json_invalid": "holds text that is no valid Unicode; give names in UTF-8, with PYTHONUTF8=1 in an ASCII locale",
}
_CHOICE_ERRORS = ("literal_error", "enum", "union_tag_invalid")
_VALUELESS_ERRORS = ("missing", "extra_forbidden", "union_tag_not_found", "json_invalid")


@dataclass(frozen=True)
class FieldError:
    """An invalid field: its dotted path (empty for the whole configuration) and the reason."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


class ConfigError(ValueError):
    """An invalid configuration, override or command line.

    Its text is one line; `field_errors` holds the same by field. It survives pickling, so that it may cross processes.
    """

    def __init__(self, *problems: FieldError | str) -> None:
        super().__init__(*problems)

    @property
    def field_errors(self) -> tuple[FieldError, ...]:
        """Every invalid field, in declared order."""
        return tuple(p if isinstance(p, FieldError) else FieldError("", str(p)) for p in self.args)

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.field_errors)


class _ErrorLocation(NamedTuple):
    """Visible path of an error, the models that own its last key, and the field if known."""

    parts: tuple[str, ...]
    owners: ModelTypes
    field: FieldInfo | None


def format_value(value: Any) -> str:
    """Return a value as one short line: text quoted, None as none, long values cut."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float) else json.dumps(value, default=str)
    return text if len(text) <= _MAX_VALUE_LENGTH else text[: _MAX_VALUE_LENGTH - 3] + "..."


def find_near_misses(name: str, candidates: Iterable[str]) -> list[str]:
    """Return up to three names that resemble `name`; hyphens, underscores and case do not count.

    Names are compared as a whole first, then by their last dotted part, so that `decay_factor` finds
    `schedule.decay_factor`, then by their beginnings, so that `poly` finds `polynomial`.
    """
    plain_name = _normalize_name(name)
    by_plain = {_normalize_name(candidate): candidate for candidate in candidates}
    keys: tuple[Callable[[str], str], ...] = (
        lambda plain: plain,
        lambda plain: plain.rpartition(".")[2],
        lambda plain: plain[: len(plain_name) + 1],
    )
    for key in keys:
        close = get_close_matches(key(plain_name), {key(plain) for plain in by_plain}, n=3, cutoff=0.7)
        if close:
            return [known for match in close for plain, known in by_plain.items() if key(plain) == match][:3]
    return []


def format_suggestion(name: str, known: Sequence[str], noun: str) -> str:
    """Return `; did you mean a or b?` when a known name resembles `name`, else the first known names."""
    near = find_near_misses(name, known)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    listed = ", ".join(known[:_MAX_KEYS_LISTED]) + (", ..." if len(known) > _MAX_KEYS_LISTED else "")
    return f"; known {noun}: {listed}" if listed else ""


def format_choices(value: Any, choices: Iterable[str]) -> str:
    """Return `must be one of a, b, got c`, and which of them `value` resembles."""
    names = list(choices)
    return f"must be one of {', '.join(names)}, got {format_value(value)}{_suggest_choice(str(value), names)}"


def convert_validation_error(error: ValidationError, root: Any, prefix: str = "") -> ConfigError:
    """Return pydantic's error as a ConfigError of one line.

    Args:
        error: pydantic's account; its input dump and links are left out.
        root: the class or annotation that was validated; it distinguishes union tags from field names.
        prefix: dotted path of `root` inside the user's configuration, empty for the top.
    """
    reasons: dict[str, list[str]] = {}
    endings: dict[str, str] = {}
    for details in error.errors(include_url=False):
        location = _locate_error(details["loc"], root)
        is_tag = details["type"].startswith("union_tag")
        path = ".".join(filter(None, (prefix, *location.parts, KIND if is_tag else "")))
        reason, choices = _format_reason(details, location)
        if reason not in reasons.setdefault(path, []):
            reasons[path].append(reason)
        value = _format_got(details, reason) + _suggest_choice(_get_input(details), choices)
        hint = "" if is_tag or details["type"] == "value_error" else _format_hint(location.field)
        endings.setdefault(path, value + hint)
    # Several reasons for one field are those of a union's branches, each of which states what it would take.
    return ConfigError(*(FieldError(path, " or ".join(texts) + endings[path]) for path, texts in reasons.items()))


def _locate_error(loc: tuple[int | str, ...], root: Any) -> _ErrorLocation:
    annotation, owners, field = root, find_models(root), None
    parts: list[str] = []
    for item in loc:
        tagged = [model for model in owners if len(owners) > 1 and get_kind(model) == item]
        known = owners[0].model_fields.get(str(item)) if len(owners) == 1 else None
        if tagged:
            owners, field = tuple(tagged), None
        elif isinstance(item, int):
            parts.append(str(item))
        elif known is not None:
            parts.append(item)
            field, annotation = known, known.annotation
            owners = find_models(annotation)
        # pydantic names the branch of a plain union ("float", "str") as if it were a key.
        elif owners or any(get_origin(branch) in (dict, Mapping) for branch in get_union_members(annotation)):
            parts.append(item)
    return _ErrorLocation(tuple(parts), owners, field)


def _format_reason(details: ErrorDetails, location: _ErrorLocation) -> tuple[str, list[str]]:
    """Return the reason without the value, and the names to choose from, if it is about those."""
    kind = details["type"]
    # Bounds come as floats even where an int was declared: 1.0 reads better as 1.
    context = {key: f"{v:g}" if isinstance(v, float) else v for key, v in details.get("ctx", {}).items()}
    if kind == "extra_forbidden":
        known = list(location.owners[0].model_fields) if location.owners else []
        return "unknown key" + format_suggestion(location.parts[-1], known, "keys"), []
    if kind in _CHOICE_ERRORS:
        listed = str(context.get("expected") or context["expected_tags"]).replace(" or ", ", ")
        choices = [choice.strip("'") for choice in listed.split(", ")]
        return f"must be one of {', '.join(choices)}", choices
    return " ".join(_REASONS.get(kind, details["msg"]).format_map(context).split()), []


def _get_input(details: ErrorDetails) -> Any:
    return details["ctx"]["tag"] if details["type"] == "union_tag_invalid" else details["input"]


def _format_got(details: ErrorDetails, reason: str) -> str:
    """Return `, got VALUE`, where that helps: not for a mapping, an absent key, or a reason that names the value."""
    value = _get_input(details)
    if details["type"] in _VALUELESS_ERRORS or isinstance(value, dict | BaseModel):
        return ""
    text = format_value(value)
    return "" if details["type"] == "value_error" and text in reason else f", got {text}"


def _suggest_choice(value: Any, choices: list[str]) -> str:
    near = find_near_misses(str(value), choices) if choices else []
    return f"; did you mean {near[0]}?" if near else ""


def _format_hint(field: FieldInfo | None) -> str:
    """Return the first line of the field's description in brackets."""
    if field is None or not field.description:
        return ""
    line = field.description.strip().splitlines()[0].rstrip(".")
    return f" ({line if len(line) <= _MAX_HINT_LENGTH else line[: _MAX_HINT_LENGTH - 3] + '...'})"


def _normalize_name(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
