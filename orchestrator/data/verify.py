"""`shards.py verify`: all that is wrong with a dataset, not only the first thing.

Every byte is read once. Duplicates among samples are found by hashes in memory, about 60 bytes a sample at the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config.errors import ConfigError
from orchestrator.config.printable import printable
from orchestrator.data import duplicates, index, labels, manifest, mixing, shard_tasks
from orchestrator.data.adopted_shard import describe_transparent
from orchestrator.data.errors import DataError
from orchestrator.data.fields import NONE_SKIPPED
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.shards_config import VerifyJob
from orchestrator.data.verified_shard import ShardCheck, Verified
from orchestrator.storage import urls
from orchestrator.storage.ranged import Ranges

FAILED = 1
TRAIN = "train"
# A storage that is down would be asked for every shard, with all its retries.
MAX_UNREACHABLE = 5
# Of a kind of duplicates as many are named.
MAX_PAIRS = 5


@dataclass(frozen=True)
class _Place:
    """A shard of a split and what was found out about it."""

    split: str
    shard: Shard
    result: Verified


class _Warning(NamedTuple):
    """What may be as it was meant, but has to be known: it costs no exit status."""

    line: str
    summary: str  # for the last line


def run(job: VerifyJob, console: Console) -> int:
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
        url = urls.absolute(job.url, "url")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = manifest.load(url, allow_elsewhere=job.allow_elsewhere, field="url")
    places = _checked(url, found, job, console)
    problems = [(place.shard.name, problem) for place in places for problem in place.result.problems]
    problems += _of_manifest(found) + _equal_keys(url, places)
    mixed, poor = _mixed(places, job)
    transparent, unrecorded = _transparent(found, places)
    warnings = [*_equal_images(url, places), *_left_out(found, places), *unrecorded, *poor]

    def say(line: str, style: str = "") -> None:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    for line in (*_summary(found), *transparent):
        say(line)
    for warning in warnings:
        say(f"warning: {warning.line}", "yellow")
    for line in mixed:
        say(line)
    name, told = printable(found.name), "; ".join(warning.summary for warning in warnings)
    if problems:
        console.print(_table(problems))
        say(f"{name}: {len(problems)} problems" + (f"; beside them {told}" if told else ""), "red")
        return FAILED
    if warnings:
        say(f"{name}: no errors, but {told}", "yellow")
    else:
        say(f"{name}: nothing is wrong", "green")
    return 0


def _checked(url: str, found: Manifest, job: VerifyJob, console: Console) -> list[_Place]:
    """Every shard's result, in the manifest's order."""
    listed = [(split, shard) for split in sorted(found.splits) for shard in found.splits[split]]
    results: dict[int, Verified] = {}
    unreachable = 0

    def receive(number: int, result: Verified) -> None:
        nonlocal unreachable
        results[number] = result
        unreachable += result.unreachable is not None
        if result.unreachable is not None and unreachable >= MAX_UNREACHABLE:
            raise result.unreachable

    ranges = Ranges(job.threads)
    try:
        check = ShardCheck(url, found, job.deep, ranges)
        shards = [shard for _, shard in listed]
        shard_tasks.each(
            shards, check, receive, job.threads, console, "verifying", sum(shard.bytes for shard in shards)
        )
    finally:
        ranges.close()
    return [_Place(split, shard, results[number]) for number, (split, shard) in enumerate(listed)]


def _of_manifest(found: Manifest) -> list[tuple[str, str]]:
    problems = [] if found.splits else [(manifest.NAME, "it has no split")]
    for split, shards in sorted(found.splits.items()):
        if not found.samples(split):
            problems.append((manifest.NAME, f"split {split!r} has no sample"))
        times = Counter(shard.name for shard in shards)
        problems += [(name, f"listed {count} times in split {split!r}") for name, count in times.items() if count > 1]
    return problems


def _equal_keys(url: str, places: Sequence[_Place]) -> list[tuple[str, str]]:
    """Keys that stand for several samples of a split."""
    problems = []
    for split in sorted({place.split for place in places}):
        own = [place for place in places if place.split == split]
        columns = [place.result.keys for place in own]
        pairs = duplicates.equal_pairs(columns)
        shown = 0
        shard, row = duplicates.located(columns, pairs)
        for (first, second), (at, also) in zip(shard.tolist(), row.tolist(), strict=True):
            key = _key(url, own[first], at)
            if key == _key(url, own[second], also):  # not only their hashes
                problems.append((own[second].shard.name, f"key {key!r} is also in {own[first].shard.name}"))
                shown += 1
            if shown == MAX_PAIRS:
                break
        if shown == MAX_PAIRS < len(pairs):
            problems.append(
                (manifest.NAME, f"{len(pairs)} keys of split {split!r} are there twice; {shown} are listed")
            )
    return problems


def _equal_images(url: str, places: Sequence[_Place]) -> list[_Warning]:
    """Images that are there twice: real datasets have some, so they are no problem but to be known."""
    columns = [place.result.checksums for place in places]
    lengths, labels = (
        np.concatenate([getattr(place.result, name) for place in places] or [np.empty(0)])
        for name in ("lengths", "labels")
    )
    pairs = duplicates.equal_pairs(columns)
    pairs = pairs[lengths[pairs[:, 0]] == lengths[pairs[:, 1]]]
    shard, row = duplicates.located(columns, pairs)
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
                f"{places[s].shard.name} {_key(url, places[s], r)!r}"
                for s, r in zip(shard[n].tolist(), row[n].tolist(), strict=True)
            )
            for n in chosen[:MAX_PAIRS]
        ]
        summary = f"{len(chosen)} images {what}" + (f", {differing} with another label" if differing else "")
        lines.append(
            _Warning(f"{len(chosen)} images {what}, {differing} with another label: {'; '.join(named)}", summary)
        )
    return lines


def _left_out(found: Manifest, places: Sequence[_Place]) -> list[_Warning]:
    """Samples of the tars that the dataset does not have."""
    fields, warnings = labels.stored(found.made).fields, []
    for split in sorted(found.splits):
        skipped = NONE_SKIPPED
        for place in (place for place in places if place.split == split):
            skipped = skipped.plus(place.result.skipped)
        # What has no image under any name, such as a README, is no loss.
        if skipped.images:
            told = skipped.told(fields, skipped.samples + found.samples(split))
            summary = f"{skipped.samples} samples of the {split} tars are left out"
            warnings.append(_Warning(f"{split}: left out: {told}", summary))
    return warnings


def _key(url: str, place: _Place, row: int) -> str:
    """The key of a sample; its number where the index cannot tell."""
    try:
        keys = index.load(url, place.shard).keys
    except DataError:
        return f"#{row}"
    return keys[row] if row < len(keys) else f"#{row}"


def _summary(found: Manifest) -> list[str]:
    lines = [f"{printable(found.name)}: {len(found.classes)} classes, digest {found.digest()}"]
    for split, shards in sorted(found.splits.items()):
        total = sum(shard.bytes for shard in shards)
        lines.append(f"{split}: {found.samples(split)} samples in {len(shards)} shards, {total / 2**30:.2f} GiB")
    return lines


def _transparent(found: Manifest, places: Sequence[_Place]) -> tuple[list[str], list[_Warning]]:
    """Transparent images, which only decoding finds: a line for each split, and a warning when nothing records them."""
    counts = {
        split: sum(place.result.transparent for place in places if place.split == split)
        for split in sorted(found.splits)
    }
    lines = describe_transparent(counts)
    if not lines or manifest.BACKGROUND in found.made:
        return lines, []
    warning = (
        "transparent images are not recorded in the manifest, which is of a version that ignored transparency: pack or "
        "index the dataset again, or earlier runs and stored scores count as of the same pixels"
    )
    return lines, [_Warning(warning, "transparent images are not recorded")]


def _mixed(places: Sequence[_Place], job: VerifyJob) -> tuple[list[str], list[_Warning]]:
    """How well the labels are mixed: as a line, and as a warning when it is poor."""
    columns = [place.result.labels for place in places if place.split == TRAIN]
    if not columns:
        return [], []
    found = mixing.report(columns, job.order, job.batch_size)
    return ([], [_Warning(found.message(), "labels are poorly mixed")]) if found.poor else ([found.message()], [])


def _table(problems: Sequence[tuple[str, str]]) -> Table:
    table = Table("where", "what is wrong")
    for where, what in problems:
        table.add_row(Text(printable(where)), Text(printable(what)))
    return table
