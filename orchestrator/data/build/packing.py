"""Packing as a whole: a plan that is kept, shards that are packed in any order, a report and a manifest at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from orchestrator.config import redaction
from orchestrator.config.redaction import make_printable
from orchestrator.data import index, manifest, rng, shuffle_quality
from orchestrator.data.build import shard_packer
from orchestrator.data.build.config import PackConfig, ShardLayout
from orchestrator.data.build.packing_plan import (
    IO_THREADS,
    PackingPlan,
    PlannedRows,
    ShardId,
    SplitPlan,
    assign_shards,
    check_same_command,
    load_finished_shards,
    load_plan,
    save_plan,
)
from orchestrator.data.build.shard_packer import PACKING_FOLDER, ImageReader, LeftOutImage, PackedShard, ShardTask
from orchestrator.data.build.sources import digits, source_registry
from orchestrator.data.build.sources.config import DigitsSource
from orchestrator.data.build.sources.listing import SourceListing, SplitListing
from orchestrator.data.build.sources.source_registry import ListedSource, SampleSource
from orchestrator.data.build.tar_writer import RawSample, write_dataset
from orchestrator.data.config import OrderConfig
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


def pack_samples(config: PackConfig, say: Callable[[str], None]) -> Manifest | None:
    """Pack a source that yields samples, in this process; return the manifest, None after a dry run.

    Raises DataError for a sample that cannot be stored, and when another dataset or packing is at the URL.
    """
    url, fix = config.url, "take another --url, or remove what is there"
    if load_plan(url) is not None:
        raise DataError(f"url: {redaction.redact(url)}: an unfinished packing is there: {fix}")
    is_digits = isinstance(config.source, DigitsSource)
    how = config.to_manifest_values()
    if file_io.exists(file_io.join(url, manifest.FILE_NAME)):
        existing = manifest.load(url, allow_elsewhere=True, field="url")
        if existing.name != config.name or not (is_digits or existing.made.items() >= how.items()):
            raise DataError(f"url: {redaction.redact(url)}: the dataset {existing.name!r} is there: {fix}")
        say("already packed")
        return existing
    source = source_registry.create_source(config.source)
    assert isinstance(source, SampleSource), "listed sources are packed shard by shard"
    if config.dry_run:
        counts = f"{digits.NUM_IMAGES - digits.NUM_VALIDATION:,} train and {digits.NUM_VALIDATION} validation"
        images = counts if is_digits else " and ".join(source.splits)
        say(f"{config.name}: {len(source.classes)} classes, {images} images; packed in one process")
        return None
    if is_digits:
        return digits.pack_digits(url)
    splits = {split: _reencode_samples(source, split, config.layout) for split in source.splits}
    shard_bytes = config.layout.shard_mib * 2**20
    packed = write_dataset(url, config.name, source.classes, splits, manifest.MAX_SAMPLES, how, shard_bytes)
    labels = [index.load(url, shard).labels for shard in packed.splits.get("train", ())]
    if labels:
        say(shuffle_quality.measure_shuffle_quality(labels, OrderConfig(), batch_size=256).format_message())
    return packed


def _reencode_samples(source: SampleSource, split: str, layout: ShardLayout) -> Iterator[RawSample]:
    for sample in source.iter_samples(split):
        if not isinstance(sample, RawSample):
            raise DataError(f"source.plugin: iter_samples must yield RawSample, got {type(sample).__name__}")
        image, finding, is_resized = shard_packer.reencode_image(sample.image, sample.key, layout)
        if finding.defect:
            raise DataError(f"source.plugin: sample {sample.key!r}: {finding.reason}; mend it or leave it out")
        yield RawSample(sample.key, image, sample.label, "jpg" if is_resized else finding.extension)


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
