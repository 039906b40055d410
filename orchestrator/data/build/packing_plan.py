"""Plan of a packing, which rows make which shard; and the records by which an unfinished packing is resumed."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orchestrator.config import redaction
from orchestrator.config.base import Config, compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_object
from orchestrator.data import rng
from orchestrator.data.build.config import ManifestValues, PackConfig, ShardLayout
from orchestrator.data.build.sources.listing import ImageRow, SplitListing
from orchestrator.data.data_errors import DataError
from orchestrator.data.manifest import Shard
from orchestrator.storage import file_io, urls

PACKING_FOLDER = "_packing"  # below the dataset's, as long as it is being packed
# Beside its image a sample takes two headers, the label and, on average, half a record of filling.
SAMPLE_OVERHEAD_BYTES = 512 * 3 + 256
IO_THREADS = 16  # for small objects: a store answers each in its own time

ShardId = tuple[str, int]  # split and number
# By split: its listing, and the rows of each shard.
PlannedRows = dict[str, tuple[SplitListing, list[NDArray[np.int64]]]]


class SplitPlan(Config):
    """A split of a plan."""

    is_tar: bool
    bytes: int
    shards: tuple[int, ...]  # images of each
    per_class: tuple[int, ...]  # images of each

    @property
    def samples(self) -> int:
        """Images, before broken ones are left out."""
        return sum(self.shards)


class PackingPlan(Config):
    """Plan of a packing: what is packed and how."""

    version: int = 1
    identity: dict[str, str]
    name: str
    classes: tuple[str, ...]
    titles: tuple[str, ...]
    made: ManifestValues
    ignored: dict[str, int]
    splits: dict[str, SplitPlan]

    @property
    def samples(self) -> int:
        """Images of all splits."""
        return sum(split.samples for split in self.splits.values())

    @cached_property
    def digest(self) -> str:
        """Short hash of all of it, which names the folder of its rows."""
        return compute_fingerprint(self, length=16)

    def shards(self) -> list[ShardId]:
        """Return every shard, split by split."""
        return [(name, number) for name, split in self.splits.items() for number in range(len(split.shards))]


class ShardTask(Config):
    """One shard to be packed: a task of its own, on any machine that sees both places."""

    url: str  # of the dataset
    plan: str  # its digest
    split: str
    number: int
    root: str
    is_tar: bool
    layout: ShardLayout
    threads: int = Field(4, ge=1)


class LeftOutImage(Config):
    """An image that cannot be trained on."""

    key: str
    source: str
    label: int
    defect: str
    reason: str


class PackedShard(Config):
    """Record of a finished shard; its file is written last."""

    shard: Shard | None = Field(description="None when all of its images were left out")
    images: int
    bytes: int = Field(description="of the source")
    resized: int
    oddities: dict[str, int]
    left_out: tuple[LeftOutImage, ...]


# ------------------------------------------------------------------ rows of each shard
def assign_shards(listing: SplitListing, layout: ShardLayout, split: str, ratio: float) -> list[NDArray[np.int64]]:
    """Return the rows of each shard: shuffled, every class spread evenly; shards differ in bytes by about an image.

    ratio: bytes to be stored for a byte of the source.
    """
    labels, sizes, seed = listing.labels, np.bincount(listing.labels), layout.seed
    draws = rng.permutation(rng.derive_key(seed, f"pack-{split}"), len(labels))
    by_class = draws[np.argsort(labels[draws], kind="stable")]
    own = labels[by_class]
    rank = np.arange(len(labels)) - (np.cumsum(sizes) - sizes)[own]
    # One phase for a class, not for an image: distances are then equal.
    phase = rng.uniform(rng.derive_key(seed, f"pack-phase-{split}"), np.arange(len(sizes)), 1)[:, 0]
    position = (rank + phase[own]) / sizes[own]
    # Ties, such as those of classes of one image, go by the shuffle.
    ties = np.empty(len(labels), dtype=np.int64)
    ties[draws] = np.arange(len(labels))
    rows = by_class[np.lexsort((ties[by_class], position))]
    ends = np.cumsum(listing.lengths[rows] * ratio + SAMPLE_OVERHEAD_BYTES)
    count = min(len(rows), max(layout.min_shards, int(np.ceil(ends[-1] / (layout.shard_mib * 2**20)))))
    middles = ends - np.diff(ends, prepend=0.0) / 2
    bins = np.minimum((middles * (count / ends[-1])).astype(np.int64), count - 1)
    # An image larger than a shard leaves the next one empty.
    parts = np.split(rows, np.flatnonzero(np.diff(bins)) + 1)
    return [
        part[rng.permutation(rng.derive_key(seed, f"pack-shard-{split}", number), len(part))]
        for number, part in enumerate(parts)
    ]


# ------------------------------------------------------------------ plan and records of an unfinished packing
def load_plan(config: PackConfig) -> PackingPlan | None:
    """Return the plan that is at the command's URL, if any. Raises DataError if damaged or of another command."""
    url = file_io.join(config.url, PACKING_FOLDER, "plan.json")
    try:
        plan = PackingPlan.from_dict(parse_object(file_io.read_bytes(url)))
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError) as error:
        where = f"{redaction.redact(url)}: damaged, or of another version"
        raise DataError(f"{where}: {error}; remove {PACKING_FOLDER} and start anew") from None
    command = config.describe_identity()
    for name in (*command, *plan.identity):
        theirs, ours = plan.identity.get(name, ""), command.get(name, "")
        if theirs != ours:
            what = f"an unfinished packing with {name} {theirs!r} is there, this command has {ours!r}"
            fix = f"give the same to resume it, take another --url, or remove {PACKING_FOLDER}"
            raise DataError(f"url: {redaction.redact(config.url)}: {what}; {fix}")
    return plan


