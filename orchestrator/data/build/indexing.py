"""`shards.py index`: manifest and indexes for WebDataset tars made elsewhere; the tars stay where and as they are.

Each tar is read once. What is finished is kept below _indexing, so a second start of the same command goes on; the
manifest comes last. Nothing that a reader would stumble over later is let through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.fingerprint import compute_fingerprint
from orchestrator.config.json_text import parse_object
from orchestrator.config.redaction import make_printable
from orchestrator.data import index, manifest, shuffle_quality
from orchestrator.data.build import class_names, label_format, shard_patterns, shard_pool, tar_reader
from orchestrator.data.build.config import IndexConfig
from orchestrator.data.build.label_format import LabelFormat
from orchestrator.data.build.member_fields import NO_SKIPPED_SAMPLES, OtherMembers, SkippedSamples, describe_members
from orchestrator.data.build.shard_patterns import FolderSizes
from orchestrator.data.build.tar_reader import TarMember
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.index import ShardIndex
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms import decode
from orchestrator.data.transforms.decode import BACKGROUND_NAME
from orchestrator.storage import file_io, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

TRAIN, VALIDATION = "train", "validation"
# Where the manifest says how many tars were left out, since they have no member.
EMPTY_TARS_KEY = "empty_tars"
# Tars made by one program share their faults: no need to read all of them to tell.
MAX_PROBLEMS = 20


def index_dataset(job: IndexConfig, console: Console) -> int:
    """Index the tars and write the manifest; 0 when the dataset is complete.

    Raises ConfigError, DataError and StorageError for what is to be mended first.
    """
    job = _resolve_config(job)
    classes, titles = class_names.read_classes(job.classes) if job.classes else ((), ())
    try:
        how = label_format.parse_flags(job.image_key, job.label_key, classes, titles)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folders = FolderSizes(job.url)
    patterns = {TRAIN: job.train, VALIDATION: job.validation}
    names = {
        split: shard_patterns.match_shards(folders, pattern, split) for split, pattern in patterns.items() if pattern
    }
    if both := set(names.get(TRAIN, ())) & set(names.get(VALIDATION, ())):
        raise ConfigError(f"validation: {min(both)} is refused: it is a training tar, too")
    items = [(name, folders.get_size(name) or 0) for split in names.values() for name in split]
    if file_io.exists(file_io.join(job.to, manifest.FILE_NAME)):
        return _check_existing(job, how, names, dict(items), console)
    ranges = RangeReader(job.threads)
    try:
        work = ShardIndexer(job.url, job.to, how, ranges)
        work.check_writable()
        found = _index_all(work, items, job.threads, console)
    finally:
        ranges.close()
    by_split = {split: _drop_empty_shards([found[name] for name in listed], split) for split, listed in names.items()}
    for facts in by_split.values():
        _check_unique_keys(job.to, facts)
    how_made = how.to_manifest_values()
    if empty := len(items) - sum(map(len, by_split.values())):
        how_made[EMPTY_TARS_KEY] = empty
    if any(one.transparent for one in found.values()):
        how_made[manifest.BACKGROUND_KEY] = BACKGROUND_NAME
    made = Manifest(
        name=job.name or urls.get_basename(job.url),
        classes=classes or _number_classes([one for facts in by_split.values() for one in facts]),
        titles=titles,
        tars=job.url if job.to != job.url else "",
        made=how_made,
        splits={split: tuple(one.shard for one in facts) for split, facts in by_split.items()},
    )
    manifest.save(job.to, made)
    work.remove_work_folder()
    for line in describe_transparent({split: sum(one.transparent for one in by_split[split]) for split in by_split}):
        _print_line(console, line)
    _print_summary(job, made, by_split, console)
    for name in (name for name, _ in items if not found[name].shard.samples):
        _print_line(console, f"warning: {make_printable(name)}: no member in it: left out", "yellow")
    return 0


def _resolve_config(job: IndexConfig) -> IndexConfig:
    """The job with places that mean the same everywhere. Raises ConfigError."""
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
    """The facts of all shards. Raises DataError with everything that is wrong, or the first troubles of many."""
    found: dict[str, IndexedShard] = {}
    troubles: list[str] = []

    def receive(number: int, result: IndexedShard | str) -> None:
        if isinstance(result, IndexedShard):
            found[items[number][0]] = result
            return
        troubles.append(result)
        console.print(f"refused: {result}", style="red", highlight=False, markup=False, soft_wrap=True)
        if len(troubles) == MAX_PROBLEMS:
            raise DataError(f"{len(troubles)} tars are refused, the rest was not looked at; {troubles[0]}")

    shard_pool.run_on_shards(items, work, receive, threads, console, "indexing", sum(size for _, size in items))
    if troubles:
        raise DataError(troubles[0] if len(troubles) == 1 else f"{len(troubles)} tars are refused; {troubles[0]}")
    return found


def _drop_empty_shards(facts: Sequence[IndexedShard], split: str) -> list[IndexedShard]:
    """Those that have samples: a writer that began a shard and stopped leaves one without. Raises DataError."""
    kept = [one for one in facts if one.shard.samples]
    if not kept:
        raise DataError(f"{split}: none of the {len(facts)} tars has a member")
    return kept


def _check_unique_keys(to: str, facts: Sequence[IndexedShard]) -> None:
    """Keys name samples in ledgers and scores: none may stand for two samples of a split."""
    columns = [one.keys for one in facts]
    pairs = index.find_equal_pairs(columns)
    shard, row = index.locate_rows(columns, pairs)
    for (first, second), (at, also) in zip(shard.tolist(), row.tolist(), strict=True):
        key = index.load(to, facts[first].shard).keys[at]
        if index.load(to, facts[second].shard).keys[also] == key:  # not only their hashes
            raise DataError(
                f"key {key!r} is in {facts[first].shard.name} and in {facts[second].shard.name} "
                f"({len(pairs)} such keys): keys must be unique in a split; pack it anew, or name each tar once"
            )


def _number_classes(facts: Sequence[IndexedShard]) -> tuple[str, ...]:
    """Names of classes that have none: their numbers."""
    largest = max(int(one.labels.max()) for one in facts)
    if largest < 1:
        raise DataError(
            "all labels are 0: at least 2 classes are needed; set --label-key if the labels are in another member, or "
            "in a field of a json member"
        )
    return tuple(str(number) for number in range(largest + 1))


def _check_existing(
    job: IndexConfig, how: LabelFormat, names: Mapping[str, Sequence[str]], sizes: Mapping[str, int], console: Console
) -> int:
    """Say that the dataset is complete; DataError when it is another one than the job is about."""
    found = manifest.load(job.to, allow_elsewhere=True, field="url" if job.to == job.url else "to")
    there = {shard.name: shard.bytes for shards in found.splits.values() for shard in shards}
    same = {split: len(listed) for split, listed in names.items()} and there.items() <= sizes.items()
    empty = {EMPTY_TARS_KEY: len(sizes) - len(there)} if len(sizes) > len(there) else {}
    for split, listed in names.items():
        kept = tuple(shard.name for shard in found.splits.get(split, ()))
        same = same and kept == tuple(name for name in listed if name in there)
    same = same and found.splits.keys() == names.keys()
    said = {name: value for name, value in found.made.items() if name != manifest.BACKGROUND_KEY}
    same = same and said == how.to_manifest_values() | empty and how.classes in ((), found.classes)
    if not same:
        shown = redaction.redact(file_io.join(job.to, manifest.FILE_NAME))
        raise DataError(f"{shown}: is there and is about other tars or labels; remove it to index again")
    console.print(f"{found.name}: already indexed, {len(there)} tars; shards.py verify checks them", highlight=False)
    return 0


def _print_summary(
    job: IndexConfig,
    made: Manifest,
    by_split: Mapping[str, Sequence[IndexedShard]],
    console: Console,
) -> None:
    """What was adopted, and what is odd about it without being wrong."""

    def say(line: str, style: str = "") -> None:
        _print_line(console, line, style)

    for split, facts in by_split.items():
        held = np.unique(np.concatenate([one.labels for one in facts]))
        total = sum(one.shard.bytes for one in facts)
        many = f"{made.count_samples(split)} samples of {len(held)} classes"
        say(f"{split}: {many} in {len(facts)} tars, {total / 2**30:.2f} GiB")
        absent = np.setdiff1d(np.arange(len(made.classes)), held)
        if len(absent):
            first = ", ".join(make_printable(made.classes[number]) for number in absent[:5].tolist())
            say(f"warning: {split}: {len(absent)} of {len(made.classes)} classes have no sample: {first}", "yellow")
        skipped = SkippedSamples()
        for one in facts:
            skipped = skipped.merge(one.skipped)
        if skipped.samples:
            told = skipped.describe(
                label_format.parse_manifest_values(made.made).fields, made.count_samples(split) + skipped.samples
            )
            if skipped.images:
                say(f"warning: {split}: left out: {told}", "yellow")
            else:
                say(f"{split}: no images: {told}")
    if TRAIN in by_split:
        found = shuffle_quality.measure_shuffle_quality(
            [one.labels for one in by_split[TRAIN]], job.order, job.batch_size
        )
        say(found.format_message(), "yellow" if found.is_poor else "")
    say(f"{redaction.redact(file_io.join(job.to, manifest.FILE_NAME))}: written, digest {made.digest()}")
    if manifest.is_outside(made.tars, job.to):
        say(f"the tars stay in {redaction.redact(made.tars)}: each job that reads this dataset needs --allow-elsewhere")


def _print_line(console: Console, line: str, style: str = "") -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


INDEXING_FOLDER = "_indexing"


@dataclass(frozen=True)
class IndexedShard:
    """What is kept in memory of each shard: 12 bytes a sample."""

    shard: Shard
    labels: NDArray[np.int32]
    keys: NDArray[np.uint64]  # hashes
    skipped: SkippedSamples = NO_SKIPPED_SAMPLES
    transparent: int = 0  # images


class ShardIndexer:
    """Indexes single tars below `url` into `to`; safe for threads."""

    def __init__(self, url: str, to: str, label_format: LabelFormat, ranges: RangeReader) -> None:
        self._url, self._to, self._label_format, self._ranges = url, to, label_format, ranges
        self._options = compute_fingerprint(
            url, label_format.to_manifest_values(), label_format.classes, label_format.titles
        )
        self._resumes = file_io.exists(file_io.join(to, INDEXING_FOLDER))

    def check_writable(self) -> None:
        """Find out early whether the place can be written to."""
        try:
            file_io.write_bytes(file_io.join(self._to, INDEXING_FOLDER, "options"), self._options.encode())
        except StorageError as error:
            raise StorageError(f"{error}; --to URL writes manifest and indexes elsewhere") from None

    def remove_work_folder(self) -> None:
        """Remove what only a resumed run needs."""
        file_io.remove(file_io.join(self._to, INDEXING_FOLDER))

    def __call__(self, item: tuple[str, int], tick: Callable[[int], None]) -> IndexedShard | str:
        """The facts of a shard whose index is written, or what is wrong with it."""
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
        fields, others, shown = self._label_format.fields, OtherMembers(), redaction.redact(url)
        transparent: list[str] = []
        members = tar_reader.iter_members(blocks, shown, fields.extensions, others.add)
        noted = record_transparent(members, fields.images, transparent)
        listing = index.index_members(noted, shown, self._label_format.build_checked_reader(), fields, others)
        skipped = others.find_skipped(set(listing.keys))
        if not listing.keys and others.members:
            raise DataError(f"{shown}: no sample in it has a {describe_members(fields.images)}{others.suggest_flags()}")
        if skipped.images and not fields.is_chosen:
            raise DataError(
                f"{shown}: {skipped.describe(fields, skipped.samples + len(listing.keys))}: {_suggest_flags(skipped)}"
            )
        if not listing.keys:  # and no other member: it is left out
            return build_indexed_shard(
                Shard(name=name, samples=0, bytes=size, sha256="", index_sha256=""), listing, skipped
            )
        data = listing.to_bytes()
        file_io.write_bytes(file_io.join(self._to, name + index.SUFFIX), data)
        shard = Shard(
            name=name,
            samples=len(listing.keys),
            bytes=size,
            sha256=sha256.hexdigest(),
            index_sha256=hashlib.sha256(data).hexdigest(),
        )
        entry = json.dumps(
            {
                "options": self._options,
                "shard": shard.to_dict(),
                "skipped": skipped.to_dict(),
                "transparent": len(transparent),
            }
        )
        file_io.write_bytes(file_io.join(self._to, INDEXING_FOLDER, name + ".json"), entry.encode())
        return build_indexed_shard(shard, listing, skipped, len(transparent))

    def _load_kept(self, name: str, size: int) -> IndexedShard | None:
        """What an earlier run found, if it is still so."""
        if not self._resumes:
            return None
        try:
            entry = parse_object(file_io.read_bytes(file_io.join(self._to, INDEXING_FOLDER, name + ".json")))
            shard = Shard.from_dict(entry["shard"])
            if entry["options"] != self._options or shard.bytes != size:
                return None
            skipped, transparent = SkippedSamples.from_dict(entry["skipped"]), int(entry["transparent"])
            return build_indexed_shard(shard, index.load(self._to, shard), skipped, transparent)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # ConfigError and DataError are ValueErrors
            return None


def build_indexed_shard(
    shard: Shard, listing: ShardIndex, skipped: SkippedSamples, transparent: int = 0
) -> IndexedShard:
    """What is kept of a shard and its index."""
    return IndexedShard(
        shard, listing.labels.astype(np.int32), index.KeyColumn(listing.keys).compute_hashes(), skipped, transparent
    )


def describe_transparent(counts: Mapping[str, int]) -> list[str]:
    """Return a line about the transparent images of each split that has some."""
    return [
        f"{split}: {count} images are transparent: they are laid on {decode.BACKGROUND_NAME}"
        for split, count in counts.items()
        if count
    ]


def record_transparent(members: Iterable[TarMember], images: Sequence[str], keys: list[str]) -> Iterator[TarMember]:
    """Yield the members, and append the key of each image that is not opaque to `keys`; broken ones are passed over."""
    for member in members:
        if member.extension in images:
            with suppress(BadSampleError):
                if decode.is_transparent(member.payload):
                    keys.append(member.key)
        yield member


def _suggest_flags(skipped: SkippedSamples) -> str:
    """Ask for the user's word on samples that have an image under another name."""
    image, prefix = skipped.images[0], skipped.images[0].rpartition(".")[0] + "."
    fitting = sorted(skipped.labels, key=lambda label: not label.startswith(prefix))
    labels = f" --label-key 'cls;{fitting[0]}'" if fitting else ""
    return f"set --image-key 'jpg;{image}'{labels} to take them, --image-key jpg to leave them out"
