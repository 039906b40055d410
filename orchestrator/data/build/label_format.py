"""Which members of a sample are image and label, how a label is stored, and lists of class names.

A member KEY.EXTENSION belongs to the sample KEY. As in WebDataset, the extension begins at the first dot of the name,
so it may have several parts (`input.jpg`), and a key never has a dot: `zoom1.5x.jpg` is the member `5x.jpg` of `zoom1`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config import redaction
from orchestrator.config.json_text import parse_json
from orchestrator.config.redaction import make_printable
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
# Extensions whose last part means a label; WebDataset decodes those but text as whole numbers.
LABEL_ENDINGS = ("cls", "cls2", "class", "count", "index", "inx", "id", "label", "txt", "text")
MAX_LISTED_KINDS = 6  # of the members that are passed over
MAX_CLASSES = 1_000_000  # a hash taken for a label would otherwise make as many
MAX_NAME_BYTES = 1024  # of a class
MAX_TEXT_BYTES = 2**30  # of a list of classes or labels

_DECIMAL = re.compile(r"\s*([+-]?[0-9]{1,18})\s*")
_JSON_FIELD = re.compile(r"((?:[^:;]*\.)?json):(.+)", re.IGNORECASE | re.DOTALL)
_LABELS_KEY, _IMAGES_KEY = "labels", "images"  # where the manifest says how they are stored


@dataclass(frozen=True)
class LabelFormat:
    """Format in which a dataset's images and labels are stored; extensions of members are in lower case."""

    images: tuple[str, ...] = IMAGE_EXTENSIONS
    is_chosen: bool = False  # the user named the images: of several in a sample the first counts
    labels: tuple[str, ...] = ("cls",)
    json_field: str = ""  # of the label's member; empty when its text is the label
    classes: tuple[str, ...] = ()  # names in label order; empty when not known

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of all members that are read."""
        return (*self.images, *self.labels)

    def to_manifest_values(self) -> dict[str, str | int | float | bool]:
        """Return what the manifest keeps of it."""
        member = ";".join(self.labels)
        images = {_IMAGES_KEY: ";".join(self.images)} if self.is_chosen else {}
        return {_LABELS_KEY: f"{member}:{self.json_field}" if self.json_field else member, **images}

    def build_reader(self, is_checked: bool = False) -> Callable[[bytes], int]:
        """Return a function from payload to label. It raises ValueError; with `is_checked` also for unknown classes."""
        numbers = map_names_to_labels(self.classes)
        end = len(self.classes) or MAX_CLASSES

        def read(payload: bytes) -> int:
            value = _read_json_field(payload, self.json_field) if self.json_field else _read_text(payload)
            label = numbers.get(normalize_name(value), None) if isinstance(value, str) else value
            if type(label) is not int or abs(label) >= 10**18:
                known = f" or one of the {len(numbers)} names of classes" if numbers else ""
                fix = "" if numbers else "; give the names with --classes if it is one"
                raise ValueError(f"its label must be a whole number{known}, got {str(value)[:40]!r}{fix}")
            if is_checked and not 0 <= label < end:
                raise ValueError(f"its label must be a class in 0 .. {end - 1}, got {label}")
            return label

        return read


def parse_flags(image_key: str, label_key: str, classes: tuple[str, ...] = ()) -> LabelFormat:
    """Return how labels are stored by the flags of `shards index`. Raises ValueError.

    A label key is a field of each sample's json ("label", "json:label", "meta.json:label"), or a member: one with
    several parts whose last one means a label ("output.cls"), one after a dot (".label"), or several ("cls;y.cls").
    """
    head, _, last = label_key.rpartition(".")
    member, field = "cls", ""
    if match := _JSON_FIELD.fullmatch(label_key):
        member, field = match[1], match[2]
    elif ";" in label_key or label_key.startswith(".") or (head and last.lower() in LABEL_ENDINGS):
        member = label_key
    elif label_key:
        member, field = "json", label_key
    images = _parse_extensions(image_key, "image_key") if image_key else IMAGE_EXTENSIONS
    labels = _parse_extensions(member, "label_key")
    if both := set(labels) & set(images):
        raise ValueError(f"label_key: {min(both)!r} must not be an image, too; set --image-key and --label-key apart")
    return LabelFormat(images, bool(image_key), labels, field, classes)


def parse_manifest_values(made: Mapping[str, object], classes: tuple[str, ...] = ()) -> LabelFormat:
    """Return how a packed or indexed dataset stores its labels. Raises DataError when `made` does not say it."""
    image_key, label_key = str(made.get(_IMAGES_KEY, "")), str(made.get(_LABELS_KEY, "cls"))
    try:
        return parse_flags(image_key, label_key if ":" in label_key else f".{label_key}", classes)
    except ValueError as error:
        raise DataError(f"made: {error}; index the dataset again") from None


def _parse_extensions(key: str, field: str) -> tuple[str, ...]:
    """Return the extensions of "jpg;input.jpg" in lower case. Raises ValueError for one that no member can have."""
    extensions = tuple(part.strip().removeprefix(".").lower() for part in key.split(";"))
    odd = any(not extension or "/" in extension or extension.startswith(".") for extension in extensions)
    if odd or len(set(extensions)) < len(extensions):
        raise ValueError(f"{field}: must be extensions such as 'jpg' or 'input.jpg;jpg', each once, got {key!r}")
    return extensions


def _read_text(payload: bytes) -> str | int:
    text = payload[: MAX_NAME_BYTES + 1].decode("utf-8-sig", "replace")  # no name has so many bytes
    match = _DECIMAL.fullmatch(text[:64])
    return int(match[1]) if match and len(payload) <= 64 else text


def _read_json_field(payload: bytes, field: str) -> object:
    try:
        values = parse_json(payload)
    except ValueError:
        raise ValueError(f"its json is damaged: {payload[:20]!r}") from None
    if not isinstance(values, dict) or field not in values:
        there = ", ".join(map(repr, list(values)[:10])) if isinstance(values, dict) else "no fields"
        raise ValueError(f"its json has no field {field!r}; it has {there}")
    return values[field]


# ------------------------------------------------------------------ members that are neither image nor label
def describe_others(kinds: Mapping[str, int], labels: LabelFormat) -> str:
    """Say which members of samples without image and label there are, by extension, and how to take them."""
    listed = sorted(kinds, key=lambda kind: (-kinds[kind], kind))[:MAX_LISTED_KINDS]
    named = ", ".join(f".{make_printable(kind)} ({kinds[kind]})" for kind in listed) or "none"
    taken = ", ".join(f".{make_printable(extension)}" for extension in labels.extensions)
    return (
        f"members of samples that have none of {taken}: {named}; a key ends at the first dot of a name; name image and "
        "label with --image-key and --label-key, several as in 'jpg;input.jpg', or a field of the json"
    )


def has_images(kinds: Iterable[str]) -> bool:
    """Return whether extensions look like those of images; a sample without one, such as a README, is no loss."""
    return any(kind.rpartition(".")[2] in IMAGE_EXTENSIONS for kind in kinds)


# ------------------------------------------------------------------ names of classes
def map_names_to_labels(classes: Sequence[str]) -> dict[str, int]:
    """Return the number of each class by its name, whole and in NFC."""
    return {normalize_name(name): number for number, name in enumerate(classes)}


def normalize_name(text: str) -> str:
    """Return a name with composed accents, by which names are compared: macOS stores them decomposed."""
    return unicodedata.normalize("NFC", text.strip())


def read_classes(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return class names in label order, and a readable name of each (empty when the file has none).

    The file holds a name per line, or a JSON list of names or of [name, readable name], or a JSON object from label to
    such (the usual imagenet_class_index.json). Raises DataError naming the file.
    """
    label = f"classes: {redaction.redact(url)}"
    text = read_text(url, label)
    try:
        entries: Any = [line.strip() for line in text.rstrip().splitlines()]
        if text.lstrip().startswith(("[", "{")):
            entries = parse_json(text)
        if isinstance(entries, dict):
            entries = [entries[str(number)] for number in range(len(entries))]
        paired = bool(entries) and isinstance(entries[0], list)
        names, titles = zip(*entries, strict=True) if paired else (tuple(entries), ())
        check_names(names)
        for title in titles:
            _check_text(title)
    except KeyError as error:
        raise DataError(f"{label}: damaged: keys must be 0, 1, 2 ..., lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{label}: damaged: {error}") from None
    if len(names) < 2:
        raise DataError(f"{label}: {len(names)} classes; at least 2 are needed")
    return names, titles


