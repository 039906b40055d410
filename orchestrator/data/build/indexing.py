"""`shards index`: manifest and indexes for WebDataset tars made elsewhere; the tars stay where and as they are.

Each tar is read once. What is finished is kept below _indexing, so that rerunning the same command resumes; the
manifest comes last. Whatever a reader could not use is an error here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_object
from orchestrator.config.redaction import make_printable
from orchestrator.data import index, manifest, shuffle_quality
from orchestrator.data.build import label_format, shard_patterns, shard_pool, tar_reader
from orchestrator.data.build.config import IndexConfig
from orchestrator.data.build.image_checks import describe_transparent, record_transparent
from orchestrator.data.build.label_format import LabelFormat
from orchestrator.data.build.member_fields import NO_SKIPPED_SAMPLES, OtherMembers, SkippedSamples, describe_members
from orchestrator.data.build.shard_patterns import FolderSizes
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms.decode import BACKGROUND_NAME
from orchestrator.storage import file_io, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

TRAIN, VALIDATION = "train", "validation"
INDEXING_FOLDER = "_indexing"
# Where the manifest says how many tars were left out, since they have no member.
EMPTY_TARS_KEY = "empty_tars"
# Tars made by one program share their faults: no need to read all of them.
MAX_PROBLEMS = 20


def index_dataset(job: IndexConfig, console: Console) -> int:
    """Index the tars, write the manifest and return 0.

    Raises ConfigError, DataError and StorageError for what has to be mended first.
    """
    job = _resolve_config(job)
    classes, titles = label_format.read_classes(job.classes) if job.classes else ((), ())
    try:
        labels = label_format.parse_flags(job.image_key, job.label_key, classes, titles)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folders = FolderSizes(job.url)
    patterns = {TRAIN: job.train, VALIDATION: job.validation}
    names = {
        split: shard_patterns.match_shards(folders, pattern, split) for split, pattern in patterns.items() if pattern
    }
    if both := set(names.get(TRAIN, ())) & set(names.get(VALIDATION, ())):
        raise ConfigError(f"validation: {min(both)} must not be a training tar, too; name it in one of the two")
    items = [(name, folders.get_size(name) or 0) for split in names.values() for name in split]
    if file_io.exists(file_io.join(job.to, manifest.FILE_NAME)):
        return _check_existing(job, labels, names, dict(items), console)
    with closing(RangeReader(job.threads)) as ranges:
        work = ShardIndexer(job.url, job.to, labels, ranges)
        work.check_writable()
        shards = _index_all(work, items, job.threads, console)
    by_split = {split: _drop_empty_shards([shards[name] for name in listed], split) for split, listed in names.items()}
    for own in by_split.values():
        _check_unique_keys(job.to, own)
    how = labels.to_manifest_values()
    if empty := len(items) - sum(map(len, by_split.values())):
        how[EMPTY_TARS_KEY] = empty
    if any(shard.transparent for shard in shards.values()):
        how[manifest.BACKGROUND_KEY] = BACKGROUND_NAME
    indexed = Manifest(
        name=job.name or urls.get_basename(job.url),
        classes=classes or _number_classes([shard for own in by_split.values() for shard in own]),
        titles=titles,
        tars=job.url if job.to != job.url else "",
        made=how,
        splits={split: tuple(shard.facts for shard in own) for split, own in by_split.items()},
    )
    manifest.save(job.to, indexed)
    work.remove_work_folder()
    _print_summary(job, indexed, by_split, console)
    for name in (name for name, _ in items if not shards[name].facts.samples):
        print_line(console, f"warning: {make_printable(name)}: no member in it: left out", "yellow")
    return 0


def _resolve_config(job: IndexConfig) -> IndexConfig:
    """Return the job with absolute places. Raises ConfigError."""
    if not job.url or not (job.train or job.validation):
        raise ConfigError("url: give the folder of the tars with --url, and tars with --train and --validation")
    try:
        url = urls.require_absolute(job.url, "url")
        to = urls.require_absolute(job.to, "to") if job.to else url
        classes = urls.require_absolute(job.classes, "classes") if job.classes else ""
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if to != url and redaction.redact(url) != url:
        raise ConfigError(
            f"url: {redaction.redact(url)} is given with a password or query, which would stand in the manifest; "
            "give them by the environment"
        )
    return job.model_copy(update={"url": url, "to": to, "classes": classes})


def _index_all(
    work: ShardIndexer, items: Sequence[tuple[str, int]], threads: int, console: Console
) -> dict[str, IndexedShard]:
    """Return all shards. Raises DataError with everything that is wrong, or the first problems of many."""
    shards: dict[str, IndexedShard] = {}
    problems: list[str] = []

    def receive(number: int, result: IndexedShard | str) -> None:
        if isinstance(result, IndexedShard):
            shards[items[number][0]] = result
            return
        problems.append(result)
        print_line(console, f"error: {result}", "red")
        if len(problems) == MAX_PROBLEMS:
            raise DataError(f"{len(problems)} tars cannot be indexed, the rest was not read; {problems[0]}")

    shard_pool.run_on_shards(items, work, receive, threads, console, "indexing", sum(size for _, size in items))
    if problems:
        many = "" if len(problems) == 1 else f"{len(problems)} tars cannot be indexed; "
        raise DataError(f"{many}{problems[0]}")
    return shards


def _drop_empty_shards(shards: Sequence[IndexedShard], split: str) -> list[IndexedShard]:
    """Return those that have samples: a writer that began a shard and stopped leaves one without. Raises DataError."""
    full = [shard for shard in shards if shard.facts.samples]
    if not full:
        raise DataError(f"{split}: none of the {len(shards)} tars has a member")
    return full


def _check_unique_keys(to: str, shards: Sequence[IndexedShard]) -> None:
    """Raise DataError for a key of two samples of a split: keys name samples in ledgers and scores."""
    columns = [shard.keys for shard in shards]
    pairs = index.find_equal_pairs(columns)
    names = [shard.facts.name for shard in shards]
    for key, first, second in index.iter_duplicate_keys(
        columns, pairs, lambda number, row: index.load(to, shards[number].facts).keys[row]
    ):
        raise DataError(
            f"key {key!r} is in {names[first]} and in {names[second]} ({len(pairs)} such keys): keys must be unique in "
            "a split; pack it anew, or name each tar once"
        )


def _number_classes(shards: Sequence[IndexedShard]) -> tuple[str, ...]:
    """Return names of classes that have none: their numbers."""
    largest = max(int(shard.labels.max()) for shard in shards)
    if largest < 1:
        raise DataError(
            "all labels are 0: at least 2 classes are needed; set --label-key if the labels are in another member, or "
            "in a field of a json member"
        )
    return tuple(str(number) for number in range(largest + 1))


def _check_existing(
    job: IndexConfig,
    labels: LabelFormat,
    names: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    console: Console,
) -> int:
    """Print that the dataset is complete. Raises DataError when it is another one than the job is about."""
    existing = manifest.load(job.to, allow_elsewhere=True, field="url" if job.to == job.url else "to")
    there = {shard.name: shard.bytes for shards in existing.splits.values() for shard in shards}
    empty = {EMPTY_TARS_KEY: len(sizes) - len(there)} if len(sizes) > len(there) else {}
    listed = {split: tuple(name for name in own if name in there) for split, own in names.items()}
    kept = {split: tuple(shard.name for shard in shards) for split, shards in existing.splits.items()}
    how = {name: value for name, value in existing.made.items() if name != manifest.BACKGROUND_KEY}
    if (
        not there.items() <= sizes.items()
        or kept != listed
        or how != labels.to_manifest_values() | empty
        or labels.classes not in ((), existing.classes)
    ):
        shown = redaction.redact(file_io.join(job.to, manifest.FILE_NAME))
        raise DataError(f"{shown}: is there and is about other tars or labels; remove it to index again")
    print_line(console, f"{existing.name}: already indexed, {len(there)} tars; shards verify checks them")
    return 0


def _print_summary(
    job: IndexConfig, indexed: Manifest, by_split: Mapping[str, Sequence[IndexedShard]], console: Console
) -> None:
    """Print what was indexed, and what is odd about it without being wrong."""
    fields = label_format.parse_manifest_values(indexed.made).fields
    for line in describe_transparent({split: sum(s.transparent for s in own) for split, own in by_split.items()}):
        print_line(console, line)
    for split, shards in by_split.items():
        seen = np.unique(np.concatenate([shard.labels for shard in shards]))
        total, samples = sum(shard.facts.bytes for shard in shards), indexed.count_samples(split)
        sizes = f"{samples} samples of {len(seen)} classes in {len(shards)} tars, {total / 2**30:.2f} GiB"
        print_line(console, f"{split}: {sizes}")
        absent = np.setdiff1d(np.arange(len(indexed.classes)), seen)
        if len(absent):
            first = ", ".join(make_printable(indexed.classes[number]) for number in absent[:5].tolist())
            lacking = f"{len(absent)} of {len(indexed.classes)} classes have no sample: {first}"
            print_line(console, f"warning: {split}: {lacking}", "yellow")
        skipped = NO_SKIPPED_SAMPLES
        for shard in shards:
            skipped = skipped.merge(shard.skipped)
        described = skipped.describe(fields, samples + skipped.samples)
        if skipped.images:
            print_line(console, f"warning: {split}: left out: {described}", "yellow")
        elif skipped.samples:
            print_line(console, f"{split}: no images: {described}")
    if TRAIN in by_split:
        quality = shuffle_quality.measure_shuffle_quality(
            [shard.labels for shard in by_split[TRAIN]], job.order, job.batch_size
        )
        print_line(console, quality.format_message(), "yellow" if quality.is_poor else "")
    shown = redaction.redact(file_io.join(job.to, manifest.FILE_NAME))
    print_line(console, f"{shown}: written, digest {indexed.digest()}")
    if manifest.is_outside(indexed.tars, job.to):
        place = redaction.redact(indexed.tars)
        print_line(console, f"the tars stay in {place}: each job that reads this dataset needs --allow-elsewhere")


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print a line as it is, without markup, colours of numbers or breaks."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class IndexedShard:
    """A shard in memory: 12 bytes a sample."""

    facts: Shard
    labels: NDArray[np.int32]
    keys: NDArray[np.uint64]  # hashes
    skipped: SkippedSamples = NO_SKIPPED_SAMPLES
    transparent: int = 0  # images


class ShardIndexer:
    """Indexes single tars below `url` into `to`; safe for threads."""

    def __init__(self, url: str, to: str, labels: LabelFormat, ranges: RangeReader) -> None:
        self._url, self._to, self._labels, self._ranges = url, to, labels, ranges
        self._options = compute_fingerprint(url, labels.to_manifest_values(), labels.classes, labels.titles)
        self._resumes = file_io.exists(file_io.join(to, INDEXING_FOLDER))

    def check_writable(self) -> None:
        """Raise StorageError early when the place cannot be written to."""
        try:
            file_io.write_bytes(file_io.join(self._to, INDEXING_FOLDER, "options"), self._options.encode())
        except StorageError as error:
            raise StorageError(f"{error}; --to URL writes manifest and indexes elsewhere") from None

    def remove_work_folder(self) -> None:
        """Remove what only a resumed run needs."""
        file_io.remove(file_io.join(self._to, INDEXING_FOLDER))

    def __call__(self, item: tuple[str, int], tick: Callable[[int], None]) -> IndexedShard | str:
        """Return a shard whose index is written, or what is wrong with it. item: name and bytes of the tar."""
        name, size = item
        try:
            kept = self._load_kept(name, size)
            if kept is not None:
                tick(size)
                return kept
            return self._index_shard(name, tick)
        except FileNotFoundError:
            return f"{redaction.redact(file_io.join(self._url, name))}: missing"
        except DataError as error:
            return str(error)

    def _index_shard(self, name: str, tick: Callable[[int], None]) -> IndexedShard:
        url = file_io.join(self._url, name)
        sha256, size = hashlib.sha256(), 0

        def count(read: int) -> None:
            nonlocal size
            size += read
            tick(read)

        blocks = tar_reader.read_blocks(url, self._ranges, (sha256,), count)
        fields, others, shown = self._labels.fields, OtherMembers(), redaction.redact(url)
        transparent: list[str] = []
        members = tar_reader.iter_members(blocks, shown, fields.extensions, others.add)
        members = record_transparent(members, fields.images, transparent)
        listing = tar_reader.index_members(members, shown, self._labels.build_reader(is_checked=True), fields, others)
        skipped = others.find_skipped(set(listing.keys))
        if not listing.keys and others.members:
            raise DataError(f"{shown}: no sample in it has a {describe_members(fields.images)}{others.suggest_flags()}")
        if skipped.images and not fields.is_chosen:
            described = skipped.describe(fields, skipped.samples + len(listing.keys))
            raise DataError(f"{shown}: {described}: {skipped.suggest_flags()}")
        if not listing.keys:  # and no other member: it is left out
            return _build_indexed_shard(
                Shard(name=name, samples=0, bytes=size, sha256="", index_sha256=""), listing, skipped
            )
        data = listing.to_bytes()
        file_io.write_bytes(file_io.join(self._to, name + index.SUFFIX), data)
        facts = Shard(
            name=name,
            samples=len(listing.keys),
            bytes=size,
            sha256=sha256.hexdigest(),
            index_sha256=hashlib.sha256(data).hexdigest(),
        )
        entry = {
            "options": self._options,
            "shard": facts.to_dict(),
            "skipped": skipped.to_dict(),
            "transparent": len(transparent),
        }
        file_io.write_bytes(file_io.join(self._to, INDEXING_FOLDER, name + ".json"), json.dumps(entry).encode())
        return _build_indexed_shard(facts, listing, skipped, len(transparent))

    def _load_kept(self, name: str, size: int) -> IndexedShard | None:
        """Return what an earlier run found, if it still holds."""
        if not self._resumes:
            return None
        try:
            entry = parse_object(file_io.read_bytes(file_io.join(self._to, INDEXING_FOLDER, name + ".json")))
            facts = Shard.from_dict(entry["shard"])
            if entry["options"] != self._options or facts.bytes != size:
                return None
            skipped, transparent = SkippedSamples.from_dict(entry["skipped"]), int(entry["transparent"])
            return _build_indexed_shard(facts, index.load(self._to, facts), skipped, transparent)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # ConfigError and DataError are ValueErrors
            return None


def _build_indexed_shard(
    facts: Shard, listing: ShardIndex, skipped: SkippedSamples, transparent: int = 0
) -> IndexedShard:
    hashes = index.KeyColumn(listing.keys).compute_hashes()
    return IndexedShard(facts, listing.labels.astype(np.int32), hashes, skipped, transparent)
