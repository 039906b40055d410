"""`shards.py verify`: all that is wrong with a dataset, not only the first thing.

Every byte is read once. Duplicates among samples are found by hashes in memory, about 60 bytes a sample at the most.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from orchestrator.data.build.indexing import describe_transparent, record_transparent
from orchestrator.data.build.member_fields import NO_SKIPPED_SAMPLES, OtherMembers, SkippedSamples
from orchestrator.data.build.tar_reader import TarMember
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.index import KeyColumn, ShardIndex
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms import decode
from orchestrator.storage import urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

FAILED = 1
TRAIN = "train"
# A storage that is down would be asked for every shard, with all its retries.
MAX_UNREACHABLE = 5
# Of a kind of duplicates as many are named.
MAX_LISTED_PAIRS = 5


@dataclass(frozen=True)
class _CheckedShard:
    """A shard of a split and what was found out about it."""

    split: str
    shard: Shard
    result: ShardVerification


class _DatasetWarning(NamedTuple):
    """What may be as it was meant, but has to be known: it costs no exit status."""

    line: str
    summary: str  # for the last line


def verify_dataset(job: VerifyConfig, console: Console) -> int:
    """Check the dataset and tell everything; the exit status.

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
    found = manifest.load(url, allow_elsewhere=job.allow_elsewhere, field="url")
    places = _check_shards(url, found, job, console)
    problems = [(place.shard.name, problem) for place in places for problem in place.result.problems]
    problems += _find_manifest_problems(found) + _find_duplicate_keys(url, places)
    mixed, poor = _report_shuffle_quality(places, job)
    transparent, unrecorded = _report_transparent(found, places)
    warnings = [*_find_duplicate_images(url, places), *_find_skipped_samples(found, places), *unrecorded, *poor]

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    for line in (*_summarize_manifest(found), *transparent):
        say(line)
    for warning in warnings:
        say(f"warning: {warning.line}", "yellow")
    for line in mixed:
        say(line)
    name, told = make_printable(found.name), "; ".join(warning.summary for warning in warnings)
    if problems:
        console.print(_build_table(problems))
        say(f"{name}: {len(problems)} problems" + (f"; beside them {told}" if told else ""), "red")
        return FAILED
    if warnings:
        say(f"{name}: no errors, but {told}", "yellow")
    else:
        say(f"{name}: nothing is wrong", "green")
    return 0


def _check_shards(url: str, found: Manifest, job: VerifyConfig, console: Console) -> list[_CheckedShard]:
    """Every shard's result, in the manifest's order."""
    listed = [(split, shard) for split in sorted(found.splits) for shard in found.splits[split]]
    results: dict[int, ShardVerification] = {}
    unreachable = 0

    def receive(number: int, result: ShardVerification) -> None:
        nonlocal unreachable
        results[number] = result
        unreachable += result.unreachable is not None
        if result.unreachable is not None and unreachable >= MAX_UNREACHABLE:
            raise result.unreachable

    ranges = RangeReader(job.threads)
    try:
        check = ShardVerifier(url, found, job.deep, ranges)
        shards = [shard for _, shard in listed]
        shard_pool.run_on_shards(
            shards, check, receive, job.threads, console, "verifying", sum(shard.bytes for shard in shards)
        )
    finally:
        ranges.close()
    return [_CheckedShard(split, shard, results[number]) for number, (split, shard) in enumerate(listed)]


def _find_manifest_problems(found: Manifest) -> list[tuple[str, str]]:
    problems = [] if found.splits else [(manifest.FILE_NAME, "it has no split")]
    for split, shards in sorted(found.splits.items()):
        if not found.count_samples(split):
            problems.append((manifest.FILE_NAME, f"split {split!r} has no sample"))
        times = Counter(shard.name for shard in shards)
        problems += [(name, f"listed {count} times in split {split!r}") for name, count in times.items() if count > 1]
    return problems


