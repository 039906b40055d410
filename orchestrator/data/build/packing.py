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
from orchestrator.data.build.shard_packer import PACKING_FOLDER, ImageReader, LeftOutImage, PackedShard, ShardTask
from orchestrator.data.build.sources import source_registry
from orchestrator.data.build.sources.listing import SourceListing, SplitListing
from orchestrator.data.build.sources.source_registry import ListedSource
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
# Beside its image a sample takes two headers, the label and, on average, half a record of filling.
SAMPLE_OVERHEAD_BYTES = 512 * 3 + 256
PLAN_VERSION = 1
# Small objects are written and read in parallel: a store answers each in its own time.
IO_THREADS = 16
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

ShardId = tuple[str, int]  # split and number
# By split: its listing, and the rows of each shard.
PlannedRows = dict[str, tuple[SplitListing, list[NDArray[np.int64]]]]


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
    """Plan of a packing: what is packed and how."""

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
        """Return every shard, split by split."""
        return [(name, number) for name, split in self.splits.items() for number in range(len(split.shards))]


@dataclass(frozen=True)
class Packing:
    """A packing under way; `finished` has the records of an earlier start."""

    config: PackConfig
    plan: PackingPlan
    roots: dict[str, str]  # by split; held-out images lie in that of train
    finished: dict[ShardId, PackedShard]

    def list_unfinished(self) -> list[ShardId]:
        """Return the shards that are still to be packed."""
        return [shard for shard in self.plan.shards() if shard not in self.finished]

    def make_task(self, shard: ShardId, threads: int) -> ShardTask:
        """Return the task of one shard."""
        split, number = shard
        return ShardTask(
            url=self.config.url,
            plan=self.plan.digest,
            split=split,
            number=number,
            root=self.roots.get(split, self.roots["train"]),
            is_tar=self.plan.splits[split].is_tar,
            layout=self.config.layout,
            threads=threads,
        )


# ------------------------------------------------------------------ start and end
def start_packing(config: PackConfig, say: Callable[[str], None]) -> Packing | Manifest:
    """Return the packing of a resolved command, planned or resumed; the manifest when all is done.

    Raises DataError for a source that is unfit, and when another dataset or packing is at the URL.
    """
    url, shown = config.url, redaction.redact(config.url)
    if file_io.exists(file_io.join(url, manifest.FILE_NAME)):
        return _check_existing(config, manifest.load(url, allow_elsewhere=True, field="url"), say)
    plan, roots = load_plan(url), _find_roots(config)
    if plan is None:
        return Packing(config, save_plan(config, *plan_packing(config, roots, say)), roots, {})
    check_same_command(plan, config)
    packing = Packing(config, plan, roots, load_finished_shards(url, plan))
    say(f"resuming the packing in {shown}: {len(packing.finished)} of {len(plan.shards())} shards are there")
    return packing


def preview_plan(config: PackConfig, say: Callable[[str], None]) -> PackingPlan:
    """Return the plan of a resolved command and write nothing. Raises what `start_packing` raises."""
    plan = load_plan(config.url)
    if plan is None:
        return plan_packing(config, _find_roots(config), say)[0]
    check_same_command(plan, config)
    return plan


def plan_packing(
    config: PackConfig, roots: dict[str, str], say: Callable[[str], None]
) -> tuple[PackingPlan, PlannedRows]:
    """Return the plan, and for each split its listing and the rows of each shard.

    Raises DataError for an unfit source.
    """
    say(f"listing {', '.join(sorted({redaction.redact(root) for root in roots.values()}))}")
    listing, layout = _list_images(config, roots), config.layout
    ratio = _estimate_size_ratio(config, listing.splits["train"])
    rows = {
        name: (split, assign_shards(split, layout.seed, name, layout.shard_mib * 2**20, layout.min_shards, ratio))
        for name, split in listing.splits.items()
    }
    plan = PackingPlan(
        identity=config.describe_identity(),
        name=config.name,
        classes=listing.classes,
        titles=listing.titles,
        made={**config.to_manifest_values(), "listing": listing.digest()},
        ignored=dict(listing.ignored),
        splits={
            name: SplitPlan(
                is_tar=split.is_tar,
                bytes=int(split.lengths.sum()),
                shards=tuple(map(len, shards)),
                per_class=tuple(np.bincount(split.labels, minlength=len(listing.classes)).tolist()),
            )
            for name, (split, shards) in rows.items()
        },
    )
    return plan, rows


