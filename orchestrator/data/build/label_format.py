"""Labels of tars made elsewhere: the text of a `cls` member or a field of a `json` member; and the names of classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.json_text import parse_json
from orchestrator.data.build.member_fields import LABEL_ENDINGS, MemberFields, parse_extensions, parse_image_key
from orchestrator.data.data_errors import DataError

# More than any dataset has; a hash taken for a label would otherwise make as many classes.
MAX_CLASSES = 1_000_000
# No name of a class is longer.
MAX_NAME_BYTES = 1024

_DECIMAL = re.compile(r"\s*([+-]?[0-9]{1,18})\s*")
_JSON_FIELD = re.compile(r"((?:[^:;]*\.)?json):(.+)", re.IGNORECASE | re.DOTALL)
_LABELS_KEY, _IMAGES_KEY = "labels", "images"  # where the manifest says how they are stored


@dataclass(frozen=True)
class LabelFormat:
    """How a dataset's images and labels are stored."""

    fields: MemberFields
    json_field: str  # of the label's member; empty when its text is the label
    classes: tuple[str, ...] = ()  # names in label order; empty when not known
    titles: tuple[str, ...] = ()  # readable names, which a label may be, too

    def to_manifest_values(self) -> dict[str, str | int | float | bool]:
        """What the manifest keeps of it."""
        member = ";".join(self.fields.labels)
        images = {_IMAGES_KEY: ";".join(self.fields.images)} if self.fields.is_chosen else {}
        return {_LABELS_KEY: f"{member}:{self.json_field}" if self.json_field else member, **images}

    def build_reader(self) -> Callable[[memoryview], int]:
        """A function from a member's payload to its label, of any value. It raises ValueError with the reason."""
        numbers = map_names_to_labels(self.classes, self.titles)
        if self.json_field:
            return lambda payload: _parse_json_label(payload, self.json_field, numbers)
        return lambda payload: _parse_text_label(payload, numbers)

    def build_checked_reader(self) -> Callable[[memoryview], int]:
        """The same, which refuses labels outside the classes."""
        read, end = self.build_reader(), len(self.classes) or MAX_CLASSES

        def checked(payload: memoryview) -> int:
            label = read(payload)
            if not 0 <= label < end:
                known = f"0 .. {end - 1} are the classes" if self.classes else f"0 .. {end - 1} can be numbered"
                raise ValueError(f"label {label} is refused: {known}")
            return label

        return checked


def parse_flags(
    image_key: str, label_key: str, classes: tuple[str, ...] = (), titles: tuple[str, ...] = ()
) -> LabelFormat:
    """How labels are stored by the flags of `shards.py index`.

    A label key is a field of each sample's json ("label", "json:label", "meta.json:label"), or a member: one with
    several parts whose last one means a label ("output.cls"), one after a dot (".label"), or several ("cls;y.cls").
    Raises ValueError.
    """
    try:
        fields = parse_image_key(image_key)
    except ValueError as error:
        raise ValueError(f"image_key: {error}") from None
    member, field = "cls", ""
    if match := _JSON_FIELD.fullmatch(label_key):
        member, field = match[1], match[2]
    elif _is_member_key(label_key):
        member = label_key
    elif label_key:
        member, field = "json", label_key
    try:
        labels = parse_extensions(member)
    except ValueError as error:
        raise ValueError(f"label_key: {error}") from None
    if both := set(labels) & set(fields.images):
        raise ValueError(f"label_key: {min(both)!r} must not be an image, too; set --image-key and --label-key apart")
    return LabelFormat(fields.model_copy(update={"labels": labels}), field, classes, titles)


def _is_member_key(key: str) -> bool:
    head, _, last = key.rpartition(".")
    return ";" in key or key.startswith(".") or bool(head and last.lower() in LABEL_ENDINGS)


def parse_manifest_values(
    made: Mapping[str, object], classes: tuple[str, ...] = (), titles: tuple[str, ...] = ()
) -> LabelFormat:
    """Return how a packed or adopted dataset stores its labels. Raises DataError when `made` does not say it."""
    member, _, field = str(made.get(_LABELS_KEY, "cls")).partition(":")
    try:
        fields = parse_image_key(str(made.get(_IMAGES_KEY, "")))
        return LabelFormat(fields.model_copy(update={"labels": parse_extensions(member)}), field, classes, titles)
    except ValueError as error:
        raise DataError(f"made: {error}; index the dataset again") from None


def map_names_to_labels(classes: Sequence[str], titles: Sequence[str] = ()) -> dict[str, int]:
    """The number of each class by all that names it whole: its name, its title, and the two in one line.

    Letters and accents may be composed or not (NFC). What would name two classes names none, unless it is the name of
    one of them.
    """
    numbers = {normalize_name(name): number for number, name in enumerate(classes)}
    lines = [f"{name} {title}" for name, title in zip(classes, titles, strict=bool(titles))] if titles else []
    for texts in (titles, lines):
        times = Counter(map(normalize_name, texts))
        for number, text in enumerate(map(normalize_name, texts)):
            if text and times[text] == 1:
                numbers.setdefault(text, number)
    return numbers


def normalize_name(text: str) -> str:
    """A name with composed accents, by which names are compared: macOS stores them decomposed."""
    return unicodedata.normalize("NFC", text.strip())


def parse_decimal(payload: memoryview) -> int:
    """The label of a cls member. Raises ValueError when it is none."""
    return _parse_text_label(payload, {})


def _parse_text_label(payload: memoryview, numbers: Mapping[str, int]) -> int:
    shown = bytes(payload[:20])
    if len(payload) <= MAX_NAME_BYTES:
        text = bytes(payload).decode("utf-8-sig", "replace")
        if len(payload) <= 64 and (match := _DECIMAL.fullmatch(text)):
            return int(match[1])
        if (name := normalize_name(text)) in numbers:
            return numbers[name]
    known = f" and none of the {len(numbers)} names of classes" if numbers else ""
    raise ValueError(f"its label is no whole number{known}: {shown!r}" + ("" if numbers else _CLASSES_HINT))


_CLASSES_HINT = "; give the names with --classes if it is one"


def _parse_json_label(payload: memoryview, key: str, numbers: Mapping[str, int]) -> int:
    try:
        found = parse_json(bytes(payload))
    except ValueError:
        raise ValueError(f"its json is damaged: {bytes(payload[:20])!r}") from None
    if not isinstance(found, dict) or key not in found:
        there = ", ".join(map(repr, list(found)[:10])) if isinstance(found, dict) else "no fields"
        raise ValueError(f"its json has no field {key!r}; it has {there}")
    label = found[key]
    if isinstance(label, str):
        if normalize_name(label) not in numbers:
            known = f"none of the {len(numbers)} classes" if numbers else "a name; give the names with --classes"
            raise ValueError(f"its label {label[:40]!r} is {known}")
        return numbers[normalize_name(label)]
    if type(label) is not int or abs(label) >= 10**18:
        raise ValueError(f"its label is no whole number: {str(label)[:40]}")
    return label
