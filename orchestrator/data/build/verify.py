"""`shards verify`: all that is wrong with a dataset, not only the first thing.

Every byte is read once. Duplicates among samples are found by hashes in memory, about 60 bytes a sample at the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.redaction import make_printable
from orchestrator.data import index, manifest
from orchestrator.data.build import label_format, shard_scan
from orchestrator.data.build.config import VerifyConfig
from orchestrator.data.build.shard_scan import MAX_LISTED_PAIRS, ScannedShard, TarScan, print_line
from orchestrator.data.build.tar_reader import ObjectReader
from orchestrator.data.data_errors import DataError
from orchestrator.data.index import NUMBER_COLUMNS, ShardIndex
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.storage import urls
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

MAX_UNREACHABLE = 5  # a storage that is down would be asked for every shard, with all its retries


def verify_dataset(job: VerifyConfig, console: Console) -> int:
    """Check the dataset, print the findings and return 1 for problems, 0 otherwise, also with warnings.

    A problem is what cannot be read as the manifest says; a warning is about images in two splits or there twice,
    samples that are left out, and labels that are poorly mixed. Raises ConfigError, DataError and StorageError.
    """
    if not job.url:
        raise ConfigError("url: give the dataset's folder with --url")
    url = urls.require_absolute(job.url, "url")
    dataset = manifest.load(url, allow_elsewhere=job.allow_elsewhere, field="url")
    verifier = ShardVerifier(url, dataset, job.deep)
    items = [(split, shard) for split in sorted(dataset.splits) for shard in dataset.splits[split]]
    work = (items, verifier, StorageError, MAX_UNREACHABLE, job.threads, console, "verifying")
    shards = [
        result if isinstance(result, ScannedShard) else ScannedShard(*item, None, problems=(str(result),))
        for item, result in zip(items, shard_scan.run_on_shards(*work), strict=True)
    ]
    problems = [(one.shard.name, problem) for one in shards for problem in one.problems]
    problems += _find_manifest_problems(dataset)
    for split in sorted(dataset.splits):
        duplicates, count = shard_scan.find_duplicate_keys(url, [one for one in shards if one.split == split])
        problems += [(second, f"key {key!r} is also in {first}") for key, first, second in duplicates]
        if len(duplicates) == MAX_LISTED_PAIRS < count:
            listed = f"{count} keys of split {split!r} are there twice; {MAX_LISTED_PAIRS} are listed"
            problems.append((manifest.FILE_NAME, listed))
    warnings = _describe_duplicate_images(url, shards)
    if any(one.transparent for one in shards) and manifest.BACKGROUND_KEY not in dataset.made:
        warnings.append(
            "transparent images are not recorded in the manifest, which is of a version that ignored transparency: "
            "pack or index the dataset again, or earlier runs and stored scores count as of the same pixels"
        )
    name = make_printable(dataset.name)
    print_line(console, f"{name}: {len(dataset.classes)} classes, digest {dataset.digest()}")
    count = shard_scan.print_summary(dataset, verifier.labels, shards, job, console, warnings)
    beside = f"{count} warning{'s' if count > 1 else ''}" if count else ""
    if problems:
        table = Table("where", "what is wrong")
        for where, what in problems:
            table.add_row(Text(make_printable(where)), Text(make_printable(what)))
        console.print(table)
        print_line(console, f"{name}: {len(problems)} problems" + (f" and {beside}" if beside else ""), "red")
        return 1
    verdict = f"no errors, but {beside}" if beside else "nothing is wrong"
    print_line(console, f"{name}: {verdict}", "yellow" if beside else "green")
    return 0


def _find_manifest_problems(dataset: Manifest) -> list[tuple[str, str]]:
    problems = [] if dataset.splits else [(manifest.FILE_NAME, "it has no split")]
    for split, shards in sorted(dataset.splits.items()):
        if not dataset.count_samples(split):
            problems.append((manifest.FILE_NAME, f"split {split!r} has no sample"))
        times = Counter(shard.name for shard in shards)
        problems += [(name, f"listed {count} times in split {split!r}") for name, count in times.items() if count > 1]
    return problems


def _describe_duplicate_images(url: str, checked: Sequence[ScannedShard]) -> list[str]:
    """Return warnings about images that are there twice, as in real datasets."""
    columns = [one.checksums for one in checked]
    lengths = np.concatenate([np.empty(0, np.int64), *(one.lengths for one in checked)])
    labels = np.concatenate([np.empty(0, np.int32), *(one.labels for one in checked)])
    pairs = index.find_equal_pairs(columns)
    pairs = pairs[lengths[pairs[:, 0]] == lengths[pairs[:, 1]]]
    shards, rows = index.locate_rows(list(map(len, columns)), pairs)
    grouped: dict[tuple[str, str], list[int]] = {}
    for number, (first, second) in enumerate(shards.tolist()):
        grouped.setdefault((checked[first].split, checked[second].split), []).append(number)

    def name_pair(number: int) -> str:
        places = zip(shards[number].tolist(), rows[number].tolist(), strict=True)
        return " = ".join(f"{checked[at].shard.name} {checked[at].read_key(url, row)!r}" for at, row in places)

    warnings = []
    for (one, other), numbers in sorted(grouped.items()):
        differing = int((labels[pairs[numbers, 0]] != labels[pairs[numbers, 1]]).sum())
        what = f"are twice in {one}" if one == other else f"of {one} are also in {other} (leakage)"
        named = "; ".join(map(name_pair, numbers[:MAX_LISTED_PAIRS]))
        warnings.append(f"{len(numbers)} images {what}, {differing} with another label: {named}")
    return warnings


class ShardVerifier:
    """Verifies single shards of a dataset; safe for threads."""

    def __init__(self, url: str, dataset: Manifest, deep: bool) -> None:
        self._url, self._manifest, self._deep = url, dataset, deep
        self.labels = label_format.parse_manifest_values(dataset.made, dataset.classes)

    def __call__(self, item: tuple[str, Shard], ranges: RangeReader) -> ScannedShard:
        """Return all that is wrong with a shard, given with its split. Raises StorageError when the storage fails."""
        split, shard = item
        problems: list[str] = []
        url = self._manifest.tar_url(self._url, shard)
        try:
            listing = self._load_index(shard, problems)
            reader = ObjectReader(ranges, url, is_hashed=True)
            scan = TarScan(reader.read, reader.size, "the tar", self.labels, decodes=self._deep)
            actual, unread = None, []
            try:
                actual = scan.build_index()
            except DataError as error:
                unread = [str(error)]
            if reader.size != shard.bytes:
                problems.append(f"the tar has {reader.size} bytes, the manifest says {shard.bytes}")
            elif reader.compute_sha256() != shard.sha256:
                problems.append("the tar does not have the checksum that the manifest names: its bytes have changed")
            problems += unread + scan.undecodable
        except FileNotFoundError:
            problems.append(f"{redaction.redact(url)}: missing although the manifest lists it")
            return ScannedShard(split, shard, listing, problems=problems)
        if listing is None or actual is None:
            return ScannedShard(split, shard, actual or listing, transparent=scan.transparent, problems=problems)
        if difference := _describe_difference(listing, actual):
            problems.append(f"its index is not what the tar holds: {difference}; index the dataset again")
        return ScannedShard(split, shard, actual, scan.count_skipped(actual.keys), scan.transparent, problems)

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
            key, label = listing.keys[int(outside[0])], listing.labels[outside[0]]
            problems.append(f"{len(outside)} labels outside 0 .. {classes - 1}: sample {key!r} has {label}")
        return listing


def _describe_difference(listing: ShardIndex, actual: ShardIndex) -> str:
    """Return the first place where two indexes differ; empty when they do not."""
    if len(listing.keys) != len(actual.keys):
        return f"{len(listing.keys)} samples in the index, {len(actual.keys)} in the tar"
    for column in ("keys", *NUMBER_COLUMNS):
        pairs = enumerate(zip(getattr(listing, column), getattr(actual, column), strict=True))
        rows = [row for row, (listed, there) in pairs if listed != there]
        if rows:
            listed, there = (getattr(one, column)[rows[0]] for one in (listing, actual))
            differing = f"{column.removesuffix('s')} {listed} in the index, {there} in the tar"
            return f"sample {actual.keys[rows[0]]!r} has the {differing} ({len(rows)} such samples)"
    return ""
