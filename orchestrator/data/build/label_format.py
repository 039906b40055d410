"""Labels and classes of tars made elsewhere: text of a `cls` member, field of a `json` member, lists of class names."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_json
from orchestrator.data.build.member_fields import LABEL_ENDINGS, MemberFields, parse_extensions, parse_image_key
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io

# More than any dataset has; a hash taken for a label would otherwise make as many classes.
MAX_CLASSES = 1_000_000
# No name of a class is longer.
MAX_NAME_BYTES = 1024

_DECIMAL = re.compile(r"\s*([+-]?[0-9]{1,18})\s*")
_JSON_FIELD = re.compile(r"((?:[^:;]*\.)?json):(.+)", re.IGNORECASE | re.DOTALL)
_NUMBERED = re.compile(r"([0-9]+)[\s,:]\s*(\S.*)")
_SYNSET = re.compile(r"(n[0-9]{8})\s+(\S.*)")
_LABELS_KEY, _IMAGES_KEY = "labels", "images"  # where the manifest says how they are stored


@dataclass(frozen=True)
class LabelFormat:
    """Format in which a dataset's images and labels are stored."""

    fields: MemberFields
    json_field: str  # of the label's member; empty when its text is the label
    classes: tuple[str, ...] = ()  # names in label order; empty when not known
    titles: tuple[str, ...] = ()  # readable names, which a label may be, too

    def to_manifest_values(self) -> dict[str, str | int | float | bool]:
        """Return what the manifest keeps of it."""
        member = ";".join(self.fields.labels)
        images = {_IMAGES_KEY: ";".join(self.fields.images)} if self.fields.is_chosen else {}
        return {_LABELS_KEY: f"{member}:{self.json_field}" if self.json_field else member, **images}

    def build_reader(self, is_checked: bool = False) -> Callable[[memoryview], int]:
        """Return a function from a member's payload to its label. It raises ValueError with the reason.

        is_checked: whether it also raises for a label outside the classes.
        """
        numbers = map_names_to_labels(self.classes, self.titles)
        end = len(self.classes) or MAX_CLASSES

        def read(payload: memoryview) -> int:
            if self.json_field:
                label = _parse_json_label(payload, self.json_field, numbers)
            else:
                label = _parse_text_label(payload, numbers)
            if is_checked and not 0 <= label < end:
                raise ValueError(f"its label must be a class in 0 .. {end - 1}, got {label}")
            return label

        return read


def parse_flags(
    image_key: str, label_key: str, classes: tuple[str, ...] = (), titles: tuple[str, ...] = ()
) -> LabelFormat:
    """Return how labels are stored by the flags of `shards index`. Raises ValueError.

    A label key is a field of each sample's json ("label", "json:label", "meta.json:label"), or a member: one with
    several parts whose last one means a label ("output.cls"), one after a dot (".label"), or several ("cls;y.cls").
    """
    try:
        fields = parse_image_key(image_key)
    except ValueError as error:
        raise ValueError(f"image_key: {error}") from None
    head, _, last = label_key.rpartition(".")
    member, field = "cls", ""
    if match := _JSON_FIELD.fullmatch(label_key):
        member, field = match[1], match[2]
    elif ";" in label_key or label_key.startswith(".") or (head and last.lower() in LABEL_ENDINGS):
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


def parse_manifest_values(
    made: Mapping[str, object], classes: tuple[str, ...] = (), titles: tuple[str, ...] = ()
) -> LabelFormat:
    """Return how a packed or indexed dataset stores its labels. Raises DataError when `made` does not say it."""
    member, _, field = str(made.get(_LABELS_KEY, "cls")).partition(":")
    try:
        fields = parse_image_key(str(made.get(_IMAGES_KEY, "")))
        return LabelFormat(fields.model_copy(update={"labels": parse_extensions(member)}), field, classes, titles)
    except ValueError as error:
        raise DataError(f"made: {error}; index the dataset again") from None


