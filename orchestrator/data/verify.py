"""`shards.py verify`: all that is wrong with a dataset, not only the first thing.

Every byte is read once. Duplicates among samples are found by hashes in memory, about 60 bytes a sample at the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config.errors import ConfigError
from orchestrator.data import duplicates, index, manifest, mixing, shard_tasks
from orchestrator.data.decode import BACKGROUND_NAME
from orchestrator.data.errors import DataError
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


def run(job: VerifyJob, console: Console) -> int:
    """Check the dataset and tell everything; 0 when nothing is wrong, else 1. Same images twice are only told.

    Raises ConfigError for a place that means nothing, DataError when there is no readable manifest, StorageError when
    the storage is down.
    """
    if not job.url:
        raise ConfigError("url: give the dataset's folder with --url")
    try:
        url = urls.absolute(job.url, "url")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = manifest.load(url)
    places = _checked(url, found, job, console)
    problems = [(place.shard.name, problem) for place in places for problem in place.result.problems]
    problems += _of_manifest(found) + _equal_keys(url, places)
    for line in (*_summary(found), *_transparent(found, places), *_equal_images(url, places), *_mixed(places, job)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not problems:
        console.print(f"{found.name}: nothing is wrong", style="green", highlight=False, markup=False)
        return 0
    console.print(_table(problems))
    console.print(f"{found.name}: {len(problems)} problems", style="red", highlight=False, markup=False)
    return FAILED


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


def _equal_images(url: str, places: Sequence[_Place]) -> list[str]:
    """Lines about images that are there twice: real datasets have some, so they are no problem but to be known."""
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
        lines.append(f"warning: {len(chosen)} images {what}, {differing} with another label: {'; '.join(named)}")
    return lines


def _key(url: str, place: _Place, row: int) -> str:
    """The key of a sample; its number where the index cannot tell."""
    try:
        keys = index.load(url, place.shard).keys
    except DataError:
        return f"#{row}"
    return keys[row] if row < len(keys) else f"#{row}"


def _summary(found: Manifest) -> list[str]:
    lines = [f"{found.name}: {len(found.classes)} classes, digest {found.digest()}"]
    for split, shards in sorted(found.splits.items()):
        total = sum(shard.bytes for shard in shards)
        lines.append(f"{split}: {found.samples(split)} samples in {len(shards)} shards, {total / 2**30:.2f} GiB")
    return lines


def _transparent(found: Manifest, places: Sequence[_Place]) -> list[str]:
    """Lines about transparent images, which only decoding finds."""
    lines = []
    for split in sorted(found.splits):
        count = sum(place.result.transparent for place in places if place.split == split)
        if count:
            lines.append(f"{split}: {count} images are transparent: they are laid on {BACKGROUND_NAME}")
    if lines and manifest.BACKGROUND not in found.made:
        lines.append(
            "warning: the manifest does not record that, as it is of an earlier version, which ignored transparency: "
            "pack or index the dataset again, or stored scores and runs of before count as of the same pixels"
        )
    return lines


def _mixed(places: Sequence[_Place], job: VerifyJob) -> list[str]:
    labels = [place.result.labels for place in places if place.split == TRAIN]
    return [mixing.report(labels, job.order, job.batch_size).message()] if labels else []


def _table(problems: Sequence[tuple[str, str]]) -> Table:
    table = Table("where", "what is wrong")
    for where, what in problems:
        table.add_row(Text(where), Text(what))
    return table