def finish_packing(packing: Packing, entries: dict[ShardId, PackedShard]) -> Manifest:
    """Write report and manifest when every shard has its record; remove everything else of the packing.

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
    packed = Manifest(name=plan.name, classes=plan.classes, titles=plan.titles, made=how, splits=listed)
    file_io.write_bytes(file_io.join(url, REPORT_NAME), encode_report(plan, entries))
    if urls.is_local(url):  # unfinished temporary files that killed processes left
        for name in plan.splits:
            for path in Path(urls.to_local_path(file_io.join(url, name))).glob(f"{file_io.TEMP_PREFIX}*"):
                path.unlink()
    manifest.save(url, packed)
    file_io.remove(file_io.join(url, PACKING_FOLDER))
    return packed


def _create_source(config: PackConfig) -> ListedSource:
    source = source_registry.create_source(config.source)
    assert isinstance(source, ListedSource), "sources of samples are packed in one piece"
    return source


def _list_images(config: PackConfig, roots: Mapping[str, str]) -> SourceListing:
    return _create_source(config).list_images(roots)


def _find_roots(config: PackConfig) -> dict[str, str]:
    """Return where the images of each split lie. Raises DataError when the dataset would lie among them."""
    roots = _create_source(config).find_roots()
    for root in roots.values():
        if f"{config.url}/".startswith(root.rstrip("/") + "/"):
            raise DataError(
                f"url: {redaction.redact(config.url)} must not lie in {redaction.redact(root)}, which is to be packed; "
                "set another --url"
            )
    return roots


def _estimate_size_ratio(config: PackConfig, split: SplitListing) -> float:
    """Return bytes to be stored for a byte of the source, by a sample of the images."""
    layout = config.layout
    if not layout.resize:
        return 1.0
    chosen = rng.permutation(rng.derive_key(layout.seed, "pack-estimate"), len(split))[:ESTIMATE_IMAGES]
    before = after = 0
    with closing(RangeReader(IO_THREADS)) as ranges:
        reader = ImageReader(ranges, split.root, split.is_tar, layout.model_copy(update={"decode": False}))
        for row, packed in shard_packer.map_in_order(reader.read_packed, split.iter_rows(chosen), IO_THREADS):
            if not packed.finding.defect:
                before, after = before + row.length, after + len(packed.image)
    return after / before if before else 1.0


def _check_existing(config: PackConfig, existing: Manifest, say: Callable[[str], None]) -> Manifest:
    """Return the manifest that is there already. Raises DataError when it is not that of this command."""
    there = f"url: {redaction.redact(config.url)}: the dataset {existing.name!r} is there, packed"
    fix = "take another --url, or remove what is there"
    wanted: dict[str, object] = {"name": config.name, **config.to_manifest_values()}
    has: dict[str, object] = {"name": existing.name, **existing.made}
    for name in (name for name in wanted if wanted[name] != has.get(name)):
        raise DataError(f"{there} with {name} {has.get(name)!r}; this command has {wanted[name]!r}: {fix}")
    plan = load_plan(config.url)
    if plan is None or plan.made.get("listing") != existing.made.get("listing"):
        roots = _find_roots(config)
        say(f"a dataset is there; listing {redaction.redact(roots['train'])} to compare")
        if _list_images(config, roots).digest() != existing.made.get("listing"):
            raise DataError(f"{there} from other images: {fix}")
    file_io.remove(file_io.join(config.url, PACKING_FOLDER))
    return existing


# ------------------------------------------------------------------ rows of each shard
def order_rows(labels: NDArray[np.int64], seed: int, split: str) -> NDArray[np.int64]:
    """Return the N rows in the order that is cut into shards: shuffled, and every class spread evenly."""
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
    """Return the rows of each shard, shuffled; shards differ in bytes by about an image.

    ratio: bytes to be stored for a byte of the source.
    """
    rows = order_rows(listing.labels, seed, split)
    ends = np.cumsum(listing.lengths[rows] * ratio + SAMPLE_OVERHEAD_BYTES)
    count = min(len(rows), max(min_shards, int(np.ceil(ends[-1] / shard_bytes))))
    middles = ends - np.diff(ends, prepend=0.0) / 2
    bins = np.minimum((middles * (count / ends[-1])).astype(np.int64), count - 1)
    # An image larger than a shard leaves the next one empty.
    parts = np.split(rows, np.flatnonzero(np.diff(bins)) + 1)
    return [
        part[rng.permutation(rng.derive_key(seed, f"pack-shard-{split}", number), len(part))]
        for number, part in enumerate(parts)
    ]


# ------------------------------------------------------------------ plan and records of an unfinished packing
def load_plan(url: str) -> PackingPlan | None:
    """Return the plan of the unfinished packing at `url`, None when there is none. Raises DataError when damaged."""
    plan_url = file_io.join(url, PACKING_FOLDER, "plan.json")
    try:
        return PackingPlan.from_dict(parse_object(file_io.read_bytes(plan_url)))
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError) as error:
        raise DataError(
            f"{redaction.redact(plan_url)}: damaged, or of another version: {error}; remove {PACKING_FOLDER} and start "
            "anew"
        ) from None


def save_plan(config: PackConfig, plan: PackingPlan, rows: PlannedRows) -> PackingPlan:
    """Write rows and plan; return the plan that counts: the first, when two packers start at the same time."""
    url = config.url

    def write(item: tuple[str, int, SplitListing, NDArray[np.int64]]) -> None:
        name, number, split, chosen = item
        shard_packer.write_rows(shard_packer.make_rows_url(url, plan.digest, name, number), split.select_rows(chosen))

    parts = ((name, n, split, part) for name, (split, shards) in rows.items() for n, part in enumerate(shards))
    for _ in shard_packer.map_in_order(write, parts, IO_THREADS):
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
    """Return the records of the shards whose tar is there in full."""
    there = set(file_io.list_names(file_io.join(url, PACKING_FOLDER, "done")))
    entry_urls = {shard: shard_packer.make_entry_url(url, *shard) for shard in plan.shards()}
    entry_urls = {shard: entry_url for shard, entry_url in entry_urls.items() if urls.get_basename(entry_url) in there}
    sizes = {name: file_io.list_sizes(file_io.join(url, name)) for name in plan.splits}
    with ThreadPoolExecutor(IO_THREADS) as pool:
        entries = zip(entry_urls, pool.map(shard_packer.read_entry, entry_urls.values()), strict=True)
        return {
            (name, number): entry
            for (name, number), entry in entries
            if entry.shard is None or sizes[name].get(urls.get_basename(entry.shard.name)) == entry.shard.bytes
        }


# ------------------------------------------------------------------ report
def list_left_out(entries: Mapping[ShardId, PackedShard]) -> list[LeftOutImage]:
    """Return the broken images, in the order of the shards."""
    return [image for _, entry in sorted(entries.items()) for image in entry.left_out]


def describe_left_out(plan: PackingPlan, entries: Mapping[ShardId, PackedShard]) -> str:
    """Return how many pictures of which formats are not in the dataset, and what to do; empty when all are.

    Files that are passed over by their names count where a format has such names.
    """
    kinds = Counter(image.defect for image in list_left_out(entries))
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
    """Return what to say when more images are broken than may be, else None."""
    bad = list_left_out(entries)
    allowed = max(MIN_BAD_LIMIT, int(max_bad * plan.samples))
    if len(bad) <= allowed:
        return None
    seen = sum(entry.images for entry in entries.values())
    listed = "; ".join(f"{image.key} ({image.source}): {image.reason}" for image in bad[:MAX_LISTED_IMAGES])
    more = f"; and {len(bad) - MAX_LISTED_IMAGES} more" if len(bad) > MAX_LISTED_IMAGES else ""
    return (
        f"max_bad: {len(bad)} of the first {seen} images are broken, of {plan.samples} at most {allowed} may be: mend "
        f"the source, or set a larger --max-bad. Broken ({_format_counts(Counter(image.defect for image in bad))}): "
        f"{listed}{more}"
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
    """Return the report for people: a row for each oddity that occurs."""
    splits = {name: _build_split_report(plan, name, entries) for name in plan.splits}
    title = Text(f"{make_printable(plan.name)}: {len(plan.classes)} classes", style="italic")
    table = Table("", *splits, title=title)
    for title_of_row, name in (
        ("shards", "shards"),
        ("images", "images"),
        ("MiB", "bytes"),
        ("reduced in size", "resized"),
    ):
        values = [split[name] / 2**20 if name == "bytes" else split[name] for split in splits.values()]
        table.add_row(title_of_row, *(f"{value:,.0f}" for value in values))
    spans = (f"{split['fewest_of_a_class']:,} to {split['most_of_a_class']:,}" for split in splits.values())
    table.add_row("images of a class", *spans)
    table.add_row("classes without images", *(f"{len(split['classes_without_images']):,}" for split in splits.values()))
    for kind, meaning in ODDITY_MEANINGS.items():
        counts = [split["met"].get(kind, 0) for split in splits.values()]
        if any(counts):
            table.add_row(meaning, *(f"{count:,}" for count in counts))
    for extension, count in plan.ignored.items():
        what = extension if " " in extension else f"other files, {extension or 'without extension'}"
        table.add_row(Text(make_printable(what)), f"{count:,}")
    return table


def _build_split_report(plan: PackingPlan, name: str, entries: Mapping[ShardId, PackedShard]) -> dict[str, Any]:
    own = {shard: entry for shard, entry in entries.items() if shard[0] == name}
    shards = [entry.shard for entry in own.values() if entry.shard is not None]
    bad = list_left_out(own)
    met: Counter[str] = Counter(image.defect for image in bad)
    for entry in own.values():
        met.update(entry.oddities)
    lost = Counter(image.label for image in bad)
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
            {"key": image.key, "source": image.source, "class": plan.classes[image.label], "defect": image.defect,
             "reason": image.reason} for image in bad
        ],
    }  # fmt: skip
