"""What a piece of text may mean, and which meaning a field takes."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import product
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from orchestrator.config.errors import explain
from orchestrator.config.json_text import parse_json

_WORDS = {"none": None, "null": None, "true": True, "false": False}
_MIXED = 4  # items up to which every mixture of texts and numbers is tried
_PROBE = ConfigDict(strict=True, allow_inf_nan=False)


class Words(tuple[str, ...]):
    """Texts that are the items of one list: `--scales 0.08 1.0`."""


def read(text: str | Words, model: type[BaseModel], name: str, path: str) -> Any:
    """The JSON-ready value that `text` means for the field `name` of `model`.

    The field decides: "1" is the text 1 for a str, one for an int. "none", "true" and "false" are words
    where the field takes them; a tuple is written [0.08, 1.0] or 0.08,1.0; a mapping is written as JSON.

    Args:
        text: as typed on a command line or written in a sweep; Words for several at once.
        model: the class that has the field.
        name: name of the field.
        path: dotted path for the error message.

    Raises:
        ConfigError: when the field takes none of the text's meanings; it tells about the likeliest one.
    """
    probe = _probe(model, name)
    likeliest: tuple[tuple[bool, int], ValidationError] | None = None
    for reading in _readings(text):
        try:
            probe.model_validate_json(json.dumps({name: reading}), strict=True)
        except ValidationError as error:
            distance = _distance(error)
            # Strictly nearer only: of equally near meanings, the first one is the most literal.
            if likeliest is None or distance < likeliest[0]:
                likeliest = distance, error
        else:
            return reading
    assert likeliest is not None, "every text has at least one reading: itself"
    raise explain(likeliest[1], model, path.rpartition(".")[0])


@lru_cache(maxsize=1024)
def _probe(model: type[BaseModel], name: str) -> type[BaseModel]:
    """A model of that one field, to ask the field alone: the others may not be valid yet."""
    field = model.model_fields[name]
    definitions: dict[str, Any] = {name: (field.annotation, field)}
    return create_model("Probe", __config__=_PROBE, **definitions)


def _readings(text: str | Words) -> Iterator[Any]:
    if isinstance(text, Words):
        yield from _lists(text)
        with suppress(ValueError):  # not JSON: the readings above still stand
            yield [parse_json(item) for item in text]
        return
    word = text.strip()
    if word.lower() in _WORDS:
        yield _WORDS[word.lower()]
    number = _number(word)
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
    yield from _lists(items)


def _lists(items: Sequence[str]) -> Iterator[list[Any]]:
    if len(items) > _MIXED:
        yield list(items)
        yield [_scalar(item) for item in items]
    else:  # a pair may be a text and a number
        yield from map(list, product(*([item, _scalar(item)] for item in items)))


def _number(word: str) -> int | float | None:
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            continue
    return None


def _scalar(item: str) -> Any:
    if item.lower() in _WORDS:
        return _WORDS[item.lower()]
    number = _number(item)
    return item if number is None else number


def _distance(error: ValidationError) -> tuple[bool, int]:
    """How far a reading is from what the field takes: wrong altogether, then by its number of errors."""
    details = error.errors(include_url=False)
    wrong = any(len(d["loc"]) == 1 and d["type"].endswith(("_type", "_required")) for d in details)
    return wrong, len(details)