def _find_duplicate_keys(url: str, places: Sequence[_CheckedShard]) -> list[tuple[str, str]]:
    """Keys that stand for several samples of a split."""
    problems = []
    for split in sorted({place.split for place in places}):
        own = [place for place in places if place.split == split]
        columns = [place.result.keys for place in own]
        pairs = index.find_equal_pairs(columns)
        shown = 0
        shard, row = index.locate_rows(columns, pairs)
        for (first, second), (at, also) in zip(shard.tolist(), row.tolist(), strict=True):
            key = _read_key(url, own[first], at)
            if key == _read_key(url, own[second], also):  # not only their hashes
                problems.append((own[second].shard.name, f"key {key!r} is also in {own[first].shard.name}"))
                shown += 1
            if shown == MAX_LISTED_PAIRS:
                break
        if shown == MAX_LISTED_PAIRS < len(pairs):
            problems.append(
                (manifest.FILE_NAME, f"{len(pairs)} keys of split {split!r} are there twice; {shown} are listed")
            )
    return problems


def _find_duplicate_images(url: str, places: Sequence[_CheckedShard]) -> list[_DatasetWarning]:
    """Images that are there twice: real datasets have some, so they are no problem but to be known."""
    columns = [place.result.checksums for place in places]
    lengths, labels = (
        np.concatenate([getattr(place.result, name) for place in places] or [np.empty(0)])
        for name in ("lengths", "labels")
    )
    pairs = index.find_equal_pairs(columns)
    pairs = pairs[lengths[pairs[:, 0]] == lengths[pairs[:, 1]]]
    shard, row = index.locate_rows(columns, pairs)
    splits = [place.split for place in places]
    grouped: dict[tuple[str, str], list[int]] = {}
    for number, (first, second) in enumerate(shard.tolist()):
        grouped.setdefault((splits[first], splits[second]), []).append(number)
    lines = []
    for (one, other), chosen in sorted(grouped.items()):
        differing = int((labels[pairs[chosen, 0]] != labels[pairs[chosen, 1]]).sum())
        what = f"are twice in {one}" if one == other else f"of {one} are also in {other} (leakage)"
        named = [
            " = ".join(
                f"{places[s].shard.name} {_read_key(url, places[s], r)!r}"
                for s, r in zip(shard[n].tolist(), row[n].tolist(), strict=True)
            )
            for n in chosen[:MAX_LISTED_PAIRS]
        ]
        summary = f"{len(chosen)} images {what}" + (f", {differing} with another label" if differing else "")
        lines.append(
            _DatasetWarning(f"{len(chosen)} images {what}, {differing} with another label: {'; '.join(named)}", summary)
        )
    return lines


def _find_skipped_samples(found: Manifest, places: Sequence[_CheckedShard]) -> list[_DatasetWarning]:
    """Samples of the tars that the dataset does not have."""
    fields, warnings = label_format.parse_manifest_values(found.made).fields, []
    for split in sorted(found.splits):
        skipped = NO_SKIPPED_SAMPLES
        for place in (place for place in places if place.split == split):
            skipped = skipped.merge(place.result.skipped)
        # What has no image under any name, such as a README, is no loss.
        if skipped.images:
            told = skipped.describe(fields, skipped.samples + found.count_samples(split))
            summary = f"{skipped.samples} samples of the {split} tars are left out"
            warnings.append(_DatasetWarning(f"{split}: left out: {told}", summary))
    return warnings


def _read_key(url: str, place: _CheckedShard, row: int) -> str:
    """The key of a sample; its number where the index cannot tell."""
    try:
        keys = index.load(url, place.shard).keys
    except DataError:
        return f"#{row}"
    return keys[row] if row < len(keys) else f"#{row}"


def _summarize_manifest(found: Manifest) -> list[str]:
    lines = [f"{make_printable(found.name)}: {len(found.classes)} classes, digest {found.digest()}"]
    for split, shards in sorted(found.splits.items()):
        total = sum(shard.bytes for shard in shards)
        lines.append(f"{split}: {found.count_samples(split)} samples in {len(shards)} shards, {total / 2**30:.2f} GiB")
    return lines


def _report_transparent(found: Manifest, places: Sequence[_CheckedShard]) -> tuple[list[str], list[_DatasetWarning]]:
    """Transparent images, which only decoding finds: a line for each split, and a warning when nothing records them."""
    counts = {
        split: sum(place.result.transparent for place in places if place.split == split)
        for split in sorted(found.splits)
    }
    lines = describe_transparent(counts)
    if not lines or manifest.BACKGROUND_KEY in found.made:
        return lines, []
    warning = (
        "transparent images are not recorded in the manifest, which is of a version that ignored transparency: pack or "
        "index the dataset again, or earlier runs and stored scores count as of the same pixels"
    )
    return lines, [_DatasetWarning(warning, "transparent images are not recorded")]


