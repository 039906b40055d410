"""Which members of a sample are image and label, how a label is stored, and lists of class names.

A member KEY.EXTENSION belongs to the sample KEY. As in WebDataset, the extension begins at the first dot of the name,
so it may have several parts (`input.jpg`), and a key never has a dot: `zoom1.5x.jpg` is the member `5x.jpg` of `zoom1`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from orchestrator.config import redaction
from orchestrator.config.base import Config
from orchestrator.config.json_text import parse_json
from orchestrator.config.redaction import make_printable
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
# Extensions whose last part means a label; WebDataset decodes those but text as whole numbers.
LABEL_ENDINGS = ("cls", "cls2", "class", "count", "index", "inx", "id", "label", "txt", "text")
# Of the members that are passed over, as many kinds are named.
MAX_LISTED_KINDS = 6
# More than any dataset has; a hash taken for a label would otherwise make as many classes.
MAX_CLASSES = 1_000_000
# No name of a class is longer.
MAX_NAME_BYTES = 1024
# No list of classes or labels is longer.
MAX_TEXT_BYTES = 2**30

# Kept of a sample that is passed over.
_MAX_KEPT_MEMBERS = 8
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
    titles: tuple[str, ...] = ()  # readable names, which a label may be, too

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of all members that are read."""
        return (*self.images, *self.labels)

    def to_manifest_values(self) -> dict[str, str | int | float | bool]:
        """Return what the manifest keeps of it."""
        member = ";".join(self.labels)
        images = {_IMAGES_KEY: ";".join(self.images)} if self.is_chosen else {}
        return {_LABELS_KEY: f"{member}:{self.json_field}" if self.json_field else member, **images}

    def build_reader(self, is_checked: bool = False) -> Callable[[memoryview], int]:
        """Return a function from a member's payload to its label. It raises ValueError with the reason.

        is_checked: whether it also raises for a label outside the classes.
        """
        numbers = map_names_to_labels(self.classes, self.titles)
        end = len(self.classes) or MAX_CLASSES

        def read(payload: memoryview) -> int:
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


def parse_flags(
    image_key: str, label_key: str, classes: tuple[str, ...] = (), titles: tuple[str, ...] = ()
) -> LabelFormat:
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
    return LabelFormat(images, bool(image_key), labels, field, classes, titles)


def parse_manifest_values(
    made: Mapping[str, object], classes: tuple[str, ...] = (), titles: tuple[str, ...] = ()
) -> LabelFormat:
    """Return how a packed or indexed dataset stores its labels. Raises DataError when `made` does not say it."""
    member, _, field = str(made.get(_LABELS_KEY, "cls")).partition(":")
    image_key = str(made.get(_IMAGES_KEY, ""))
    try:
        images = _parse_extensions(image_key, _IMAGES_KEY) if image_key else IMAGE_EXTENSIONS
        labels = _parse_extensions(member, _LABELS_KEY)
    except ValueError as error:
        raise DataError(f"made: {error}; index the dataset again") from None
    return LabelFormat(images, bool(image_key), labels, field, classes, titles)


def _parse_extensions(key: str, field: str) -> tuple[str, ...]:
    """Return the extensions of "jpg;input.jpg" in lower case. Raises ValueError for one that no member can have."""
    extensions = tuple(part.strip().removeprefix(".").lower() for part in key.split(";"))
    if any(not extension or "/" in extension or extension.startswith(".") for extension in extensions):
        raise ValueError(f"{field}: must be extensions of members such as 'jpg' or 'input.jpg;jpg', got {key!r}")
    if len(set(extensions)) < len(extensions):
        raise ValueError(f"{field}: must name each extension once, got {key!r}")
    return extensions


def _read_text(payload: memoryview) -> str | int:
    text = bytes(payload).decode("utf-8-sig", "replace") if len(payload) <= MAX_NAME_BYTES else ""
    match = _DECIMAL.fullmatch(text[:64])
    return int(match[1]) if match and len(payload) <= 64 else text


def _read_json_field(payload: memoryview, field: str) -> object:
    try:
        values = parse_json(bytes(payload))
    except ValueError:
        raise ValueError(f"its json is damaged: {bytes(payload[:20])!r}") from None
    if not isinstance(values, dict) or field not in values:
        there = ", ".join(map(repr, list(values)[:10])) if isinstance(values, dict) else "no fields"
        raise ValueError(f"its json has no field {field!r}; it has {there}")
    return values[field]


# ------------------------------------------------------------------ members that are neither image nor label
class SkippedSamples(Config):
    """The samples of a tar that have neither image nor label."""

    samples: int = 0
    first: str = Field("", description="key of one of them")
    kinds: dict[str, int] = Field({}, description="their members by extension")

    def merge(self, other: SkippedSamples) -> SkippedSamples:
        """Return those of two tars together."""
        kinds = dict(Counter(self.kinds) + Counter(other.kinds))
        return SkippedSamples(samples=self.samples + other.samples, first=self.first or other.first, kinds=kinds)

    @property
    def has_images(self) -> bool:
        """True when members look like images; a sample without one, such as a README, is no loss."""
        return bool(_select_endings(self.kinds, IMAGE_EXTENSIONS))

    def describe(self, labels: LabelFormat, taken: int) -> str:
        """Say which samples beside the `taken` ones are left out and why."""
        lacking = ", ".join(f".{make_printable(extension)}" for extension in labels.extensions)
        return (
            f"{self.samples} of {taken + self.samples} samples have none of the members {lacking}, such as "
            f"'{make_printable(self.first)}': their members are {_format_kinds(self.kinds)}; a key ends at the first "
            "dot of a name, as in WebDataset"
        )


