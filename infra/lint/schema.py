"""JSON schemas that are closed against unknown keys, and what they have against a document."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from infra.lint.documents import Document, format_place
from infra.lint.report import Problem

MAPS = ("properties", "patternProperties", "definitions")
SINGLE = ("items", "additionalProperties", "if", "then", "else", "not")
LISTS = ("anyOf", "allOf", "oneOf")

Schema = Mapping[str, Any]


def closed(schema: Schema, whole: bool = True) -> dict[str, Any]:
    """The same schema, refusing keys that it does not name; without `whole`, nothing is required either.

    Left open: what says so itself, and what names no keys at all.
    """
    made: dict[str, Any] = {key: value for key, value in schema.items() if whole or key != "required"}
    for key in MAPS:
        if key in made:
            made[key] = {name: closed(part, whole) for name, part in made[key].items()}
    for key in SINGLE:
        if isinstance(made.get(key), dict):
            made[key] = closed(made[key], whole)
    for key in LISTS:
        if key in made:
            # What one alternative does not name another may: only below them is anything closed.
            made[key] = [{**part, "properties": _closed_below(part, whole)} if "properties" in part else part
                         for part in made[key]]  # fmt: skip
    if "properties" in made and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _closed_below(part: Schema, whole: bool) -> dict[str, Any]:
    return {name: closed(inner, whole) for name, inner in part["properties"].items()}


def problems(document: Document, schema: Schema) -> Iterator[Problem]:
    """Yield what the schema rejects in a document."""
    for error in sorted(
        Draft7Validator(schema).iter_errors(document.data), key=lambda found: list(map(str, found.absolute_path))
    ):
        yield from _told(document, error)


def _told(document: Document, error: ValidationError) -> Iterator[Problem]:
    place = list(error.absolute_path)
    if error.validator == "additionalProperties" and error.validator_value is False:
        allowed = list(error.schema.get("properties", {})) if isinstance(error.schema, Mapping) else []
        for key in error.instance if isinstance(error.instance, Mapping) else ():
            if key not in allowed:
                yield Problem(
                    document.name,
                    document.line([*place, key]),
                    f"{document.origin}{format_place(place)}: {key!r} is no field here: {_advice(str(key), allowed)}",
                )
    else:
        yield Problem(document.name, document.line(place), f"{document.origin}{format_place(place)}: {_short(error)}")


def _advice(key: str, allowed: list[str]) -> str:
    """Return what was probably meant."""
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"must be one of {', '.join(sorted(allowed))}"


def _short(error: ValidationError) -> str:
    value = repr(error.instance)
    if error.validator == "type":
        wanted = error.validator_value
        hint = "; quote it" if wanted == "string" and isinstance(error.instance, int | float | bool) else ""
        return f"{value[:60]} must be of type {wanted}{hint}"
    return f"{error.message[:300]}"
