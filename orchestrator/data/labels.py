"""Labels of tars made elsewhere: a decimal `cls` member, or a field of a `json` member; and the names of classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.data.errors import DataError
from orchestrator.storage import files, urls

# More than any dataset has; a hash taken for a label would otherwise make as many classes.
MAX_CLASSES = 1_000_000

_DECIMAL = re.compile(r"\s*([+-]?[0-9]{1,18})\s*")
_MADE = "labels"  # where the manifest says how they are stored


@dataclass(frozen=True)
class Labels:
    """How a dataset's labels are stored."""

    key: str  # field of the json member; empty for the cls member
    classes: tuple[str, ...]  # names in label order; empty when not known

    @property
    def extension(self) -> str:
        """The member that holds the label."""
        return "json" if self.key else "cls"

    def made(self) -> dict[str, str | int | float | bool]:
        """What the manifest keeps of it."""
        return {_MADE: f"json:{self.key}" if self.key else "cls"}

    def reader(self) -> Callable[[memoryview], int]:
        """A function from a member's payload to its label, of any value. It raises ValueError with the reason."""
        if not self.key:
            return decimal
        numbers = {name: number for number, name in enumerate(self.classes)}
        return lambda payload: _field(payload, self.key, numbers)

    def checked_reader(self) -> Callable[[memoryview], int]:
        """The same, which refuses labels outside the classes."""
        read, end = self.reader(), len(self.classes) or MAX_CLASSES

        def checked(payload: memoryview) -> int:
            label = read(payload)
            if not 0 <= label < end:
                known = f"0 .. {end - 1} are the classes" if self.classes else f"0 .. {end - 1} can be numbered"
                raise ValueError(f"label {label} is refused: {known}")
            return label

        return checked


def stored(made: Mapping[str, object], classes: tuple[str, ...]) -> Labels:
    """How the labels of a dataset are stored that was packed or adopted."""
    kind, _, key = str(made.get(_MADE, "cls")).partition(":")
    return Labels(key if kind == "json" else "", classes)


def decimal(payload: memoryview) -> int:
    """The label of a cls member. Raises ValueError when it is none."""
    match = _DECIMAL.fullmatch(bytes(payload[:64]).decode("utf-8", "replace")) if len(payload) <= 64 else None
    if match is None:
        raise ValueError(f"its label is no whole number: {bytes(payload[:20])!r}")
    return int(match[1])


def _field(payload: memoryview, key: str, numbers: Mapping[str, int]) -> int:
    try:
        found = json.loads(bytes(payload))
    except (ValueError, RecursionError):
        raise ValueError(f"its json is damaged: {bytes(payload[:20])!r}") from None
    if not isinstance(found, dict) or key not in found:
        there = ", ".join(map(repr, list(found)[:10])) if isinstance(found, dict) else "no fields"
        raise ValueError(f"its json has no field {key!r}; it has {there}")
    label = found[key]
    if isinstance(label, str):
        if label not in numbers:
            known = f"none of the {len(numbers)} classes" if numbers else "a name; give the names with --classes"
            raise ValueError(f"its label {label[:40]!r} is {known}")
        return numbers[label]
    if type(label) is not int or abs(label) >= 10**18:
        raise ValueError(f"its label is no whole number: {str(label)[:40]}")
    return label


def read_classes(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Class names in label order, and a readable name of each (empty when the file has none).

    The file holds a name per line, a JSON list, or a JSON object from label to name or to [name, readable name] (the
    usual imagenet_class_index.json). Raises DataError naming the file.
    """
    shown = urls.redact(url)
    try:
        text = files.read_bytes(url).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"classes: {shown}: missing") from None
    except UnicodeDecodeError:
        raise DataError(f"classes: {shown}: no text in UTF-8") from None
    entries = _entries(text, shown)
    paired = bool(entries) and all(isinstance(entry, list) and len(entry) == 2 for entry in entries)
    rows = [entry if paired and isinstance(entry, list) else [entry] for entry in entries]
    for number, row in enumerate(rows):
        if not all(isinstance(word, str) and word for word in row):
            raise DataError(f"classes: {shown}: class {number} has no name: {row[0]!r}")
    names = [str(row[0]) for row in rows]
    if len(names) < 2:
        raise DataError(f"classes: {shown}: {len(names)} classes; at least 2 are needed")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"classes: {shown}: class {twice!r} stands there twice")
    return tuple(names), tuple(str(row[1]) for row in rows) if paired else ()


def _entries(text: str, shown: str) -> Sequence[object]:
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.rstrip().splitlines()]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"classes: {shown}: damaged: {error}") from None
    if isinstance(found, list):
        return found
    wanted = [str(number) for number in range(len(found))]
    if odd := sorted(found.keys() ^ set(wanted)):
        raise DataError(f"classes: {shown}: its keys must be 0 .. {len(found) - 1}; {odd[0]!r} is one too many or few")
    return [found[number] for number in wanted]
