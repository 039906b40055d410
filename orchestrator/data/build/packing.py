"""Packing as a whole: a plan that is kept, shards that are packed in any order, a report and a manifest at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.config import redaction
from orchestrator.config.plugins import create_plugin
from orchestrator.config.redaction import make_printable
from orchestrator.data import index, manifest, rng, shuffle_quality
from orchestrator.data.build import packing_plan, shard_packer, tar_writer
from orchestrator.data.build.config import FolderSource, IlsvrcSource, PackConfig, PluginSource
from orchestrator.data.build.packing_plan import (
    IO_THREADS,
    PACKING_FOLDER,
    PackedShard,
    PackingPlan,
    PlannedRows,
    ShardId,
    ShardTask,
    SplitPlan,
)
from orchestrator.data.build.sources import digits
from orchestrator.data.build.sources.ilsvrc import IlsvrcLister
from orchestrator.data.build.sources.listing import FolderLister, ImageRow, SourceListing, SplitListing
from orchestrator.data.build.tar_writer import RawSample
from orchestrator.data.config import OrderConfig
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.transforms.decode import BACKGROUND_NAME
from orchestrator.data.transforms.image_format import FORMAT_NAMES, UNSUPPORTED_EXTENSIONS, UNSUPPORTED_FORMATS
from orchestrator.storage import file_io, urls
from orchestrator.storage.ranged_reads import RangeReader

ESTIMATE_IMAGES = 256  # by which the size of reduced ones is estimated
REPORT_NAME = "report.json"
MIN_BAD_LIMIT = 10  # so many may be broken in a small dataset, too
MAX_LISTED_IMAGES = 10

Say = Callable[[str], None]


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
def start_packing(config: PackConfig, say: Say) -> Packing | Manifest:
    """Return the packing of a resolved command, planned or resumed; the manifest when all is done.

    Raises DataError for a source that is unfit, and when another dataset or packing is at the URL.
    """
    if (existing := _load_existing(config)) is not None:
        say("a dataset is there; listing the source to compare")
        if _list_images(config, _find_roots(config)).digest() != existing.made.get("listing"):
            raise _make_conflict(config, existing, "packed from other images")
        file_io.remove(file_io.join(config.url, PACKING_FOLDER))
        return existing
    plan, roots = packing_plan.load_plan(config), _find_roots(config)
    if plan is None:
        return Packing(config, packing_plan.save_plan(config, *plan_packing(config, roots, say)), roots, {})
    finished, shown = packing_plan.load_finished_shards(config.url, plan), redaction.redact(config.url)
    say(f"resuming the packing in {shown}: {len(finished)} of {len(plan.shards())} shards are there")
    return Packing(config, plan, roots, finished)


def preview_plan(config: PackConfig, say: Say) -> PackingPlan:
    """Return the plan of a resolved command and write nothing. Raises what `start_packing` raises."""
    return packing_plan.load_plan(config) or plan_packing(config, _find_roots(config), say)[0]


def plan_packing(config: PackConfig, roots: dict[str, str], say: Say) -> tuple[PackingPlan, PlannedRows]:
    """Return the plan, and by split its listing and the rows of each shard. Raises DataError for an unfit source."""
    say(f"listing {', '.join(sorted({redaction.redact(root) for root in roots.values()}))}")
    listing = _list_images(config, roots)
    ratio = _estimate_size_ratio(config, listing.splits["train"])
    rows = {
        name: (split, packing_plan.assign_shards(split, config.layout, name, ratio))
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
    """Write report and manifest, remove all else of the packing. Raises DataError for a split without images."""
    url, plan = packing.config.url, packing.plan
    splits = {
        name: tuple(shard for n in range(len(split.shards)) if (shard := entries[name, n].shard) is not None)
        for name, split in plan.splits.items()
    }
    for name, shards in splits.items():
        if not shards:
            raise DataError(f"{redaction.redact(url)}: no image of the {name} split can be decoded")
    transparent = any("transparent" in entry.oddities for entry in entries.values())
    made = {**plan.made, **({manifest.BACKGROUND_KEY: BACKGROUND_NAME} if transparent else {})}
    packed = Manifest(name=plan.name, classes=plan.classes, titles=plan.titles, made=made, splits=splits)
    report = json.dumps(build_report(plan, entries), indent=1, sort_keys=True) + "\n"
    file_io.write_bytes(file_io.join(url, REPORT_NAME), report.encode())
    if urls.is_local(url):  # unfinished temporary files that killed processes left
        for name in plan.splits:
            for path in Path(urls.to_local_path(file_io.join(url, name))).glob(f"{file_io.TEMP_PREFIX}*"):
                path.unlink()
    manifest.save(url, packed)
    file_io.remove(file_io.join(url, PACKING_FOLDER))
    return packed


def pack_samples(config: PackConfig, say: Say) -> Manifest | None:
    """Pack a source that yields samples, in this process; return the manifest, None after a dry run.

    Raises DataError for a sample that cannot be stored, and when another dataset or packing is at the URL.
    """
    packing_plan.load_plan(config)  # raises for any plan that is there: sources of samples have none
    if (existing := _load_existing(config)) is not None:
        say("already packed")
        return existing
    source = _create_sample_source(config)
    if config.dry_run:
        splits = " and ".join(source.splits)
        say(f"{config.name}: {len(source.classes)} classes, {splits} images; packed in one process")
        return None
    packed = tar_writer.write_dataset(
        config.url,
        config.name,
        source.classes,
        {split: _reencode_samples(source, split, config) for split in source.splits},
        getattr(source, "samples_per_shard", manifest.MAX_SAMPLES),
        config.to_manifest_values(),
        config.layout.shard_mib * 2**20,
    )
    labels = [index.load(config.url, shard).labels for shard in packed.splits.get("train", ())]
    if labels:
        say(shuffle_quality.measure_shuffle_quality(labels, OrderConfig(), batch_size=256).format_message())
    return packed


def _reencode_samples(source: Any, split: str, config: PackConfig) -> Iterator[RawSample]:
    for sample in source.iter_samples(split):
        if not isinstance(sample, RawSample):
            raise DataError(f"source.plugin: iter_samples must yield RawSample, got {type(sample).__name__}")
        packed = shard_packer.reencode_image(sample.image, sample.key, config.layout)
        if packed.defect:
            raise DataError(f"source.plugin: sample {sample.key!r}: {packed.reason}; mend it or leave it out")
        yield RawSample(sample.key, packed.image, sample.label, packed.extension)


# ------------------------------------------------------------------ source and what is there already
def _create_sample_source(config: PackConfig) -> Any:
    if not isinstance(config.source, PluginSource):
        return digits.Digits()
    source = create_plugin("source", config.source.plugin, config.source.args)
    if all(hasattr(source, name) for name in ("classes", "splits", "iter_samples")):
        return source
    needed = f"must return an object with classes, splits and iter_samples(split), got {type(source).__name__}"
    raise DataError(f"source.plugin: {config.source.plugin!r} {needed}")


def create_lister(config: PackConfig) -> FolderLister:
    """Return what lists the images of a source that has any."""
    if isinstance(config.source, IlsvrcSource):
        return IlsvrcLister(config.source)
    assert isinstance(config.source, FolderSource), "sources of samples are packed in one piece"
    return FolderLister(config.source.url, config.source.holdout, config.source.labels)


def _list_images(config: PackConfig, roots: Mapping[str, str]) -> SourceListing:
    try:
        return create_lister(config).list_images(roots)
    except FileNotFoundError as error:
        raise DataError(f"source: removed while it was listed: {error}") from None


def _find_roots(config: PackConfig) -> dict[str, str]:
    """Return where the images of each split lie. Raises DataError when the dataset would lie among them."""
    roots = create_lister(config).find_roots()
    for root in roots.values():
        if f"{config.url}/".startswith(root.rstrip("/") + "/"):
            place = f"{redaction.redact(config.url)} must not lie in {redaction.redact(root)}"
            raise DataError(f"url: {place}, which is to be packed; set another --url")
    return roots


def _estimate_size_ratio(config: PackConfig, split: SplitListing) -> float:
    """Return bytes to be stored for a byte of the source, by a sample of the images."""
    layout = config.layout
    if not layout.resize:
        return 1.0
    chosen = rng.permutation(rng.derive_key(layout.seed, "pack-estimate"), len(split))[:ESTIMATE_IMAGES]
    before = after = 0
    with closing(RangeReader(IO_THREADS)) as ranges:
        quick = layout.model_copy(update={"decode": False})
        read = partial(shard_packer.read_packed, root=split.root, is_tar=split.is_tar, layout=quick, ranges=ranges)
        rows = [ImageRow(*values) for values in zip(*split.select_rows(chosen).to_columns().values(), strict=True)]
        with ThreadPoolExecutor(IO_THREADS) as pool:
            for row, packed in zip(rows, pool.map(read, rows), strict=True):
                if not packed.defect:
                    before, after = before + row.length, after + len(packed.image)
    return after / before if before else 1.0


def _load_existing(config: PackConfig) -> Manifest | None:
    """Return the manifest that is there, if any. Raises DataError when it is not that of this command."""
    if not file_io.exists(file_io.join(config.url, manifest.FILE_NAME)):
        return None
    existing = manifest.load(config.url, allow_elsewhere=True, field="url")
    there: dict[str, object] = {"name": existing.name, **existing.made}
    for name, value in {"name": config.name, **config.to_manifest_values()}.items():
        if there.get(name) != value:
            how = f"packed with {name} {there.get(name)!r}; this command has {value!r}"
            raise _make_conflict(config, existing, how)
    return existing


def _make_conflict(config: PackConfig, existing: Manifest, how: str) -> DataError:
    where = f"url: {redaction.redact(config.url)}: the dataset {existing.name!r} is there, {how}"
    return DataError(f"{where}: take another --url, or remove what is there")


# ------------------------------------------------------------------ report
def check_bad_limit(plan: PackingPlan, entries: Mapping[ShardId, PackedShard], max_bad: float) -> None:
    """Raise DataError when more images are broken than may be."""
    bad = [image for _, entry in sorted(entries.items()) for image in entry.left_out]
    allowed = max(MIN_BAD_LIMIT, int(max_bad * plan.samples))
    if len(bad) > allowed:
        seen = sum(entry.images for entry in entries.values())
        kinds = _format_counts(Counter(image.defect for image in bad))
        listed = "; ".join(f"{image.key} ({image.source}): {image.reason}" for image in bad[:MAX_LISTED_IMAGES])
        what = f"{len(bad)} of the first {seen} images are broken, of {plan.samples} at most {allowed} may be"
        raise DataError(f"max_bad: {what}: mend the source, or set a larger --max-bad. Broken ({kinds}): {listed}")


def build_report(plan: PackingPlan, entries: Mapping[ShardId, PackedShard]) -> dict[str, Any]:
    """Return what was packed, met and left out, as report.json has it."""
    splits = {}
    for name, split in plan.splits.items():
        own = [entry for (own_name, _), entry in sorted(entries.items()) if own_name == name]
        shards = [entry.shard for entry in own if entry.shard is not None]
        bad = [image for entry in own for image in entry.left_out]
        met: Counter[str] = Counter(image.defect for image in bad)
        for entry in own:
            met.update(entry.oddities)
        lost = Counter(image.label for image in bad)
        per_class = [count - lost[label] for label, count in enumerate(split.per_class)]
        splits[name] = {
            "shards": len(shards),
            "images": sum(shard.samples for shard in shards),
            "bytes": sum(shard.bytes for shard in shards),
            "resized": sum(entry.resized for entry in own),
            "met": dict(met),
            "fewest_of_a_class": min(per_class),
            "most_of_a_class": max(per_class),
            "classes_without_images": [plan.classes[label] for label, count in enumerate(per_class) if not count],
            "left_out": [
                {"key": image.key, "source": image.source, "class": plan.classes[image.label], "defect": image.defect,
                 "reason": image.reason} for image in bad
            ],
        }  # fmt: skip
    made, classes = plan.made, len(plan.classes)
    return {"name": plan.name, "made": made, "classes": classes, "ignored_files": plan.ignored, "splits": splits}


def describe_report(report: Mapping[str, Any]) -> list[str]:
    """Return the report in lines for people: what was met, what is not in the dataset, and what to do about it."""
    lines, bad, ignored = list[str](), list[dict[str, str]](), report["ignored_files"]
    for name, split in report["splits"].items():
        met = _format_counts(Counter(split["met"])) or "nothing odd"
        per_class = f"{split['fewest_of_a_class']:,} to {split['most_of_a_class']:,} images of a class"
        lines.append(f"{name}: {per_class}, {split['resized']:,} reduced in size; met: {met}")
        bad += split["left_out"]
    if ignored:
        lines.append(f"ignored files: {_format_counts(Counter(ignored))}")
    kinds = Counter(image["defect"] for image in bad)
    for extension in ignored.keys() & UNSUPPORTED_EXTENSIONS.keys():
        kinds[UNSUPPORTED_EXTENSIONS[extension]] += ignored[extension]
    if kinds:
        fix = "; convert them to JPEG or PNG first" if kinds.keys() & set(UNSUPPORTED_FORMATS) else ""
        lines.append(f"{kinds.total()} left out: {_format_counts(kinds)}{fix}")
    lines += [f"left out: {image['key']} ({image['source']}): {image['reason']}" for image in bad[:MAX_LISTED_IMAGES]]
    return [make_printable(line) for line in lines]


def _format_counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {FORMAT_NAMES.get(kind, kind) or 'unnamed'}" for kind, count in kinds.most_common())
