"""`shards.py index`: manifest and indexes for WebDataset tars made elsewhere; the tars stay where and as they are.

Each tar is read once. What is finished is kept below _indexing, so a second start of the same command goes on; the
manifest comes last. Nothing that a reader would stumble over later is let through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console

from orchestrator.config.errors import ConfigError
from orchestrator.config.printable import printable
from orchestrator.data import (
    class_list,
    duplicates,
    index,
    labels,
    manifest,
    mixing,
    shard_counts,
    shard_names,
    shard_tasks,
)
from orchestrator.data.adopted_shard import Facts, ShardWork, describe_transparent
from orchestrator.data.decode import BACKGROUND_NAME
from orchestrator.data.errors import DataError
from orchestrator.data.fields import Skipped
from orchestrator.data.labels import Labels
from orchestrator.data.manifest import Manifest
from orchestrator.data.shard_counts import Lists
from orchestrator.data.shard_names import Folders
from orchestrator.data.shards_config import IndexJob
from orchestrator.storage import files, urls
from orchestrator.storage.ranged import Ranges

TRAIN, VALIDATION = "train", "validation"
# Where the manifest says how many tars were left out, since they have no member.
EMPTY = "empty_tars"
# Tars made by one program share their faults: no need to read all of them to tell.
MAX_TROUBLES = 20


def run(job: IndexJob, console: Console) -> int:
    """Index the tars and write the manifest; 0 when the dataset is complete.

    Raises ConfigError, DataError and StorageError for what is to be mended first.
    """
    job = _placed(job)
    classes, titles = class_list.read_classes(job.classes) if job.classes else ((), ())
    try:
        how = labels.parse_keys(job.image_key, job.label_key, classes, titles)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folders = Folders(job.url)
    patterns = {TRAIN: job.train, VALIDATION: job.validation}
    names = {split: shard_names.named(folders, pattern, split) for split, pattern in patterns.items() if pattern}
    if both := set(names.get(TRAIN, ())) & set(names.get(VALIDATION, ())):
        raise ConfigError(f"validation: {min(both)} is refused: it is a training tar, too")
    items = [(name, folders.size(name) or 0) for split in names.values() for name in split]
    if files.exists(files.join(job.to, manifest.NAME)):
        return _already(job, how, names, dict(items), console)
    lists = shard_counts.gathered(folders, [name for name, _ in items])
    ranges = Ranges(job.threads)
    try:
        work = ShardWork(job.url, job.to, how, lists, ranges)
        work.begin()
        found = _all(work, items, job.threads, console)
    finally:
        ranges.close()
    by_split = {split: _with_samples([found[name] for name in listed], split) for split, listed in names.items()}
    for facts in by_split.values():
        _refuse_duplicates(job.to, facts)
    how_made = how.made()
    if empty := len(items) - sum(map(len, by_split.values())):
        how_made[EMPTY] = empty
    if any(one.transparent for one in found.values()):
        how_made[manifest.BACKGROUND] = BACKGROUND_NAME
    made = Manifest(
        name=job.name or urls.name(job.url),
        classes=classes or _numbered([one for facts in by_split.values() for one in facts]),
        titles=titles,
        tars=job.url if job.to != job.url else "",
        made=how_made,
        splits={split: tuple(one.shard for one in facts) for split, facts in by_split.items()},
    )
    manifest.save(job.to, made)
    work.end()
    for line in describe_transparent({split: sum(one.transparent for one in by_split[split]) for split in by_split}):
        _say(console, line)
    _tell(job, made, by_split, lists, console)
    for name in (name for name, _ in items if not found[name].shard.samples):
        _say(console, f"warning: {printable(name)}: no member in it: left out", "yellow")
    return 0


def _placed(job: IndexJob) -> IndexJob:
    """The job with places that mean the same everywhere. Raises ConfigError."""
    if not job.url or not (job.train or job.validation):
        raise ConfigError("url: give the folder of the tars with --url, and tars with --train and --validation")
    try:
        url = urls.absolute(job.url, "url")
        to = urls.absolute(job.to, "to") if job.to else url
        classes = urls.absolute(job.classes, "classes") if job.classes else ""
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if to != url and urls.redact(url) != url:
        raise ConfigError(
            f"url: {urls.redact(url)} is given with a password or query, which would stand in the manifest; "
            "give them by the environment"
        )
    return job.model_copy(update={"url": url, "to": to, "classes": classes})


def _all(work: ShardWork, items: Sequence[tuple[str, int]], threads: int, console: Console) -> dict[str, Facts]:
    """The facts of all shards. Raises DataError with everything that is wrong, or the first troubles of many."""
    found: dict[str, Facts] = {}
    troubles: list[str] = []

    def receive(number: int, result: Facts | str) -> None:
        if isinstance(result, Facts):
            found[items[number][0]] = result
            return
        troubles.append(result)
        console.print(f"refused: {result}", style="red", highlight=False, markup=False, soft_wrap=True)
        if len(troubles) == MAX_TROUBLES:
            raise DataError(f"{len(troubles)} tars are refused, the rest was not looked at; {troubles[0]}")

    shard_tasks.each(items, work, receive, threads, console, "indexing", sum(size for _, size in items))
    if troubles:
        raise DataError(troubles[0] if len(troubles) == 1 else f"{len(troubles)} tars are refused; {troubles[0]}")
    return found


def _with_samples(facts: Sequence[Facts], split: str) -> list[Facts]:
    """Those that have samples: a writer that began a shard and stopped leaves one without. Raises DataError."""
    kept = [one for one in facts if one.shard.samples]
    if not kept:
        raise DataError(f"{split}: none of the {len(facts)} tars has a member")
    return kept


def _refuse_duplicates(to: str, facts: Sequence[Facts]) -> None:
    """Keys name samples in ledgers and scores: none may stand for two samples of a split."""
    columns = [one.keys for one in facts]
    pairs = duplicates.equal_pairs(columns)
    shard, row = duplicates.located(columns, pairs)
    for (first, second), (at, also) in zip(shard.tolist(), row.tolist(), strict=True):
        key = index.load(to, facts[first].shard).keys[at]
        if index.load(to, facts[second].shard).keys[also] == key:  # not only their hashes
            raise DataError(
                f"key {key!r} is in {facts[first].shard.name} and in {facts[second].shard.name} "
                f"({len(pairs)} such keys): keys must be unique in a split; pack it anew, or name each tar once"
            )


def _numbered(facts: Sequence[Facts]) -> tuple[str, ...]:
    """Names of classes that have none: their numbers."""
    largest = max(int(one.labels.max()) for one in facts)
    if largest < 1:
        raise DataError(
            "all labels are 0: at least 2 classes are needed; set --label-key if the labels are in another member, or "
            "in a field of a json member"
        )
    return tuple(str(number) for number in range(largest + 1))


def _already(
    job: IndexJob, how: Labels, names: Mapping[str, Sequence[str]], sizes: Mapping[str, int], console: Console
) -> int:
    """Say that the dataset is complete; DataError when it is another one than the job is about."""
    found = manifest.load(job.to, allow_elsewhere=True, field="url" if job.to == job.url else "to")
    there = {shard.name: shard.bytes for shards in found.splits.values() for shard in shards}
    same = {split: len(listed) for split, listed in names.items()} and there.items() <= sizes.items()
    empty = {EMPTY: len(sizes) - len(there)} if len(sizes) > len(there) else {}
    for split, listed in names.items():
        kept = tuple(shard.name for shard in found.splits.get(split, ()))
        same = same and kept == tuple(name for name in listed if name in there)
    same = same and found.splits.keys() == names.keys()
    said = {name: value for name, value in found.made.items() if name != manifest.BACKGROUND}
    same = same and said == how.made() | empty and how.classes in ((), found.classes)
    if not same:
        shown = urls.redact(files.join(job.to, manifest.NAME))
        raise DataError(f"{shown}: is there and is about other tars or labels; remove it to index again")
    console.print(f"{found.name}: already indexed, {len(there)} tars; shards.py verify checks them", highlight=False)
    return 0


def _tell(
    job: IndexJob, made: Manifest, by_split: Mapping[str, Sequence[Facts]], lists: Lists, console: Console
) -> None:
    """What was adopted, and what is odd about it without being wrong."""

    def say(line: str, style: str = "") -> None:
        _say(console, line, style)

    for split, facts in by_split.items():
        held = np.unique(np.concatenate([one.labels for one in facts]))
        total = sum(one.shard.bytes for one in facts)
        many = f"{made.samples(split)} samples of {len(held)} classes"
        say(f"{split}: {many} in {len(facts)} tars, {total / 2**30:.2f} GiB")
        absent = np.setdiff1d(np.arange(len(made.classes)), held)
        if len(absent):
            first = ", ".join(printable(made.classes[number]) for number in absent[:5].tolist())
            say(f"warning: {split}: {len(absent)} of {len(made.classes)} classes have no sample: {first}", "yellow")
        skipped = Skipped()
        for one in facts:
            skipped = skipped.plus(one.skipped)
        if skipped.samples:
            told = skipped.told(labels.stored(made.made).fields, made.samples(split) + skipped.samples)
            if skipped.images:
                say(f"warning: {split}: left out: {told}", "yellow")
            else:
                say(f"{split}: no images: {told}")
    if lists.sources:
        say(f"counts agree with {printable(', '.join(lists.sources))}")
    for source, reason in lists.foreign.items():
        say(f"{printable(source)}: no list of shards, not compared: {printable(reason)}")
    if lists.left_out:
        first = printable(lists.left_out[0])
        say(f"warning: {len(lists.left_out)} tars listed there are not adopted: {first} ...", "yellow")
    if TRAIN in by_split:
        found = mixing.report([one.labels for one in by_split[TRAIN]], job.order, job.batch_size)
        say(found.message(), "yellow" if found.poor else "")
    say(f"{urls.redact(files.join(job.to, manifest.NAME))}: written, digest {made.digest()}")
    if manifest.is_elsewhere(made.tars, job.to):
        say(f"the tars stay in {urls.redact(made.tars)}: each job that reads this dataset needs --allow-elsewhere")


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