class OtherMembers:
    """The members of a tar that are neither image nor label, by sample."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}
        self.members: Counter[str] = Counter()

    def add(self, key: str, extension: str) -> None:
        """Count one of them."""
        self.members[extension] += 1
        kinds = self._kinds.setdefault(key, [])
        if len(kinds) < _MAX_KEPT_MEMBERS:
            kinds.append(extension)

    def find_skipped(self, taken: Container[str]) -> SkippedSamples:
        """Return the samples that are not among `taken`."""
        skipped = {key: kinds for key, kinds in self._kinds.items() if key not in taken}
        kinds = Counter(kind for extensions in skipped.values() for kind in extensions)
        return SkippedSamples(samples=len(skipped), first=min(skipped, default=""), kinds=dict(kinds))

    def describe(self) -> str:
        """Say what else is in the tar, and the flags that would take it; empty when there is nothing else."""
        if not self.members:
            return ""
        flags = suggest_flags(self.members)
        return f"; its other members are {_format_kinds(self.members)}" + (f": set {flags}" if flags else "")


def suggest_flags(kinds: Mapping[str, int], keeps_default: bool = False) -> str:
    """Return flags that take members of these kinds, beside `jpg` and `cls` or in their place."""
    images, labels = (_select_endings(kinds, endings) for endings in (IMAGE_EXTENSIONS, LABEL_ENDINGS))
    flags = []
    if images:
        flags.append(f"--image-key 'jpg;{images[0]}'" if keeps_default else f"--image-key {images[0]}")
    if labels:
        member = labels[0] if "." in labels[0] else f".{labels[0]}"
        flags.append(f"--label-key 'cls;{labels[0]}'" if keeps_default else f"--label-key {member}")
    elif any(kind.endswith("json") for kind in kinds):
        flags.append("--label-key FIELD (of the json)")
    return " ".join(flags)


def _format_kinds(kinds: Mapping[str, int]) -> str:
    listed = _sort_by_count(kinds)[:MAX_LISTED_KINDS]
    more = f" and {len(kinds) - len(listed)} kinds more" if len(kinds) > len(listed) else ""
    return ", ".join(f".{make_printable(kind)} ({kinds[kind]})" for kind in listed) + more


def _select_endings(kinds: Mapping[str, int], endings: Sequence[str]) -> list[str]:
    return [kind for kind in _sort_by_count(kinds) if kind.rpartition(".")[2] in endings]


def _sort_by_count(kinds: Mapping[str, int]) -> list[str]:
    return sorted(kinds, key=lambda kind: (-kinds[kind], kind))


# ------------------------------------------------------------------ names of classes
def map_names_to_labels(classes: Sequence[str], titles: Sequence[str] = ()) -> dict[str, int]:
    """Return the number of each class by its name, and by its title unless two have the same; whole, in NFC."""
    numbers = {normalize_name(name): number for number, name in enumerate(classes)}
    times = Counter(map(normalize_name, titles))
    for number, title in enumerate(map(normalize_name, titles)):
        if title and times[title] == 1:
            numbers.setdefault(title, number)
    return numbers


def normalize_name(text: str) -> str:
    """Return a name with composed accents, by which names are compared: macOS stores them decomposed."""
    return unicodedata.normalize("NFC", text.strip())


def read_classes(url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return class names in label order, and a readable name of each (empty when the file has none).

    The file holds a name per line, or a JSON list of names or of [name, readable name], or a JSON object from label to
    such (the usual imagenet_class_index.json). Raises DataError naming the file.
    """
    label = f"classes: {redaction.redact(url)}"
    entries = _parse_entries(read_text(url, label), label)
    rows = [entry if isinstance(entry, list) else [entry] for entry in entries]
    width = 2 if rows and all(len(row) == 2 for row in rows) else 1
    for number, row in enumerate(rows):
        if len(row) != width or not all(isinstance(word, str) and word for word in row):
            raise DataError(f"{label}: class {number} has no name: {row!r}")
    if len(rows) < 2:
        raise DataError(f"{label}: {len(rows)} classes; at least 2 are needed")
    names, *titles = zip(*rows, strict=True)
    try:
        check_names(names)
        for title in titles[0] if titles else ():
            _check_text(title)
    except ValueError as error:
        raise DataError(f"{label}: {error}") from None
    return tuple(names), tuple(titles[0]) if titles else ()


def _parse_entries(text: str, label: str) -> Sequence[object]:
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.rstrip().splitlines()]
    try:
        values = parse_json(text)
    except ValueError as error:
        raise DataError(f"{label}: damaged: {error}") from None
    if isinstance(values, list):
        return values
    keys = [str(number) for number in range(len(values))]
    if odd := sorted(values.keys() ^ set(keys)):
        raise DataError(f"{label}: its keys must be 0 .. {len(values) - 1}; {odd[0]!r} is one too many or few")
    return [values[key] for key in keys]


def read_text(url: str, label: str) -> str:
    """Return the text of a UTF-8 file. Raises DataError, which begins with `label`, when it is none or missing."""
    try:
        if (size := file_io.get_size(url)) > MAX_TEXT_BYTES:
            raise DataError(f"{label}: must have at most {MAX_TEXT_BYTES} bytes, got {size}")
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
        if (key := normalize_name(name)) in seen:
            raise ValueError(f"class {name!a} is listed twice, also as {seen[key]!a}; list it once")
        seen[key] = name


def _check_text(name: str) -> None:
    categories = set(map(unicodedata.category, name))
    if "Cs" in categories:
        raise ValueError(f"class {name!r} must be text in UTF-8; rename it, for example with convmv -f latin1 -t utf8")
    if categories & {"Cc", "Zl", "Zp"}:
        raise ValueError(f"class {name!r} must not hold control characters; rename it")
