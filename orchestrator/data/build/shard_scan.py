"""One pass over a WebDataset tar, for its index, checksum and oddities; and the same pass over many tars in threads."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from orchestrator.config.redaction import make_printable
from orchestrator.data import index, shuffle_quality
from orchestrator.data.build import tar_reader
from orchestrator.data.build.config import IndexConfig, VerifyConfig
from orchestrator.data.build.label_format import LabelFormat, OtherMembers, SkippedSamples
from orchestrator.data.build.tar_reader import TarMember
from orchestrator.data.data_errors import BadSampleError, DataError
from orchestrator.data.index import KeyColumn, ShardIndex, compute_checksum
from orchestrator.data.manifest import Manifest, Shard
from orchestrator.data.transforms import decode
from orchestrator.storage.file_io import StorageError
from orchestrator.storage.ranged_reads import RangeReader

T = TypeVar("T")
R = TypeVar("R")

TRAIN, VALIDATION = "train", "validation"
# Of a kind of duplicates as many are named.
MAX_LISTED_PAIRS = 5
# A log has no moving bar; it gets a line at times.
LOG_SECONDS = 60.0


def index_tar(data: bytes, name: str) -> ShardIndex:
    """Return the index of a WebDataset tar in memory: an image and a `cls` member (decimal label) for each key.

    Raises DataError when a sample lacks one of the two or has one twice, or the tar is truncated or damaged.
    """
    labels, others = LabelFormat(), OtherMembers()
    members = tar_reader.iter_members([data], name, labels.extensions, others.add)
    return _index_members(members, name, labels, labels.build_reader(), others)


def _index_members(
    members: Iterable[TarMember],
    name: str,
    labels: LabelFormat,
    read_label: Callable[[memoryview], int],
    others: OtherMembers,
) -> ShardIndex:
    """Return the index of a tar's members: an image and a label for each key.

    Raises DataError when a sample lacks image or label, or has one twice.
    """
    ranks = {extension: rank for group in (labels.images, labels.labels) for rank, extension in enumerate(group)}
    numbers: dict[str, tuple[int, int]] = {}  # rank and label
    images: dict[str, tuple[int, int, int, int]] = {}  # rank, offset, length, checksum
    for member in members:
        key, rank, is_label = member.key, ranks[member.extension], member.extension in labels.labels
        if (before := (numbers if is_label else images).get(key)) is not None:
            if before[0] == rank or not (is_label or labels.is_chosen):
                fix, what = "keys must be unique", "labels" if is_label else "images"
                if before[0] != rank:
                    first = labels.images[before[0]]
                    fix = f".{first} and .{member.extension}; set --image-key {first} if that is the one to train on"
                raise DataError(f"{name}: sample {key!r} has two {what}, the second at byte {member.offset}: {fix}")
            if before[0] < rank:
                continue
        if not is_label:
            images[key] = (rank, member.offset, len(member.payload), compute_checksum(member.payload))
            continue
        try:
            numbers[key] = (rank, read_label(member.payload))
        except ValueError as error:
            raise DataError(f"{name}: sample {key!r}: {error}") from None
    if odd := sorted(numbers.keys() ^ images.keys()):
        has = "a label" if odd[0] in numbers else "an image"
        raise DataError(
            f"{name}: sample {odd[0]!r} lacks an image or a label: it has {has} only ({len(odd)} such samples)"
            f"{others.describe()}"
        )
    _, *columns = zip(*images.values(), strict=True) if images else ((), (), (), ())
    return ShardIndex.build(images, [numbers[key][1] for key in images], *columns)


class TarScan:
    """One pass over the tar at a URL, which errors call `name`; what was met on the way."""

    def __init__(
        self, url: str, name: str, labels: LabelFormat, ranges: RangeReader, looks: bool = True, decodes: bool = False
    ) -> None:
        """Scan nothing yet. looks: whether transparent images are counted; decodes: whether every image is decoded."""
        self._name, self._labels, self._looks, self._decodes = name, labels, looks, decodes
        self._blocks = self._read_blocks(url, ranges)
        self._sha256 = hashlib.sha256()
        self.bytes = 0
        self.others = OtherMembers()
        self.transparent = 0  # images
        self.undecodable: list[str] = []

    @property
    def sha256(self) -> str:
        """Checksum of the bytes so far, in hex."""
        return self._sha256.hexdigest()

    def build_index(self, read_label: Callable[[memoryview], int]) -> ShardIndex:
        """Read the tar and return its index.

        Raises FileNotFoundError, StorageError, and DataError for a damaged tar or an unfit sample.
        """
        members = tar_reader.iter_members(self._blocks, self._name, self._labels.extensions, self.others.add)
        return _index_members(self._check_images(members), self._name, self._labels, read_label, self.others)

    def read_rest(self) -> None:
        """Read what a damaged tar left unread, for size and checksum."""
        for _ in self._blocks:
            pass

    def _read_blocks(self, url: str, ranges: RangeReader) -> Iterator[bytearray]:
        for block in tar_reader.read_blocks(url, ranges):
            self._sha256.update(block)
            self.bytes += len(block)
            yield block

    def _check_images(self, members: Iterable[TarMember]) -> Iterator[TarMember]:
        for member in members:
            is_image = member.extension in self._labels.images
            if is_image and self._looks:
                with suppress(BadSampleError):
                    self.transparent += decode.is_transparent(member.payload)
            if is_image and self._decodes:
                try:
                    decode.decode_image(bytes(member.payload))
                except BadSampleError as error:
                    self.undecodable.append(f"sample {member.key!r} at byte {member.offset} cannot be decoded: {error}")
            yield member


# ------------------------------------------------------------------ all tars of a dataset
@dataclass(frozen=True)
class ScannedShard:
    """Columns over the S samples of a shard, 28 bytes a sample; empty when nothing could be read."""

    shard: Shard
    split: str
    labels: NDArray[np.int32]  # S
    keys: NDArray[np.uint64]  # S, hashes
    checksums: NDArray[np.uint64]  # S
    lengths: NDArray[np.int64]  # S, bytes
    skipped: SkippedSamples
    transparent: int  # images
    problems: tuple[str, ...] = ()
    unreachable: StorageError | None = None  # the storage failed: nothing is known

    @classmethod
    def build(
        cls,
        shard: Shard,
        split: str,
        listing: ShardIndex | None,
        skipped: SkippedSamples | None = None,
        transparent: int = 0,
        problems: Sequence[str] = (),
        unreachable: StorageError | None = None,
    ) -> ScannedShard:
        """Return the columns of an index."""
        listing = listing or ShardIndex.build((), (), (), (), ())
        # Labels out of range are problems already; here they only have to fit.
        labels = np.clip(listing.labels, -1, np.iinfo(np.int32).max).astype(np.int32)
        columns = (labels, KeyColumn(listing.keys).compute_hashes(), listing.checksums, listing.lengths)
        return cls(shard, split, *columns, skipped or SkippedSamples(), transparent, tuple(problems), unreachable)

    def read_key(self, url: str, row: int) -> str:
        """Return the key of a sample of the dataset at `url`; its number where the index does not have it."""
        try:
            return index.load(url, self.shard).keys[row]
        except (DataError, IndexError):
            return f"#{row}"


def run_on_shards(
    items: Sequence[T],
    sizes: Sequence[int],
    work: Callable[[T, RangeReader], R],
    receive: Callable[[int, R], None],
    threads: int,
    console: Console,
    title: str,
) -> None:
    """Do `work(item, ranges)` on all items and hand each result to `receive(number, result)` here, as they are done.

    sizes: bytes of each, for the progress on the screen or in the log. When another item's work, `receive` or Ctrl-C
    raised, the next read of every other item fails, and what was raised is raised here. After Ctrl-C no read that waits
    for a store is waited for.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    pool, reported = ThreadPoolExecutor(threads), time.monotonic()
    with bar, closing(RangeReader(threads)) as ranges:
        task = bar.add_task(title, total=sum(sizes))
        try:
            pending = {pool.submit(work, item, ranges): number for number, item in enumerate(items)}
            for done, future in enumerate(as_completed(pending), start=1):
                receive(pending[future], future.result())
                bar.advance(task, sizes[pending[future]])
                if not console.is_terminal and time.monotonic() - reported > LOG_SECONDS:
                    reported = time.monotonic()
                    print_line(console, f"{title}: {done} of {len(items)} shards")
        except BaseException as error:
            ranges.close()
            pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
            raise
        pool.shutdown()


def find_duplicate_keys(url: str, shards: Sequence[ScannedShard]) -> tuple[list[tuple[str, str, str]], int]:
    """Return keys that stand for two samples of a split, each with the names of both shards, and how many there are.

    The first MAX_LISTED_PAIRS are returned. Keys are compared, not only their hashes.
    """
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


def summarize_shards(
    dataset: Manifest, labels: LabelFormat, shards: Sequence[ScannedShard], job: IndexConfig | VerifyConfig
) -> tuple[list[str], list[str]]:
    """Return lines about a dataset, and warnings: what may be intended, but has to be known."""
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
        skipped = SkippedSamples()
        for shard in own:
            skipped = skipped.merge(shard.skipped)
        if skipped.samples:
            described = f"{split}: left out: {skipped.describe(labels, samples)}"
            (warnings if skipped.has_images else lines).append(described)
        if split == TRAIN and own:
            quality = shuffle_quality.measure_shuffle_quality([one.labels for one in own], job.order, job.batch_size)
            (warnings if quality.is_poor else lines).append(quality.format_message())
    return lines, warnings


def print_line(console: Console, line: str, style: str = "") -> None:
    """Print a line as it is, without markup, colours of numbers or breaks."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
