"""Names of classes, from the lists that people have."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_json
from orchestrator.data.build import label_format
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io

_NUMBERED = re.compile(r"([0-9]+)[\s,:]\s*(\S.*)")
_SYNSET = re.compile(r"(n[0-9]{8})\s+(\S.*)")


def read_classes(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names in label order, and a readable name of each (empty when the file has none).

    The file holds a name per line, a JSON list, a JSON object from label to name or to [name, readable name] (the
    usual imagenet_class_index.json), or one from name to label. Lines that all begin with 0, 1, 2 ... are named by the
    rest; lines that all begin with a WordNet id (synset_words.txt) by that, with the rest as readable name. Raises
    DataError naming the file.
    """
    shown = redaction.redact(url)
    try:
        text = file_io.read_bytes(url).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"classes: {shown}: missing") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"classes: {shown}: no text in UTF-8: byte {error.start} cannot be decoded; convert it, for example with "
            "iconv -f latin1 -t utf8"
        ) from None
    entries = _parse_entries(text, shown)
    paired = bool(entries) and all(isinstance(entry, list) and len(entry) == 2 for entry in entries)
    rows = [entry if paired and isinstance(entry, list) else [entry] for entry in entries]
    for number, row in enumerate(rows):
        if not all(isinstance(word, str) and word for word in row):
            raise DataError(f"classes: {shown}: class {number} has no name: {row[0]!r}")
    names = [str(row[0]) for row in rows]
    if len(names) < 2:
        raise DataError(f"classes: {shown}: {len(names)} classes; at least 2 are needed")
    titles = tuple(str(row[1]) for row in rows) if paired else ()
    try:
        check_names(names)
        for title in titles:
            _check_text(title)
    except ValueError as error:
        raise DataError(f"classes: {shown}: {error}") from None
    return tuple(names), titles


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that cannot be kept or shown as it is, or for two that mean the same."""
    seen: dict[str, str] = {}
    for name in names:
        _check_text(name)
        other = seen.setdefault(label_format.normalize_name(name), name)
        if other is not name:
            raise ValueError(
                f"class {name!r} stands there twice"
                if other == name
                else f"classes {other!a} and {name!a} are one name, with accents composed and decomposed; rename one"
            )


def _check_text(name: str) -> None:
    if any(unicodedata.category(letter) == "Cs" for letter in name):
        raise ValueError(f"class {name!r} must be text in UTF-8; rename it, for example with convmv -f latin1 -t utf8")
    if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        raise ValueError(f"class {name!r} must not hold control characters; rename it")


def _parse_entries(text: str, shown: str) -> Sequence[object]:
    if not text.lstrip().startswith(("[", "{")):
        return _parse_lines([line.strip() for line in text.rstrip().splitlines()])
    try:
        found = parse_json(text)
    except ValueError as error:
        raise DataError(f"classes: {shown}: damaged: {error}") from None
    if isinstance(found, list):
        return found
    wanted = [str(number) for number in range(len(found))]
    if sorted(map(str, found.values())) == sorted(wanted) and all(type(number) is int for number in found.values()):
        return sorted(found, key=lambda name: int(found[name]))
    if odd := sorted(found.keys() ^ set(wanted)):
        raise DataError(f"classes: {shown}: its keys must be 0 .. {len(found) - 1}; {odd[0]!r} is one too many or few")
    return [found[number] for number in wanted]


def _parse_lines(lines: list[str]) -> Sequence[object]:
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if all(match and int(match[1]) == number for number, match in enumerate(numbered)):
        lines = [match[2] for match in numbered if match]
    synsets = [_SYNSET.fullmatch(line) for line in lines]
    if lines and all(synsets):
        return [[match[1], match[2]] for match in synsets if match]
    return lines
