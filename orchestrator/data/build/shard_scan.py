"""One pass over a WebDataset tar, for its index, checksum and oddities; and the same pass over many tars in threads."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from itertools import chain
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from orchestrator.config.redaction import make_printable
from orchestrator.data import index, shuffle_quality
from orchestrator.data.build import tar_reader
from orchestrator.data.build.config import CheckConfig
from orchestrator.data.build.label_format import LabelFormat, describe_others, has_images
from orchestrator.data.build.tar_reader import Read, TarMember
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.index import KeyColumn, ShardIndex, compute_checksum
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms import decode
from orchestrator.storage import file_io
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F", DataError, StorageError)

TRAIN, VALIDATION = "train", "validation"
MAX_LISTED_PAIRS = 5  # of a kind of duplicates
LOG_SECONDS = 60.0  # a log has no moving bar; it gets a line at times


def index_tar(data: bytes, name: str) -> ShardIndex:
    """Return the index of a tar in memory, of images and `cls` members. Raises DataError for unfit ones."""
    return TarScan(lambda start, length: data[start : start + length], len(data), name, LabelFormat()).build_index()


def save_index(url: str, name: str, listing: ShardIndex, size: int, sha256: str) -> Shard:
    """Write the index of the tar `name` below `url`; return the tar's entry of the manifest."""
    data = listing.to_bytes()
    file_io.write_bytes(file_io.join(url, name + index.SUFFIX), data)
    index_sha256 = hashlib.sha256(data).hexdigest()
    return Shard(name=name, samples=len(listing.keys), bytes=size, sha256=sha256, index_sha256=index_sha256)


class TarScan:
    """One pass over a tar, which errors call `name`; what was met on the way."""

    def __init__(self, read: Read, size: int, name: str, labels: LabelFormat, decodes: bool = False) -> None:
        """Read nothing yet. decodes: whether all images are decoded."""
        self._read, self._size, self._name, self._labels, self._decodes = read, size, name, labels, decodes
        self._others: dict[str, list[str]] = {}  # extensions of members that are neither image nor label, by key
        self.transparent = 0  # images
        self.undecodable: list[str] = []

    def build_index(self, is_checked: bool = False) -> ShardIndex:
        """Read the tar and return the index of its images and labels, which must be classes when `is_checked`.

        Raises DataError for a damaged tar, and when a sample lacks image or label, or has one twice.
        """
        labels, name, read_label = self._labels, self._name, self._labels.build_reader(is_checked)
        ranks = {extension: rank for group in (labels.images, labels.labels) for rank, extension in enumerate(group)}
        numbers: dict[str, tuple[int, int]] = {}  # rank and label
        images: dict[str, tuple[int, int, int, int]] = {}  # rank, offset, length, checksum
        for member in tar_reader.iter_members(self._read, self._size, name, labels.extensions, self._others):
            key, rank, is_label = member.key, ranks[member.extension], member.extension in labels.labels
            if (before := (numbers if is_label else images).get(key)) is not None:
                if before[0] == rank or not (is_label or labels.is_chosen):
                    two = "two labels" if is_label else "two images"
                    if before[0] != rank:
                        two += f" (.{labels.images[before[0]]} and .{member.extension}: set --image-key to one of them)"
                    raise DataError(f"{name}: sample {key!r} has {two}, the second at byte {member.offset}")
                if before[0] < rank:
                    continue
            if not is_label:
                images[key] = (rank, member.offset, len(member.payload), compute_checksum(member.payload))
                self._check_image(member)
                continue
            try:
                numbers[key] = (rank, read_label(member.payload))
            except ValueError as error:
                raise DataError(f"{name}: sample {key!r}: {error}") from None
        if odd := sorted(numbers.keys() ^ images.keys()):
            has, kinds = "a label" if odd[0] in numbers else "an image", describe_others(self.count_skipped(()), labels)
            what = f"sample {odd[0]!r} lacks an image or a label: it has {has} only ({len(odd)} such samples)"
            raise DataError(f"{name}: {what}; {kinds}")
        _, *columns = zip(*images.values(), strict=True) if images else ((), (), (), ())
        return ShardIndex.build(images, [numbers[key][1] for key in images], *columns)

    def count_skipped(self, keys: Iterable[str]) -> Counter[str]:
        """Return how many members of samples beside these there are of each extension."""
        taken = set(keys)
        return Counter(chain.from_iterable(kinds for key, kinds in self._others.items() if key not in taken))

    def _check_image(self, member: TarMember) -> None:
        try:
            self.transparent += decode.is_transparent(member.payload)
            if self._decodes:
                decode.decode_image(member.payload)
        except BadSampleError as error:
            if self._decodes:
                self.undecodable.append(f"sample {member.key!r} at byte {member.offset} cannot be decoded: {error}")


