"""`shards index`: manifest and indexes for WebDataset tars made elsewhere; the tars stay where and as they are.

Each tar is read once. What is finished is kept below _indexing, so that rerunning the same command resumes; the
manifest comes last. Whatever a reader could not use is an error here.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from webdataset.shardlists import expand_urls

from orchestrator.config import redaction
from orchestrator.config.base import compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_object
from orchestrator.data import index, manifest
from orchestrator.data.build import label_format, shard_scan
from orchestrator.data.build.config import IndexConfig
from orchestrator.data.build.label_format import LabelFormat
from orchestrator.data.build.shard_scan import TRAIN, VALIDATION, ScannedShard, TarScan, print_line
from orchestrator.data.build.tar_reader import ObjectReader
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms.decode import BACKGROUND_NAME
from orchestrator.storage import file_io, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

INDEXING_FOLDER = "_indexing"
MAX_PROBLEMS = 20  # tars made by one program share their faults: no need to read all of them
MAX_NAMES = 1_000_000

_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_GLOB = re.compile(r"[*?\[]")
# Control characters, and bytes that are not UTF-8 as Python has them.
_UNSUPPORTED_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def index_dataset(job: IndexConfig, console: Console) -> int:
    """Index the tars, write the manifest and return 0. Raises ConfigError, DataError and StorageError."""
    job = _resolve_config(job)
    classes, titles = label_format.read_classes(job.classes) if job.classes else ((), ())
    try:
        labels = label_format.parse_flags(job.image_key, job.label_key, classes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    patterns = {TRAIN: job.train, VALIDATION: job.validation}
    sizes = {split: match_shards(job.url, pattern, split) for split, pattern in patterns.items() if pattern}
    if both := set(sizes.get(TRAIN, ())) & set(sizes.get(VALIDATION, ())):
        raise ConfigError(f"validation: {min(both)} must not be a training tar, too; name it in one of the two")
    if file_io.exists(file_io.join(job.to, manifest.FILE_NAME)):
        return _check_existing(job, labels, sizes, console)
    shards = _index_all(job, labels, sizes, console)
    how = labels.to_manifest_values()
    if any(one.transparent for one in shards):
        how[manifest.BACKGROUND_KEY] = BACKGROUND_NAME
    indexed = Manifest(
        name=job.name or urls.get_basename(job.url),
        classes=classes or _number_classes(shards),
        titles=titles,
        tars=job.url if job.to != job.url else "",
        made=how,
        splits={split: tuple(one.shard for one in shards if one.split == split) for split in sizes},
    )
    manifest.save(job.to, indexed)
    file_io.remove(file_io.join(job.to, INDEXING_FOLDER))
    shard_scan.print_summary(indexed, labels, shards, job, console)
    place = redaction.redact(file_io.join(job.to, manifest.FILE_NAME))
    print_line(console, f"{place}: written, digest {indexed.digest()}")
    if manifest.is_outside(indexed.tars, job.to):
        where = f"the tars stay in {redaction.redact(indexed.tars)}"
        print_line(console, f"{where}: each job that reads this dataset needs --allow-elsewhere")
    return 0


def _resolve_config(job: IndexConfig) -> IndexConfig:
    if not job.url or not (job.train or job.validation):
        raise ConfigError("url: give the folder of the tars with --url, and tars with --train and --validation")
    given = {"url": job.url, "to": job.to or job.url, "classes": job.classes}
    places = {name: urls.require_absolute(place, name) if place else "" for name, place in given.items()}
    if places["to"] != (url := places["url"]) and redaction.redact(url) != url:
        where = f"url: {redaction.redact(url)} is given with a password or query"
        raise ConfigError(f"{where}, which would stand in the manifest; give them by the environment")
    return job.model_copy(update=places)


def _index_all(
    job: IndexConfig, labels: LabelFormat, sizes: Mapping[str, Mapping[str, int]], console: Console
) -> list[ScannedShard]:
    """Return all shards. Raises DataError with everything that is wrong, or the first problems of many."""
    work = ShardIndexer(job.url, job.to, labels)
    items = [(split, name, size) for split, own in sizes.items() for name, size in own.items()]
    results = shard_scan.run_on_shards(items, work, DataError, MAX_PROBLEMS, job.threads, console, "indexing")
    if problems := [result for result in results if isinstance(result, DataError)]:
        many = "" if len(problems) == 1 else f"{len(problems)} tars cannot be indexed; "
        raise DataError(f"{many}{problems[0]}")
    indexed = [result for result in results if isinstance(result, ScannedShard)]
    for split in sizes:
        own = [shard for shard in indexed if shard.split == split]
        duplicates, count = shard_scan.find_duplicate_keys(job.to, own)
        for key, first, second in duplicates:
            fix = "keys must be unique in a split; pack it anew, or name each tar once"
            raise DataError(f"key {key!r} is in {first} and in {second} ({count} such keys): {fix}")
    return indexed


def _number_classes(shards: Sequence[ScannedShard]) -> tuple[str, ...]:
    largest = max(int(shard.labels.max()) for shard in shards)
    if largest < 1:
        raise DataError("all labels are 0: at least 2 classes are needed; set --label-key if the labels are elsewhere")
    return tuple(str(number) for number in range(largest + 1))


def _check_existing(
    job: IndexConfig, labels: LabelFormat, sizes: Mapping[str, Mapping[str, int]], console: Console
) -> int:
    existing = manifest.load(job.to, allow_elsewhere=True, field="url" if job.to == job.url else "to")
    kept = {split: {shard.name: shard.bytes for shard in shards} for split, shards in existing.splits.items()}
    made = {name: value for name, value in existing.made.items() if name != manifest.BACKGROUND_KEY}
    if kept != sizes or made != labels.to_manifest_values() or labels.classes not in ((), existing.classes):
        place = redaction.redact(file_io.join(job.to, manifest.FILE_NAME))
        raise DataError(f"{place}: is there and is about other tars or labels; remove it to index again")
    count = sum(map(len, kept.values()))
    print_line(console, f"{existing.name}: already indexed, {count} tars; shards verify checks them")
    return 0


class ShardIndexer:
    """Indexes single tars below `url` into `to`; safe for threads."""

    def __init__(self, url: str, to: str, labels: LabelFormat) -> None:
        """Raise StorageError when the place cannot be written to."""
        self._url, self._to, self._labels = url, to, labels
        self._options = compute_fingerprint(url, labels.to_manifest_values(), labels.classes)
        try:
            file_io.write_bytes(file_io.join(to, INDEXING_FOLDER, "options"), self._options.encode())
        except StorageError as error:
            raise StorageError(f"{error}; --to URL writes manifest and indexes elsewhere") from None

    def __call__(self, item: tuple[str, str, int], ranges: RangeReader) -> ScannedShard:
        """Return a shard whose index is written. item: split, name and bytes of the tar. Raises DataError."""
        split, name, size = item
        try:
            return self._load_kept(split, name, size) or self._index_shard(split, name, ranges)
        except FileNotFoundError:
            raise DataError(f"{redaction.redact(file_io.join(self._url, name))}: missing") from None

    def _index_shard(self, split: str, name: str, ranges: RangeReader) -> ScannedShard:
        url, labels = file_io.join(self._url, name), self._labels
        shown = redaction.redact(url)
        reader = ObjectReader(ranges, url, is_hashed=True)
        scan = TarScan(reader.read, reader.size, shown, labels)
        listing = scan.build_index(is_checked=True)
        skipped = scan.count_skipped(listing.keys)
        if not listing.keys or (label_format.has_images(skipped) and not labels.is_chosen):
            if not skipped:
                raise DataError(f"{shown}: no sample in it; name tars that have samples")
            described = label_format.describe_others(skipped, labels)
            fix = "; or set --image-key jpg to leave them out" if listing.keys else ""
            raise DataError(f"{shown}: {described}{fix}")
        shard = shard_scan.save_index(self._to, name, listing, reader.size, reader.compute_sha256())
        entry = {"options": self._options, "shard": shard.to_dict(), "skipped": skipped}
        record = json.dumps({**entry, "transparent": scan.transparent}).encode()
        file_io.write_bytes(file_io.join(self._to, INDEXING_FOLDER, name + ".json"), record)
        return ScannedShard(split, shard, listing, skipped, scan.transparent)

    def _load_kept(self, split: str, name: str, size: int) -> ScannedShard | None:
        """Return what an earlier run found, if it still holds."""
        try:
            entry = parse_object(file_io.read_bytes(file_io.join(self._to, INDEXING_FOLDER, name + ".json")))
            shard = Shard.from_dict(entry["shard"])
            if entry["options"] != self._options or shard.bytes != size:
                return None
            skipped, transparent = Counter(entry["skipped"]), int(entry["transparent"])
            return ScannedShard(split, shard, index.load(self._to, shard), skipped, transparent)
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # ConfigError and DataError are ValueErrors
            return None


# ------------------------------------------------------------------ names of tars from patterns
def match_shards(url: str, pattern: str, field: str) -> dict[str, int]:
    """Return bytes by name of the objects below `url` that a pattern with braces, in their order, or * ? [] stands for.

    Raises ConfigError for a pattern that makes no sense, DataError when a tar is missing or nothing matches.
    """
    expanded = _expand_braces(pattern, field)
    folders: dict[str, list[str]] = {}
    for folder, _, last in (name.rpartition("/") for name in expanded):
        folders.setdefault(folder, []).append(last)
    there: dict[str, int] = {}
    for folder, lasts in folders.items():
        # A web server that lists nothing answers for single names.
        wanted = None if any(map(_GLOB.search, lasts)) else lasts
        sizes = file_io.list_sizes(file_io.join(url, folder) if folder else url, wanted)
        there.update({f"{folder}/{last}" if folder else last: size for last, size in sizes.items()})
    names: list[str] = []
    for name in expanded:
        if not _GLOB.search(name):
            names.append(name)
            continue
        beside = [at for at in sorted(there) if at.rpartition("/")[0] == name.rpartition("/")[0]]
        # Lists and indexes of shards lie beside them.
        names += [at for at in beside if fnmatch.fnmatchcase(at, name) and not at.endswith(".json")]
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ConfigError(f"{field}: {pattern!r} names {twice[0]} twice; name each tar once")
    if odd := [name for name in names if _UNSUPPORTED_CHARACTERS.search(name)]:
        raise DataError(f"{field}: the name of {odd[0]!r} must be UTF-8 without control characters; rename the tar")
    if missing := [name for name in names if name not in there]:
        named = f"({len(missing)} of {len(names)} named by {pattern!r})"
        raise DataError(f"{field}: {redaction.redact(url)}: {missing[0]} is missing {named}")
    if not names:
        raise DataError(f"{field}: {redaction.redact(url)}: nothing there matches {pattern!r}")
    return {name: there[name] for name in names}


def _expand_braces(pattern: str, field: str) -> list[str]:
    if pattern.startswith("/") or "://" in pattern or ".." in _RANGE.sub("", pattern).split("/"):
        raise ConfigError(f"{field}: must be a path below the url, got {pattern!r}")
    if _GLOB.search(pattern.rpartition("/")[0]):
        raise ConfigError(f"{field}: * ? [] may stand in the last part of a name only, got {pattern!r}")
    if math.prod(1 + abs(int(last) - int(first)) for first, last in _RANGE.findall(pattern)) > MAX_NAMES:
        raise ConfigError(f"{field}: {pattern!r} stands for over {MAX_NAMES} names; name fewer tars")
    try:
        return list(expand_urls(pattern))
    except ValueError as error:
        raise ConfigError(f"{field}: must have pairs of braces, got {pattern!r}: {error}") from None