def read_text(url: str, label: str) -> str:
    """Return the text of a UTF-8 file. Raises DataError, which begins with `label`, when it is none or missing."""
    try:
        return read_bounded(url, label, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fix = "convert it, for example with iconv -f latin1 -t utf8"
        raise DataError(f"{label}: no text in UTF-8: byte {error.start} cannot be decoded; {fix}") from None


def read_bounded(url: str, label: str, limit: int) -> bytes:
    """Return the bytes of a file. Raises DataError, which begins with `label`, for over `limit` bytes and no file."""
    try:
        if (size := file_io.get_size(url)) > limit:
            raise DataError(f"{label}: must have at most {limit} bytes, got {size}")
        return file_io.read_bytes(url)
    except FileNotFoundError:
        raise DataError(f"{label}: missing") from None


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that cannot be kept or shown as it is, or for two that mean the same."""
    seen: dict[str, str] = {}
    for name in names:
        _check_text(name)
        if (key := normalize_name(name)) in seen:
            raise ValueError(f"class {name!a} is listed twice, also as {seen[key]!a}; list it once")
        seen[key] = name


def _check_text(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"every class must have a name, got {name!r}")
    categories = set(map(unicodedata.category, name))
    if "Cs" in categories:
        raise ValueError(f"class {name!r} must be text in UTF-8; rename it, for example with convmv -f latin1 -t utf8")
    if categories & {"Cc", "Zl", "Zp"}:
        raise ValueError(f"class {name!r} must not hold control characters; rename it")