def _report_shuffle_quality(
    places: Sequence[_CheckedShard], job: VerifyConfig
) -> tuple[list[str], list[_DatasetWarning]]:
    """How well the labels are mixed: as a line, and as a warning when it is poor."""
    columns = [place.result.labels for place in places if place.split == TRAIN]
    if not columns:
        return [], []
    found = shuffle_quality.measure_shuffle_quality(columns, job.order, job.batch_size)
    return (
        ([], [_DatasetWarning(found.format_message(), "labels are poorly mixed")])
        if found.is_poor
        else ([found.format_message()], [])
    )


def _build_table(problems: Sequence[tuple[str, str]]) -> Table:
    table = Table("where", "what is wrong")
    for where, what in problems:
        table.add_row(Text(make_printable(where)), Text(make_printable(what)))
    return table


# Columns of an index, and what they are called when they differ.
_COLUMN_WORDS = {"labels": "label", "offsets": "offset", "lengths": "length", "checksums": "checksum"}


@dataclass(frozen=True)
class ShardVerification:
    """What was found out about a shard; the columns, 28 bytes a sample, are empty when nothing could be read."""

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

    def __init__(self, url: str, found: Manifest, deep: bool, ranges: RangeReader) -> None:
        self._url, self._manifest, self._decodes, self._ranges = url, found, deep, ranges
        self._labels = label_format.parse_manifest_values(found.made, found.classes, found.titles)

    def __call__(self, shard: Shard, tick: Callable[[int], None]) -> ShardVerification:
        """All that is wrong with a shard."""
        problems: list[str] = []
        others = OtherMembers()
        transparent: list[str] = []
        try:
            listing = self._load_index(shard, problems)
            held = self._index_tar(shard, problems, tick, others, transparent)
        except StorageError as error:
            return _build_verification((*problems, str(error)), None, error)
        if listing is not None and held is not None and (said := _describe_difference(listing, held)):
            problems.append(f"its index is not what the tar holds: {said}; index the dataset again")
        found = replace(_build_verification(problems, held or listing), transparent=len(transparent))
        return replace(found, skipped=others.find_skipped(set(held.keys))) if held is not None else found

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
        """The index that the tar should have; None when it cannot be read to its end."""
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
        held, unread = None, None
        try:
            held = index.index_members(members, "the tar", self._labels.build_reader(), fields, others)
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
        return held


def _decode_members(members: Iterable[TarMember], images: Sequence[str], undecodable: list[str]) -> Iterator[TarMember]:
    """The members, each image decoded on the way."""
    for member in members:
        if member.extension in images:
            try:
                decode.decode_image(bytes(member.payload))
            except BadSampleError as error:
                undecodable.append(f"sample {member.key!r} at byte {member.offset} cannot be decoded: {error}")
        yield member


def _describe_difference(listing: ShardIndex, held: ShardIndex) -> str:
    """The first place where two indexes differ; empty when they do not."""
    if len(listing.keys) != len(held.keys):
        return f"{len(listing.keys)} samples in the index, {len(held.keys)} in the tar"
    for number, (listed, there) in enumerate(zip(listing.keys, held.keys, strict=True)):
        if listed != there:
            return f"sample {number} has the key {listed!r} in the index, {there!r} in the tar"
    for column, word in _COLUMN_WORDS.items():
        listed, there = getattr(listing, column), getattr(held, column)
        if len(rows := np.flatnonzero(listed != there)):
            row = int(rows[0])
            return (
                f"sample {held.keys[row]!r} has the {word} {listed[row]} in the index, {there[row]} in the tar "
                f"({len(rows)} such samples)"
            )
    return ""


def _build_verification(
    problems: Sequence[str], known: ShardIndex | None, unreachable: StorageError | None = None
) -> ShardVerification:
    listing = known or ShardIndex((), *(np.empty(0, np.int64),) * 3, np.empty(0, np.uint64))
    # Labels out of range were told; here they only have to fit.
    narrow = np.clip(listing.labels, -1, np.iinfo(np.int32).max).astype(np.int32)
    hashes = KeyColumn(listing.keys).compute_hashes()
    return ShardVerification(tuple(problems), narrow, hashes, listing.checksums, listing.lengths, unreachable)