def map_names_to_labels(classes: Sequence[str], titles: Sequence[str] = ()) -> dict[str, int]:
    """Return the number of each class by all that names it whole: its name, its title, and the two in one line.

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
    """Return a name with composed accents, by which names are compared: macOS stores them decomposed."""
    return unicodedata.normalize("NFC", text.strip())


def parse_decimal(payload: memoryview) -> int:
    """Return the label of a cls member. Raises ValueError when it is none."""
    return _parse_text_label(payload, {})


def _parse_text_label(payload: memoryview, numbers: Mapping[str, int]) -> int:
    if len(payload) <= MAX_NAME_BYTES:
        text = bytes(payload).decode("utf-8-sig", "replace")
        if len(payload) <= 64 and (match := _DECIMAL.fullmatch(text)):
            return int(match[1])
        if (name := normalize_name(text)) in numbers:
            return numbers[name]
    known, hint = f" and none of the {len(numbers)} names of classes", "; give the names with --classes if it is one"
    shown = bytes(payload[:20])
    raise ValueError(f"its label is no whole number{known if numbers else ''}: {shown!r}{'' if numbers else hint}")


def _parse_json_label(payload: memoryview, key: str, numbers: Mapping[str, int]) -> int:
    try:
        values = parse_json(bytes(payload))
    except ValueError:
        raise ValueError(f"its json is damaged: {bytes(payload[:20])!r}") from None
    if not isinstance(values, dict) or key not in values:
        there = ", ".join(map(repr, list(values)[:10])) if isinstance(values, dict) else "no fields"
        raise ValueError(f"its json has no field {key!r}; it has {there}")
    label = values[key]
    if isinstance(label, str):
        if normalize_name(label) not in numbers:
            known = f"none of the {len(numbers)} classes" if numbers else "a name; give the names with --classes"
            raise ValueError(f"its label {label[:40]!r} is {known}")
        return numbers[normalize_name(label)]
    if type(label) is not int or abs(label) >= 10**18:
        raise ValueError(f"its label is no whole number: {str(label)[:40]}")
    return label


# ------------------------------------------------------------------ lists of class names
def read_classes(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return class names in label order, and a readable name of each (empty when the file has none).

    The file holds a name per line, a JSON list, a JSON object from label to name or to [name, readable name] (the
    usual imagenet_class_index.json), or one from name to label. Lines that all begin with 0, 1, 2 ... are named by the
    rest; lines that all begin with a WordNet id (synset_words.txt) by that, with the rest as readable name. Raises
    DataError naming the file.
    """
    label = f"classes: {redaction.redact(url)}"
    entries = _parse_entries(read_text(url, label), label)
    paired = bool(entries) and all(isinstance(entry, list) and len(entry) == 2 for entry in entries)
    rows = [entry if paired and isinstance(entry, list) else [entry] for entry in entries]
    for number, row in enumerate(rows):
        if not all(isinstance(word, str) and word for word in row):
            raise DataError(f"{label}: class {number} has no name: {row[0]!r}")
    names = [str(row[0]) for row in rows]
    if len(names) < 2:
        raise DataError(f"{label}: {len(names)} classes; at least 2 are needed")
    titles = tuple(str(row[1]) for row in rows) if paired else ()
    try:
        check_names(names)
        for title in titles:
            _check_text(title)
    except ValueError as error:
        raise DataError(f"{label}: {error}") from None
    return tuple(names), titles


def read_text(url: str, label: str) -> str:
    """Return the text of a UTF-8 file. Raises DataError, which begins with `label`, when it is none or missing."""
    try:
        return file_io.read_bytes(url).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{label}: missing") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{label}: no text in UTF-8: byte {error.start} cannot be decoded; convert it, for example with "
            "iconv -f latin1 -t utf8"
        ) from None


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that cannot be kept or shown as it is, or for two that mean the same."""
    seen: dict[str, str] = {}
    for name in names:
        _check_text(name)
        other = seen.setdefault(normalize_name(name), name)
        if other is not name and other == name:
            raise ValueError(f"class {name!r} is listed twice; list it once")
        if other is not name:
            raise ValueError(
                f"classes {other!a} and {name!a} are one name, with accents composed and decomposed; rename one"
            )


def _check_text(name: str) -> None:
    categories = set(map(unicodedata.category, name))
    if "Cs" in categories:
        raise ValueError(f"class {name!r} must be text in UTF-8; rename it, for example with convmv -f latin1 -t utf8")
    if categories & {"Cc", "Zl", "Zp"}:
        raise ValueError(f"class {name!r} must not hold control characters; rename it")


def _parse_entries(text: str, label: str) -> Sequence[object]:
    if not text.lstrip().startswith(("[", "{")):
        return _parse_lines([line.strip() for line in text.rstrip().splitlines()])
    try:
        values = parse_json(text)
    except ValueError as error:
        raise DataError(f"{label}: damaged: {error}") from None
    if isinstance(values, list):
        return values
    keys = [str(number) for number in range(len(values))]
    if sorted(map(str, values.values())) == sorted(keys) and all(type(number) is int for number in values.values()):
        return sorted(values, key=lambda name: int(values[name]))
    if odd := sorted(values.keys() ^ set(keys)):
        raise DataError(f"{label}: its keys must be 0 .. {len(values) - 1}; {odd[0]!r} is one too many or few")
    return [values[number] for number in keys]


def _parse_lines(lines: list[str]) -> Sequence[object]:
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if all(match and int(match[1]) == number for number, match in enumerate(numbered)):
        lines = [match[2] for match in numbered if match]
    synsets = [_SYNSET.fullmatch(line) for line in lines]
    if lines and all(synsets):
        return [[match[1], match[2]] for match in synsets if match]
    return lines