# ------------------------------------------------------------------ all tars of a dataset
class ScannedShard:
    """Result of a pass over a shard: columns over its S samples, empty when nothing could be read."""

    def __init__(
        self,
        split: str,
        shard: Shard,
        listing: ShardIndex | None,
        skipped: Mapping[str, int] = MappingProxyType({}),
        transparent: int = 0,
        problems: Sequence[str] = (),
    ) -> None:
        self.split, self.shard, self.transparent, self.problems = split, shard, transparent, problems
        self.skipped = skipped  # members of samples that are left out, by extension
        listing = listing or ShardIndex.build((), (), (), (), ())
        # Labels out of range are problems already; here they only have to fit.
        self.labels = np.clip(listing.labels, -1, np.iinfo(np.int32).max).astype(np.int32)  # S
        self.keys = KeyColumn(listing.keys).compute_hashes()  # S
        self.checksums, self.lengths = listing.checksums, listing.lengths  # S each

    def read_key(self, url: str, row: int) -> str:
        """Return the key of a sample of the dataset at `url`; its number where the index does not have it."""
        try:
            return index.load(url, self.shard).keys[row]
        except (DataError, IndexError):
            return f"#{row}"


def run_on_shards(
    items: Sequence[T],
    work: Callable[[T, RangeReader], R],
    tolerated: type[F],
    limit: int,
    threads: int,
    console: Console,
    title: str,
) -> list[R | F]:
    """Return the result of `work(item, ranges)` for each item, or the tolerated error that it raised.

    After `limit` of those, any other error or Ctrl-C, the next read of every other item fails, and the error is raised.
    After Ctrl-C no read that waits for a store is waited for.
    """
    pool, reported = ThreadPoolExecutor(threads), time.monotonic()
    results, failures = dict[int, R | F](), list[F]()
    with closing(RangeReader(threads)) as ranges:
        try:
            pending = {pool.submit(work, item, ranges): number for number, item in enumerate(items)}
            futures = track(as_completed(pending), title, len(items), console=console, disable=not console.is_terminal)
            for done, future in enumerate(futures, start=1):
                try:
                    results[pending[future]] = future.result()
                except tolerated as error:
                    results[pending[future]] = error
                    failures.append(error)
                    print_line(console, f"error: {error}", "red")
                    if len(failures) == limit:
                        raise tolerated(f"{limit} tars cannot be read, the rest was not tried; {failures[0]}") from None
                if not console.is_terminal and time.monotonic() - reported > LOG_SECONDS:
                    reported = time.monotonic()
                    print_line(console, f"{title}: {done} of {len(items)} shards")
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            ranges.close()
            pool.shutdown(wait=not isinstance(error, KeyboardInterrupt))
            raise
        pool.shutdown()
    return [results[number] for number in range(len(items))]


def find_duplicate_keys(url: str, shards: Sequence[ScannedShard]) -> tuple[list[tuple[str, str, str]], int]:
    """Return the first keys that stand for two samples, each with the names of both shards, and how many there are."""
    columns = [shard.keys for shard in shards]
    pairs = index.find_equal_pairs(columns)
    found: list[tuple[str, str, str]] = []
    numbers, rows = index.locate_rows(list(map(len, columns)), pairs)
    for (one, other), (row, other_row) in zip(numbers.tolist(), rows.tolist(), strict=True):
        first, second = shards[one], shards[other]
        key = first.read_key(url, row)
        if key == second.read_key(url, other_row):
            found.append((key, first.shard.name, second.shard.name))
        if len(found) == MAX_LISTED_PAIRS:
            break
    return found, len(pairs)


def print_summary(
    dataset: Manifest,
    labels: LabelFormat,
    shards: Sequence[ScannedShard],
    job: CheckConfig,
    console: Console,
    more_warnings: Sequence[str] = (),
) -> int:
    """Print lines about a dataset, and warnings, what may be intended, but has to be known; return their number."""
    lines, warnings = list[str](), list[str]()
    for split in sorted(dataset.splits):
        own = [shard for shard in shards if shard.split == split]
        seen = np.unique(np.concatenate([np.empty(0, np.int32), *(shard.labels for shard in own)]))
        samples, size = dataset.count_samples(split), sum(shard.bytes for shard in dataset.splits[split]) / 2**30
        lines.append(f"{split}: {samples} samples of {len(seen)} classes in {len(own)} shards, {size:.2f} GiB")
        absent = np.setdiff1d(np.arange(len(dataset.classes)), seen)
        if len(absent):
            first = ", ".join(make_printable(dataset.classes[number]) for number in absent[:5].tolist())
            lines.append(f"{split}: {len(absent)} of {len(dataset.classes)} classes have no sample: {first}")
        if transparent := sum(shard.transparent for shard in own):
            lines.append(f"{split}: {transparent} images are transparent: they are laid on {decode.BACKGROUND_NAME}")
        if skipped := sum((Counter(shard.skipped) for shard in own), Counter[str]()):
            described = f"{split}: left out: {describe_others(skipped, labels)}"
            (warnings if has_images(skipped) else lines).append(described)
        if split == TRAIN and own:
            quality = shuffle_quality.measure_shuffle_quality([one.labels for one in own], job.order, job.batch_size)
            (warnings if quality.is_poor else lines).append(quality.format_message())
    warnings += more_warnings
    for line in lines:
        print_line(console, line)
    for warning in warnings:
        print_line(console, f"warning: {warning}", "yellow")
    return len(warnings)


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print a line as it is, without markup, colours of numbers or breaks."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
