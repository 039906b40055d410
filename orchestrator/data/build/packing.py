"""Packing as a whole: a plan that is kept, shards that are packed in any order, a report and a manifest at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from orchestrator.config import redaction
from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.fingerprint import compute_fingerprint
from orchestrator.config.json_text import parse_object
from orchestrator.config.redaction import make_printable
from orchestrator.data import manifest, rng
from orchestrator.data.build import shard_packer
from orchestrator.data.build.config import ManifestValues, PackConfig
from orchestrator.data.build.shard_packer import (
    PACKING_FOLDER,
    ImageReader,
    LeftOutImage,
    PackedShard,
    ReencodeOptions,
    ShardTask,
)
from orchestrator.data.build.sources import source_registry
from orchestrator.data.build.sources.listing import SplitListing
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms.decode import BACKGROUND_NAME
from orchestrator.data.transforms.image_format import (
    DECODABLE_FORMATS,
    FORMAT_NAMES,
    UNSUPPORTED_EXTENSIONS,
    UNSUPPORTED_FORMATS,
)
from orchestrator.storage import file_io, urls
from orchestrator.storage.ranged_reads import RangeReader

# Images by which the size of reduced ones is estimated.
ESTIMATE_IMAGES = 256


@dataclass(frozen=True)
class Packing:
    """A packing under way; `done` has the entries of an earlier start."""

    config: PackConfig
    plan: PackingPlan
    roots: dict[str, str]  # by split; held-out images lie in that of train
    finished: dict[ShardId, PackedShard]

    def list_unfinished(self) -> list[ShardId]:
        """The shards that are still to be packed."""
        return [shard for shard in self.plan.shards() if shard not in self.finished]

    def make_task(self, shard: ShardId, threads: int) -> ShardTask:
        """The task of one shard."""
        split, number = shard
        layout = self.config.layout
        return ShardTask(
            url=self.config.url,
            plan=self.plan.digest,
            split=split,
            number=number,
            root=self.roots.get(split, self.roots["train"]),
            is_tar=self.plan.splits[split].is_tar,
            treatment=ReencodeOptions(resize=layout.resize, quality=layout.quality, decode=layout.decode),
            threads=threads,
        )


def start_packing(config: PackConfig, say: Callable[[str], None]) -> Packing | Manifest:
    """The packing that a resolved command asks for, planned anew or gone on with; the manifest when all is done.

    Raises DataError for a source that is unfit, and when another dataset or packing is at the URL.
    """
    url, shown = config.url, redaction.redact(config.url)
    if file_io.exists(file_io.join(url, manifest.FILE_NAME)):
        return _check_existing(config, manifest.load(url, allow_elsewhere=True, field="url"), say)
    plan, places = load_plan(url), _find_roots(config)
    if plan is not None:
        check_same_command(plan, config)
        packing = Packing(config, plan, places, load_finished_shards(url, plan))
        total = len(plan.shards())
        say(f"going on with the packing in {shown}: {len(packing.finished)} of {total} shards are there")
        return packing
    plan = save_plan(config, *plan_packing(config, places, say))
    return Packing(config, plan, places, {})


def preview_plan(config: PackConfig, say: Callable[[str], None]) -> PackingPlan:
    """The plan of a resolved command; nothing is written. Raises what `begin` raises."""
    if (plan := load_plan(config.url)) is None:
        return plan_packing(config, _find_roots(config), say)[0]
    check_same_command(plan, config)
    return plan


def plan_packing(
    config: PackConfig, places: dict[str, str], say: Callable[[str], None]
) -> tuple[PackingPlan, PlannedRows]:
    """The plan, and for each split its listing and the rows of each shard. Raises DataError for an unfit source."""
    say(f"listing {', '.join(sorted({redaction.redact(place) for place in places.values()}))}")
    found = source_registry.list_images(config.source, places)
    ratio = _estimate_size_ratio(config, found.splits["train"])
    layout = config.layout
    rows = {
        name: (split, assign_shards(split, layout.seed, name, layout.shard_mib * 2**20, layout.min_shards, ratio))
        for name, split in found.splits.items()
    }
    plan = PackingPlan(
        identity=config.describe_identity(),
        name=config.name,
        classes=found.classes,
        titles=found.titles,
        made={**config.to_manifest_values(), "listing": found.digest()},
        ignored=dict(found.ignored),
        splits={
            name: SplitPlan(
                is_tar=split.is_tar,
                bytes=int(split.lengths.sum()),
                shards=tuple(map(len, shards)),
                per_class=tuple(np.bincount(split.labels, minlength=len(found.classes)).tolist()),
            )
            for name, (split, shards) in rows.items()
        },
    )
    return plan, rows


def finish_packing(packing: Packing, entries: dict[ShardId, PackedShard]) -> Manifest:
    """Write report and manifest when every shard has its entry; nothing else of the packing stays.

    Raises DataError when a split is left without images.
    """
    url, plan = packing.config.url, packing.plan
    for (name, number), entry in entries.items():
        if entry.images != plan.splits[name].shards[number]:
            raise DataError(
                f"{redaction.redact(url)}: shard {number} of {name} was made of {entry.images} images, the plan has "
                f"{plan.splits[name].shards[number]}: another packing was here; remove {PACKING_FOLDER} and start anew"
            )
    listed = {
        name: tuple(shard for n in range(len(split.shards)) if (shard := entries[name, n].shard) is not None)
        for name, split in plan.splits.items()
    }
    for name, shards in listed.items():
        if not shards:
            raise DataError(f"{redaction.redact(url)}: no image of the {name} split can be decoded")
    transparent = any("transparent" in entry.oddities for entry in entries.values())
    how = {**plan.made, **({manifest.BACKGROUND_KEY: BACKGROUND_NAME} if transparent else {})}
    made = Manifest(name=plan.name, classes=plan.classes, titles=plan.titles, made=how, splits=listed)
    file_io.write_bytes(file_io.join(url, REPORT_NAME), encode_report(plan, entries))
    _remove_leftovers(url, plan)
    manifest.save(url, made)
    file_io.remove(file_io.join(url, PACKING_FOLDER))
    return made


def _find_roots(config: PackConfig) -> dict[str, str]:
    """Where the images of each split lie. Raises DataError when the dataset would lie among them."""
    places = source_registry.find_roots(config.source)
    for place in places.values():
        if f"{config.url}/".startswith(place.rstrip("/") + "/"):
            raise DataError(
                f"url: {redaction.redact(config.url)} is refused: it lies in {redaction.redact(place)}, "
                "which is to be packed"
            )
    return places


def _estimate_size_ratio(config: PackConfig, split: SplitListing) -> float:
    """Bytes to be stored for a byte of the source, by a sample of the images."""
    layout = config.layout
    if not layout.resize:
        return 1.0
    chosen = rng.permutation(rng.derive_key(layout.seed, "pack-estimate"), len(split))[:ESTIMATE_IMAGES]
    treatment = ReencodeOptions(resize=layout.resize, quality=layout.quality, decode=False)
    before = after = 0
    with closing(RangeReader(IO_THREADS)) as ranges:
        reader = ImageReader(ranges, split.root, split.is_tar, treatment)
        for row, packed in shard_packer.map_in_order(reader.read_packed, split.iter_rows(chosen), IO_THREADS):
            if not packed.finding.defect:
                before, after = before + row.length, after + len(packed.image)
    return after / before if before else 1.0


def _check_existing(config: PackConfig, found: Manifest, say: Callable[[str], None]) -> Manifest:
    """The manifest that is there already. Raises DataError when it is not that of this command."""
    shown = redaction.redact(config.url)
    fix = "take another --url, or remove what is there"
    wanted: dict[str, object] = {"name": config.name, **config.to_manifest_values()}
    has: dict[str, object] = {"name": found.name, **found.made}
    for name in (name for name in wanted if wanted[name] != has.get(name)):
        raise DataError(
            f"url: {shown}: the dataset {found.name!r} is there, packed with {name} {has.get(name)!r}; this command "
            f"has {wanted[name]!r}: {fix}"
        )
    plan = load_plan(config.url)
    if plan is None or plan.made.get("listing") != found.made.get("listing"):
        places = _find_roots(config)
        say(f"a dataset is there; listing {redaction.redact(places['train'])} to compare")
        if source_registry.list_images(config.source, places).digest() != found.made.get("listing"):
            raise DataError(f"url: {shown}: the dataset {found.name!r} is there, packed from other images: {fix}")
    file_io.remove(file_io.join(config.url, PACKING_FOLDER))
    return found


def _remove_leftovers(url: str, plan: PackingPlan) -> None:
    """Remove the unfinished temporary files that killed processes left in a local dataset."""
    if not urls.is_local(url):
        return
    for name in plan.splits:
        for path in Path(urls.to_local_path(file_io.join(url, name))).glob(f"{file_io.TEMP_PREFIX}*"):
            path.unlink()


# Beside its image a sample takes two headers, the label and, on average, half a record of filling.
SAMPLE_OVERHEAD_BYTES = 512 * 3 + 256

RowNumbers = NDArray[np.int64]


def order_rows(labels: NDArray[np.int64], seed: int, split: str) -> NDArray[np.int64]:
    """The N rows in the order that is cut into shards: shuffled, and every class spread evenly."""
    sizes = np.bincount(labels)
    draws = rng.permutation(rng.derive_key(seed, f"pack-{split}"), len(labels))
    by_class = draws[np.argsort(labels[draws], kind="stable")]
    own = labels[by_class]
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[own]
    # One phase for a class, not for an image: distances are then equal.
    phase = rng.uniform(rng.derive_key(seed, f"pack-phase-{split}"), np.arange(len(sizes)), 1)[:, 0]
    position = (rank + phase[own]) / sizes[own]
    # Ties, such as those of classes of one image, go by the shuffle.
    ties = np.empty(len(labels), dtype=np.int64)
    ties[draws] = np.arange(len(labels))
    return by_class[np.lexsort((ties[by_class], position))]


def assign_shards(
    listing: SplitListing, seed: int, split: str, shard_bytes: float, min_shards: int, ratio: float = 1.0
) -> list[NDArray[np.int64]]:
    """The rows of each shard, shuffled; shards differ in bytes by about an image.

    ratio: bytes to be stored for a byte of the source.
    """
    rows = order_rows(listing.labels, seed, split)
    ends = np.cumsum(listing.lengths[rows] * ratio + SAMPLE_OVERHEAD_BYTES)
    count = min(len(rows), max(min_shards, int(np.ceil(ends[-1] / shard_bytes))))
    middles = ends - np.diff(ends, prepend=0.0) / 2
    bins = np.minimum((middles * (count / ends[-1])).astype(np.int64), count - 1)
    # An image larger than a shard leaves the next one empty.
    cuts = np.flatnonzero(np.diff(bins)) + 1
    parts = np.split(rows, cuts)
    return [
        part[rng.permutation(rng.derive_key(seed, f"pack-shard-{split}", number), len(part))]
        for number, part in enumerate(parts)
    ]


REPORT_NAME = "report.json"
# So many may be broken in a small dataset, too.
MIN_BAD_LIMIT = 10
MAX_LISTED_IMAGES = 10

ODDITY_MEANINGS: dict[str, str] = {
    "cmyk": "CMYK JPEG, decoded to RGB",
    "ycck": "YCCK JPEG, decoded to RGB",
    "grey": "greyscale, spread over three channels",
    "progressive": "progressive JPEG",
    "transparent": f"transparent, laid on {BACKGROUND_NAME}",
    **{kind: f"{FORMAT_NAMES[kind]}, stored as PNG" for kind in DECODABLE_FORMATS[2:]},
    "png-named-jpeg": "PNG with the name of a JPEG, stored as .png",
    "jpeg-named-png": "JPEG with the name of a PNG, stored as .jpg",
    "exif-broken": "EXIF data that cannot be read, ignored",
    "exif-rotated": "EXIF orientation, ignored",
    "empty": "0 bytes: left out",
    "no-image": "no image: left out",
    "too-large": "too many pixels, bytes or scans, or too long a strip: left out",
    "undecodable": "cannot be decoded: left out",
    **{kind: f"{FORMAT_NAMES[kind]}: left out; convert to JPEG or PNG first" for kind in UNSUPPORTED_FORMATS},
}


def list_left_out(entries: Mapping[ShardId, PackedShard]) -> list[LeftOutImage]:
    """Broken images, in the order of the shards."""
    return [bad for _, entry in sorted(entries.items()) for bad in entry.left_out]


def describe_left_out(plan: PackingPlan, entries: Mapping[ShardId, PackedShard]) -> str:
    """Return how many pictures of which formats are not in the dataset, and what to do; empty when all are.

    Files that are passed over by their names count where a format has such names.
    """
    kinds = Counter(bad.defect for bad in list_left_out(entries))
    for extension, count in plan.ignored.items():
        if extension in UNSUPPORTED_EXTENSIONS:
            kinds[UNSUPPORTED_EXTENSIONS[extension]] += count
    if not kinds:
        return ""
    fix = "; convert them to JPEG or PNG first" if any(kind in UNSUPPORTED_FORMATS for kind in kinds) else ""
    return f"{kinds.total()} left out: {_format_counts(kinds)}{fix}"


def _format_counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {FORMAT_NAMES.get(kind, kind)}" for kind, count in kinds.most_common())


def check_bad_limit(plan: PackingPlan, entries: Mapping[ShardId, PackedShard], max_bad: float) -> str | None:
    """None, or what to say when more images are broken than may be."""
    bad = list_left_out(entries)
    allowed = max(MIN_BAD_LIMIT, int(max_bad * plan.samples))
    if len(bad) <= allowed:
        return None
    seen = sum(entry.images for entry in entries.values())
    counted = _format_counts(Counter(image.defect for image in bad))
    listed = "; ".join(f"{one.key} ({one.source}): {one.reason}" for one in bad[:MAX_LISTED_IMAGES])
    more = f"; and {len(bad) - MAX_LISTED_IMAGES} more" if len(bad) > MAX_LISTED_IMAGES else ""
    return (
        f"max_bad: {len(bad)} of the first {seen} images are broken, of {plan.samples} at most {allowed} may be: mend "
        f"the source, or give a larger --max-bad. Broken ({counted}): {listed}{more}"
    )


def encode_report(plan: PackingPlan, entries: Mapping[ShardId, PackedShard]) -> bytes:
    """Return the report as a JSON file, the same bytes for the same content."""
    report = {
        "name": plan.name,
        "made": plan.made,
        "classes": len(plan.classes),
        "ignored_files": plan.ignored,
        "splits": {name: _build_split_report(plan, name, entries) for name in plan.splits},
    }
    return (json.dumps(report, indent=1, sort_keys=True) + "\n").encode()


def build_report_table(plan: PackingPlan, entries: Mapping[ShardId, PackedShard]) -> Table:
    """The report for people: a row for each thing that was met."""
    found = {name: _build_split_report(plan, name, entries) for name in plan.splits}
    shown = Table("", *found, title=Text(f"{make_printable(plan.name)}: {len(plan.classes)} classes", style="italic"))
    for title, name in (("shards", "shards"), ("images", "images"), ("MiB", "bytes"), ("reduced in size", "resized")):
        values = [split[name] / 2**20 if name == "bytes" else split[name] for split in found.values()]
        shown.add_row(title, *(f"{value:,.0f}" for value in values))
    spans = (f"{split['fewest_of_a_class']:,} to {split['most_of_a_class']:,}" for split in found.values())
    shown.add_row("images of a class", *spans)
    shown.add_row("classes without images", *(f"{len(split['classes_without_images']):,}" for split in found.values()))
    for kind, meaning in ODDITY_MEANINGS.items():
        counts = [split["met"].get(kind, 0) for split in found.values()]
        if any(counts):
            shown.add_row(meaning, *(f"{count:,}" for count in counts))
    for extension, count in plan.ignored.items():
        what = extension if " " in extension else f"other files, {extension or 'without extension'}"
        shown.add_row(Text(make_printable(what)), f"{count:,}")
    return shown


def _build_split_report(plan: PackingPlan, name: str, entries: Mapping[ShardId, PackedShard]) -> dict[str, Any]:
    own = {shard: entry for shard, entry in entries.items() if shard[0] == name}
    shards = [entry.shard for entry in own.values() if entry.shard is not None]
    bad = list_left_out(own)
    met: Counter[str] = Counter(one.defect for one in bad)
    for entry in own.values():
        met.update(entry.oddities)
    lost = Counter(one.label for one in bad)
    per_class = [count - lost[label] for label, count in enumerate(plan.splits[name].per_class)]
    return {
        "shards": len(shards),
        "images": sum(shard.samples for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "resized": sum(entry.resized for entry in own.values()),
        "met": dict(met),
        "fewest_of_a_class": min(per_class),
        "most_of_a_class": max(per_class),
        "classes_without_images": [plan.classes[label] for label, count in enumerate(per_class) if not count],
        "left_out": [
            {"key": one.key, "source": one.source, "class": plan.classes[one.label], "defect": one.defect,
             "reason": one.reason} for one in bad
        ],
    }  # fmt: skip


PLAN_VERSION = 1
# Small objects are written and read side by side: a store answers each in its own time.
IO_THREADS = 16

ShardId = tuple[str, int]  # split and number
# By split: its listing, and the rows of each shard.
PlannedRows = dict[str, tuple[SplitListing, list[RowNumbers]]]


class SplitPlan(Config):
    """A split of a plan."""

    is_tar: bool
    bytes: int
    shards: tuple[int, ...]  # images of each
    per_class: tuple[int, ...]  # images of each

    @property
    def samples(self) -> int:
        """Images, before broken ones are left out."""
        return sum(self.shards)


class PackingPlan(Config):
    """What is packed and how."""

    version: int = PLAN_VERSION
    identity: dict[str, str]
    name: str
    classes: tuple[str, ...]
    titles: tuple[str, ...]
    made: ManifestValues
    ignored: dict[str, int]
    splits: dict[str, SplitPlan]

    @property
    def samples(self) -> int:
        """Images of all splits."""
        return sum(split.samples for split in self.splits.values())

    @cached_property
    def digest(self) -> str:
        """Short hash of all of it, which names the folder of its rows."""
        return compute_fingerprint(self, length=16)

    def shards(self) -> list[ShardId]:
        """Every shard, split by split."""
        return [(name, number) for name, split in self.splits.items() for number in range(len(split.shards))]


def load_plan(url: str) -> PackingPlan | None:
    """The plan of the unfinished packing at `url`, None when there is none. Raises DataError when it is damaged."""
    where = file_io.join(url, PACKING_FOLDER, "plan.json")
    try:
        plan = PackingPlan.from_dict(parse_object(file_io.read_bytes(where)))
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError) as error:
        raise DataError(
            f"{redaction.redact(where)}: damaged, or of another version: {error}; remove {PACKING_FOLDER} "
            "and start anew"
        ) from None
    return plan


def save_plan(config: PackConfig, plan: PackingPlan, rows: PlannedRows) -> PackingPlan:
    """Write rows and plan; the plan of who was first, when two start at the same time."""
    url, digest = config.url, plan.digest

    def kept(item: tuple[str, int, SplitListing, RowNumbers]) -> None:
        name, number, split, chosen = item
        shard_packer.write_rows(shard_packer.make_rows_url(url, digest, name, number), split.select_rows(chosen))

    parts = ((name, n, split, part) for name, (split, shards) in rows.items() for n, part in enumerate(shards))
    for _ in shard_packer.map_in_order(kept, parts, IO_THREADS):
        pass
    if file_io.create_bytes(file_io.join(url, PACKING_FOLDER, "plan.json"), plan.to_json().encode()):
        return plan
    other = load_plan(url)
    if other is None:
        raise DataError(f"{redaction.redact(url)}: another packing began and ended meanwhile; look at what is there")
    check_same_command(other, config)
    return other


def check_same_command(plan: PackingPlan, config: PackConfig) -> None:
    """Raise DataError when the plan is that of another command."""
    command = config.describe_identity()
    for name in (*command, *plan.identity):
        theirs, ours = plan.identity.get(name, ""), command.get(name, "")
        if theirs != ours:
            raise DataError(
                f"url: {redaction.redact(config.url)}: an unfinished packing with {name} {theirs!r} is there, this "
                f"command has {ours!r}; give the same to resume it, take another --url, or remove {PACKING_FOLDER}"
            )


def load_finished_shards(url: str, plan: PackingPlan) -> dict[ShardId, PackedShard]:
    """Entries of the shards whose tar is there in full."""
    there = set(file_io.list_names(file_io.join(url, PACKING_FOLDER, "done")))
    shards = [shard for shard in plan.shards() if urls.get_basename(shard_packer.make_entry_url(url, *shard)) in there]
    sizes = {name: file_io.list_sizes(file_io.join(url, name)) for name in plan.splits}
    with ThreadPoolExecutor(IO_THREADS) as pool:
        read = pool.map(lambda shard: shard_packer.read_entry(shard_packer.make_entry_url(url, *shard)), shards)
        found = dict(zip(shards, read, strict=True))
    return {
        (name, number): entry
        for (name, number), entry in found.items()
        if entry.shard is None or sizes[name].get(urls.get_basename(entry.shard.name)) == entry.shard.bytes
    }
