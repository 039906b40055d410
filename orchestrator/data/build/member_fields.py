"""Members of a WebDataset sample: which one is its image, which its label, and the samples that have neither.

A member KEY.EXTENSION belongs to the sample KEY. As in WebDataset, the extension begins at the first dot of the name,
so it may have several parts (`input.jpg`), and a key never has a dot: `zoom1.5x.jpg` is the member `5x.jpg` of `zoom1`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence

from pydantic import Field

from orchestrator.config.base import Config
from orchestrator.config.redaction import make_printable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
# Extensions whose last part means a label; WebDataset decodes those but text as whole numbers.
LABEL_ENDINGS = ("cls", "cls2", "class", "count", "index", "inx", "id", "label", "txt", "text")
# Of the members that are passed over, as many kinds are named.
MAX_LISTED_KINDS = 6
# Kept of a sample that is passed over.
_MAX_KEPT_MEMBERS = 8


class MemberFields(Config):
    """The members that hold image and label, by extension in lower case."""

    images: tuple[str, ...] = IMAGE_EXTENSIONS
    labels: tuple[str, ...] = ("cls",)
    is_chosen: bool = Field(False, description="images were named by the user: of several in a sample the first counts")

    @property
    def extensions(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.images, *self.labels)


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
    def images(self) -> list[str]:
        """Extensions that look like those of images, the most frequent first."""
        return _select_endings(self.kinds, IMAGE_EXTENSIONS)

    def describe(self, fields: MemberFields, total: int) -> str:
        """Say which samples out of `total` are left out and why."""
        return (
            f"{self.samples} of {total} samples have no {describe_members(fields.images)} and no "
            f"{describe_members(fields.labels)}, such as '{make_printable(self.first)}': their members are "
            f"{format_kinds(self.kinds)}; a key ends at the first dot of a name, as in WebDataset"
        )

    def suggest_flags(self) -> str:
        """Return the flags to choose from for samples that have an image under another name."""
        image, prefix = self.images[0], self.images[0].rpartition(".")[0] + "."
        labels = _select_endings(self.kinds, LABEL_ENDINGS)
        fitting = sorted(labels, key=lambda label: not label.startswith(prefix))
        label_flag = f" --label-key 'cls;{fitting[0]}'" if fitting else ""
        return f"set --image-key 'jpg;{image}'{label_flag} to take them, --image-key jpg to leave them out"


NO_SKIPPED_SAMPLES = SkippedSamples()


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

    def suggest_flags(self) -> str:
        """Say what else is in the tar, and the flags that would take it; empty when there is nothing else."""
        if not self.members:
            return ""
        images = _select_endings(self.members, IMAGE_EXTENSIONS)
        labels = _select_endings(self.members, LABEL_ENDINGS)
        flags = [f"--image-key {images[0]}"] if images else []
        flags += [f"--label-key {labels[0] if '.' in labels[0] else '.' + labels[0]}"] if labels else []
        choices = [" ".join(flags)] if flags else []
        if any(kind.endswith("json") for kind in self.members):
            choices.append("--label-key FIELD for a field of the json")
        fix = f": set {' or '.join(choices)}" if choices else ""
        return f"; its other members are {format_kinds(self.members)}{fix}"


def parse_image_key(key: str) -> MemberFields:
    """Return the fields for `--image-key`: extensions, the preferred one first, separated by ";" as in WebDataset.

    Raises ValueError for one that no member can have.
    """
    return MemberFields(images=parse_extensions(key), is_chosen=True) if key else MemberFields()


def parse_extensions(key: str) -> tuple[str, ...]:
    """Return the extensions of "jpg;input.jpg" in lower case. Raises ValueError for one that no member can have."""
    extensions = tuple(part.strip().removeprefix(".").lower() for part in key.split(";"))
    if any(not extension or "/" in extension or extension.startswith(".") for extension in extensions):
        raise ValueError(f"must be extensions of members such as 'jpg' or 'input.jpg;jpg', got {key!r}")
    if len(set(extensions)) < len(extensions):
        raise ValueError(f"must name each extension once, got {key!r}")
    return extensions


def describe_members(extensions: Sequence[str]) -> str:
    """Return the members' names for people: "KEY.jpg or KEY.png"."""
    return "member " + " or ".join(f"KEY.{make_printable(extension)}" for extension in extensions)


def format_kinds(kinds: Mapping[str, int]) -> str:
    """Return extensions with their counts, the most frequent first."""
    shown = _sort_by_count(kinds)[:MAX_LISTED_KINDS]
    more = f" and {len(kinds) - len(shown)} kinds more" if len(kinds) > len(shown) else ""
    return ", ".join(f".{make_printable(kind)} ({kinds[kind]})" for kind in shown) + more


def _select_endings(kinds: Mapping[str, int], endings: Collection[str]) -> list[str]:
    return [kind for kind in _sort_by_count(kinds) if kind.rpartition(".")[2] in endings]


def _sort_by_count(kinds: Mapping[str, int]) -> list[str]:
    return sorted(kinds, key=lambda kind: (-kinds[kind], kind))