def save_plan(config: PackConfig, plan: PackingPlan, rows: PlannedRows) -> PackingPlan:
    """Write rows and plan; return the plan that counts: the first, when two packers start at the same time."""

    def write(item: tuple[str, int, SplitListing, NDArray[np.int64]]) -> None:
        name, number, split, chosen = item
        data = json.dumps(split.select_rows(chosen).to_columns(), separators=(",", ":")).encode()
        file_io.write_bytes(_make_record_url(config.url, f"rows/{plan.digest}", name, number), data)

    parts = [(name, n, split, part) for name, (split, shards) in rows.items() for n, part in enumerate(shards)]
    with ThreadPoolExecutor(IO_THREADS) as pool:
        list(pool.map(write, parts))
    if file_io.create_bytes(file_io.join(config.url, PACKING_FOLDER, "plan.json"), plan.to_json().encode()):
        return plan
    if (other := load_plan(config)) is None:
        raise DataError(f"{redaction.redact(config.url)}: another packing began and ended meanwhile; see what is there")
    return other


def read_rows(task: ShardTask) -> list[ImageRow]:
    """Return the rows of a task's shard. Raises DataError when they are not there or damaged."""
    url = _make_record_url(task.url, f"rows/{task.plan}", task.split, task.number)
    shown = redaction.redact(url)
    try:
        columns = parse_object(file_io.read_bytes(url))
        return [ImageRow(*values) for values in zip(*columns.values(), strict=True)]
    except FileNotFoundError:
        needed = "it must be in a folder that all nodes share, and no other packing of it may have ended meanwhile"
        raise DataError(f"{shown}: not visible on node {socket.gethostname()}: {needed}") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{shown}: damaged: {error!r}; remove {PACKING_FOLDER} and start the packing anew") from None


def save_entry(task: ShardTask, entry: PackedShard) -> None:
    """Write the record of a finished shard."""
    file_io.write_bytes(_make_record_url(task.url, "done", task.split, task.number), entry.to_json().encode())


def load_finished_shards(url: str, plan: PackingPlan) -> dict[ShardId, PackedShard]:
    """Return the records of the shards whose tar is there in full. Raises DataError for a damaged record."""
    there = set(file_io.list_names(file_io.join(url, PACKING_FOLDER, "done")))
    places = ((shard, _make_record_url(url, "done", *shard)) for shard in plan.shards())
    entry_urls = {shard: place for shard, place in places if urls.get_basename(place) in there}
    sizes = {name: file_io.list_sizes(file_io.join(url, name)) for name in plan.splits}
    with ThreadPoolExecutor(IO_THREADS) as pool:
        entries = zip(entry_urls, pool.map(_read_entry, entry_urls.values()), strict=True)
        return {
            (name, number): entry
            for (name, number), entry in entries
            if entry.images == plan.splits[name].shards[number]
            and (entry.shard is None or sizes[name].get(urls.get_basename(entry.shard.name)) == entry.shard.bytes)
        }


def _read_entry(url: str) -> PackedShard:
    try:
        return PackedShard.from_dict(parse_object(file_io.read_bytes(url)))
    except (ConfigError, ValueError) as error:
        raise DataError(f"{redaction.redact(url)}: damaged: {error}; remove it to pack that shard again") from None


def _make_record_url(url: str, folder: str, split: str, number: int) -> str:
    """Return where rows are kept, in a folder for each plan, since of two packers only one wins; or finished shards."""
    return file_io.join(url, PACKING_FOLDER, folder, f"{split}-{number:06d}.json")
