"""`shards verify`: all that is wrong with a dataset, not only the first thing.

Every byte is read once. Duplicates among samples are found by hashes in memory, about 60 bytes a sample at the most.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.redaction import make_printable
from orchestrator.data import index, manifest, shuffle_quality
from orchestrator.data.build import label_format, shard_pool, tar_reader
from orchestrator.data.build.config import VerifyConfig
from orchestrator.data.build.image_checks import describe_transparent, record_transparent
from orchestrator.data.build.indexing import TRAIN, print_line
from orchestrator.data.build.member_fields import NO_SKIPPED_SAMPLES, OtherMembers, SkippedSamples
from orchestrator.data.build.tar_reader import TarMember
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.index import NUMBER_COLUMNS, KeyColumn, ShardIndex
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms import decode
from orchestrator.storage import urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

FAILED = 1
# A storage that is down would be asked for every shard, with all its retries.
MAX_UNREACHABLE = 5
# Of a kind of duplicates as many are named.
MAX_LISTED_PAIRS = 5


@dataclass(frozen=True)
class _CheckedShard:
    """A shard of a split and the result of its check."""

    split: str
    shard: Shard
    result: ShardVerification


class _DatasetWarning(NamedTuple):
    """A fact that may be intended, but has to be known: it does not change the exit status."""

    line: str
    summary: str  # for the last line


def verify_dataset(job: VerifyConfig, console: Console) -> int:
    """Check the dataset, print the findings and return the exit status.

    1 for problems: what cannot be read as the manifest says. 0 otherwise, also with warnings, which the last line
    counts: images that are in two splits or there with two labels (real datasets have some), samples of the tars that
    are left out, labels that are poorly mixed.

    Raises ConfigError for a place that means nothing, DataError when there is no readable manifest, StorageError when
    the storage is down.
    """
    if not job.url:
        raise ConfigError("url: give the dataset's folder with --url")
    try:
        url = urls.require_absolute(job.url, "url")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    dataset = manifest.load(url, allow_elsewhere=job.allow_elsewhere, field="url")
    checked = _check_shards(url, dataset, job, console)
    problems = [(one.shard.name, problem) for one in checked for problem in one.result.problems]
    problems += _find_manifest_problems(dataset) + _find_duplicate_keys(url, checked)
    warnings = [*_find_duplicate_images(url, checked), *_find_skipped_samples(dataset, checked)]
    transparent = describe_transparent(
        {
            split: sum(one.result.transparent for one in checked if one.split == split)
            for split in sorted(dataset.splits)
        }
    )
    if transparent and manifest.BACKGROUND_KEY not in dataset.made:
        line = (
            "transparent images are not recorded in the manifest, which is of a version that ignored transparency: "
            "pack or index the dataset again, or earlier runs and stored scores count as of the same pixels"
        )
        warnings.append(_DatasetWarning(line, "transparent images are not recorded"))
    columns, mixing = [one.result.labels for one in checked if one.split == TRAIN], []
    if columns:
        quality = shuffle_quality.measure_shuffle_quality(columns, job.order, job.batch_size)
        if quality.is_poor:
            warnings.append(_DatasetWarning(quality.format_message(), "labels are poorly mixed"))
        else:
            mixing = [quality.format_message()]
    for line in (*_summarize_manifest(dataset), *transparent):
        print_line(console, line)
    for warning in warnings:
        print_line(console, f"warning: {warning.line}", "yellow")
    for line in mixing:
        print_line(console, line)
    return _print_verdict(make_printable(dataset.name), problems, warnings, console)


def _print_verdict(
    name: str, problems: Sequence[tuple[str, str]], warnings: Sequence[_DatasetWarning], console: Console
) -> int:
    """Print the table of problems and the last line, and return the exit status."""
    summary = "; ".join(warning.summary for warning in warnings)
    if problems:
        table = Table("where", "what is wrong")
        for where, what in problems:
            table.add_row(Text(make_printable(where)), Text(make_printable(what)))
        console.print(table)
        print_line(
            console, f"{name}: {len(problems)} problems" + (f"; beside them {summary}" if summary else ""), "red"
        )
        return FAILED
    if warnings:
        print_line(console, f"{name}: no errors, but {summary}", "yellow")
    else:
        print_line(console, f"{name}: nothing is wrong", "green")
    return 0


def _check_shards(url: str, dataset: Manifest, job: VerifyConfig, console: Console) -> list[_CheckedShard]:
    """Return every shard's result, in the manifest's order."""
    listed = [(split, shard) for split in sorted(dataset.splits) for shard in dataset.splits[split]]
    shards, results = [shard for _, shard in listed], dict[int, ShardVerification]()
    unreachable = 0

    def receive(number: int, result: ShardVerification) -> None:
        nonlocal unreachable
        results[number] = result
        unreachable += result.unreachable is not None
        if result.unreachable is not None and unreachable >= MAX_UNREACHABLE:
            raise result.unreachable

    with closing(RangeReader(job.threads)) as ranges:
        check = ShardVerifier(url, dataset, job.deep, ranges)
        total = sum(shard.bytes for shard in shards)
        shard_pool.run_on_shards(shards, check, receive, job.threads, console, "verifying", total)
    return [_CheckedShard(split, shard, results[number]) for number, (split, shard) in enumerate(listed)]


def _find_manifest_problems(dataset: Manifest) -> list[tuple[str, str]]:
    problems = [] if dataset.splits else [(manifest.FILE_NAME, "it has no split")]
    for split, shards in sorted(dataset.splits.items()):
        if not dataset.count_samples(split):
            problems.append((manifest.FILE_NAME, f"split {split!r} has no sample"))
        times = Counter(shard.name for shard in shards)
        problems += [(name, f"listed {count} times in split {split!r}") for name, count in times.items() if count > 1]
    return problems


def _find_duplicate_keys(url: str, checked: Sequence[_CheckedShard]) -> list[tuple[str, str]]:
    """Return a problem for each key that stands for several samples of a split, up to MAX_LISTED_PAIRS."""
    problems = []
    for split in sorted({one.split for one in checked}):
        own = [one for one in checked if one.split == split]
        columns = [one.result.keys for one in own]
        pairs, shown = index.find_equal_pairs(columns), 0
        for key, first, second in index.iter_duplicate_keys(
            columns,
            pairs,
            lambda number, row, own=own: _read_key(url, own[number], row),  # type: ignore[misc]
        ):
            problems.append((own[second].shard.name, f"key {key!r} is also in {own[first].shard.name}"))
            shown += 1
            if shown == MAX_LISTED_PAIRS:
                break
        if shown == MAX_LISTED_PAIRS < len(pairs):
            problems.append(
                (manifest.FILE_NAME, f"{len(pairs)} keys of split {split!r} are there twice; {shown} are listed")
            )
    return problems


def _find_duplicate_images(url: str, checked: Sequence[_CheckedShard]) -> list[_DatasetWarning]:
    """Return warnings about images that are there twice, as in real datasets."""
    columns = [one.result.checksums for one in checked]
    lengths, labels = (
        np.concatenate([getattr(one.result, name) for one in checked] or [np.empty(0)])
        for name in ("lengths", "labels")
    )
    pairs = index.find_equal_pairs(columns)
    pairs = pairs[lengths[pairs[:, 0]] == lengths[pairs[:, 1]]]
    shards, rows = index.locate_rows(list(map(len, columns)), pairs)
    grouped: dict[tuple[str, str], list[int]] = {}
    for number, (first, second) in enumerate(shards.tolist()):
        grouped.setdefault((checked[first].split, checked[second].split), []).append(number)

    def name_pair(number: int) -> str:
        places = zip(shards[number].tolist(), rows[number].tolist(), strict=True)
        return " = ".join(f"{checked[s].shard.name} {_read_key(url, checked[s], row)!r}" for s, row in places)

    warnings = []
    for (one, other), numbers in sorted(grouped.items()):
        differing = int((labels[pairs[numbers, 0]] != labels[pairs[numbers, 1]]).sum())
        what = f"are twice in {one}" if one == other else f"of {one} are also in {other} (leakage)"
        summary = f"{len(numbers)} images {what}" + (f", {differing} with another label" if differing else "")
        named = "; ".join(map(name_pair, numbers[:MAX_LISTED_PAIRS]))
        line = f"{len(numbers)} images {what}, {differing} with another label: {named}"
        warnings.append(_DatasetWarning(line, summary))
    return warnings


def _find_skipped_samples(dataset: Manifest, checked: Sequence[_CheckedShard]) -> list[_DatasetWarning]:
    """Return warnings about samples of the tars that the dataset does not have."""
    fields, warnings = label_format.parse_manifest_values(dataset.made).fields, []
    for split in sorted(dataset.splits):
        skipped = NO_SKIPPED_SAMPLES
        for one in checked:
            skipped = skipped.merge(one.result.skipped) if one.split == split else skipped
        # A sample without an image under any name, such as a README, is no loss.
        if skipped.images:
            described = skipped.describe(fields, skipped.samples + dataset.count_samples(split))
            summary = f"{skipped.samples} samples of the {split} tars are left out"
            warnings.append(_DatasetWarning(f"{split}: left out: {described}", summary))
    return warnings


def _read_key(url: str, place: _CheckedShard, row: int) -> str:
    """Return the key of a sample; its number where the index does not have it."""
    try:
        keys = index.load(url, place.shard).keys
    except DataError:
        return f"#{row}"
    return keys[row] if row < len(keys) else f"#{row}"


def _summarize_manifest(dataset: Manifest) -> list[str]:
    lines = [f"{make_printable(dataset.name)}: {len(dataset.classes)} classes, digest {dataset.digest()}"]
    for split, shards in sorted(dataset.splits.items()):
        size = sum(shard.bytes for shard in shards) / 2**30
        lines.append(f"{split}: {dataset.count_samples(split)} samples in {len(shards)} shards, {size:.2f} GiB")
    return lines


@dataclass(frozen=True)
class ShardVerification:
    """Result of the check of a shard; the columns, 28 bytes a sample, are empty when nothing could be read."""

    problems: tuple[str, ...]
    labels: NDArray[np.int32]
    keys: NDArray[np.uint64]  # hashes
    checksums: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    unreachable: StorageError | None = None  # the storage failed: nothing is known
    skipped: SkippedSamples = NO_SKIPPED_SAMPLES
    transparent: int = 0  # images, when they are decoded


class ShardVerifier:
    """Verifies single shards of a dataset; safe for threads."""

    def __init__(self, url: str, dataset: Manifest, deep: bool, ranges: RangeReader) -> None:
        self._url, self._manifest, self._decodes, self._ranges = url, dataset, deep, ranges
        self._labels = label_format.parse_manifest_values(dataset.made, dataset.classes, dataset.titles)

    def __call__(self, shard: Shard, tick: Callable[[int], None]) -> ShardVerification:
        """Return all that is wrong with a shard."""
        problems: list[str] = []
        transparent: list[str] = []
        others = OtherMembers()
        try:
            listing = self._load_index(shard, problems)
            actual = self._index_tar(shard, problems, tick, others, transparent)
        except StorageError as error:
            return _build_verification((*problems, str(error)), None, error)
        if listing is None or actual is None:
            return replace(_build_verification(problems, actual or listing), transparent=len(transparent))
        if difference := _describe_difference(listing, actual):
            problems.append(f"its index is not what the tar holds: {difference}; index the dataset again")
        skipped = others.find_skipped(set(actual.keys))
        return replace(_build_verification(problems, actual), transparent=len(transparent), skipped=skipped)

    def _load_index(self, shard: Shard, problems: list[str]) -> ShardIndex | None:
        try:
            listing = index.load(self._url, shard)
        except DataError as error:
            problems.append(str(error))
            return None
        if len(listing.keys) != shard.samples:
            problems.append(f"its index lists {len(listing.keys)} samples, the manifest {shard.samples}")
        classes = len(self._manifest.classes)
        outside = np.flatnonzero((listing.labels < 0) | (listing.labels >= classes))
        if len(outside):
            first = int(outside[0])
            problems.append(
                f"{len(outside)} labels outside 0 .. {classes - 1}: sample {listing.keys[first]!r} has "
                f"{listing.labels[first]}"
            )
        return listing

    def _index_tar(
        self,
        shard: Shard,
        problems: list[str],
        tick: Callable[[int], None],
        others: OtherMembers,
        transparent: list[str],
    ) -> ShardIndex | None:
        """Return the index that the tar should have; None when it cannot be read to its end."""
        url = self._manifest.tar_url(self._url, shard)
        digest, size = hashlib.sha256(), 0

        def count(read: int) -> None:
            nonlocal size
            size += read
            tick(read)

        blocks = tar_reader.read_blocks(url, self._ranges, (digest,), count)
        undecodable: list[str] = []
        fields = self._labels.fields
        members: Iterable[TarMember] = tar_reader.iter_members(blocks, "the tar", fields.extensions, others.add)
        if self._decodes:
            members = _decode_members(members, fields.images, undecodable)
            members = record_transparent(members, fields.images, transparent)
        actual, unread = None, None
        try:
            actual = tar_reader.index_members(members, "the tar", self._labels.build_reader(), fields, others)
        except FileNotFoundError:
            problems.append(f"{redaction.redact(url)}: missing although the manifest lists it")
            return None
        except DataError as error:
            unread = str(error)
        for _ in blocks:  # size and checksum need what was not read
            pass
        if size != shard.bytes:
            problems.append(f"the tar has {size} bytes, the manifest says {shard.bytes}")
        elif digest.hexdigest() != shard.sha256:
            problems.append("the tar does not have the checksum that the manifest names: its bytes have changed")
        problems += [unread] if unread else []
        problems += undecodable
        return actual


def _decode_members(members: Iterable[TarMember], images: Sequence[str], undecodable: list[str]) -> Iterator[TarMember]:
    """Yield the members; decode each image on the way."""
    for member in members:
        if member.extension in images:
            try:
                decode.decode_image(bytes(member.payload))
            except BadSampleError as error:
                undecodable.append(f"sample {member.key!r} at byte {member.offset} cannot be decoded: {error}")
        yield member


def _describe_difference(listing: ShardIndex, actual: ShardIndex) -> str:
    """Return the first place where two indexes differ; empty when they do not."""
    if len(listing.keys) != len(actual.keys):
        return f"{len(listing.keys)} samples in the index, {len(actual.keys)} in the tar"
    for number, (listed, there) in enumerate(zip(listing.keys, actual.keys, strict=True)):
        if listed != there:
            return f"sample {number} has the key {listed!r} in the index, {there!r} in the tar"
    for column in NUMBER_COLUMNS:
        listed, there = getattr(listing, column), getattr(actual, column)
        if len(rows := np.flatnonzero(listed != there)):
            row = int(rows[0])
            return (
                f"sample {actual.keys[row]!r} has the {column.removesuffix('s')} {listed[row]} in the index, "
                f"{there[row]} in the tar ({len(rows)} such samples)"
            )
    return ""


def _build_verification(
    problems: Sequence[str], known: ShardIndex | None, unreachable: StorageError | None = None
) -> ShardVerification:
    listing = known or ShardIndex.build((), (), (), (), ())
    # Labels out of range are problems already; here they only have to fit.
    narrow = np.clip(listing.labels, -1, np.iinfo(np.int32).max).astype(np.int32)
    hashes = KeyColumn(listing.keys).compute_hashes()
    return ShardVerification(tuple(problems), narrow, hashes, listing.checksums, listing.lengths, unreachable)
