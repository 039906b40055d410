"""Plan of a packing: which rows make which shard; and the records by which an unfinished packing is resumed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.config import redaction
from orchestrator.config.base import Config, compute_fingerprint
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_object
from orchestrator.data import rng
from orchestrator.data.build import shard_packer
from orchestrator.data.build.config import ManifestValues, PackConfig
from orchestrator.data.build.shard_packer import PACKING_FOLDER, PackedShard
from orchestrator.data.build.sources.listing import SplitListing
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io, urls

# Beside its image a sample takes two headers, the label and, on average, half a record of filling.
SAMPLE_OVERHEAD_BYTES = 512 * 3 + 256
PLAN_VERSION = 1
# Small objects are written and read in parallel: a store answers each in its own time.
IO_THREADS = 16

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

    version: int = PLAN_VERSION
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


# ------------------------------------------------------------------ rows of each shard
def order_rows(labels: NDArray[np.int64], seed: int, split: str) -> NDArray[np.int64]:
    """Return the N rows in the order that is cut into shards: shuffled, and every class spread evenly."""
    sizes = np.bincount(labels)
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
    return by_class[np.lexsort((ties[by_class], position))]


def assign_shards(
    listing: SplitListing, seed: int, split: str, shard_bytes: float, min_shards: int, ratio: float = 1.0
) -> list[NDArray[np.int64]]:
    """Return the rows of each shard, shuffled; shards differ in bytes by about an image.

    ratio: bytes to be stored for a byte of the source.
    """
    rows = order_rows(listing.labels, seed, split)
    ends = np.cumsum(listing.lengths[rows] * ratio + SAMPLE_OVERHEAD_BYTES)
    count = min(len(rows), max(min_shards, int(np.ceil(ends[-1] / shard_bytes))))
    middles = ends - np.diff(ends, prepend=0.0) / 2
    bins = np.minimum((middles * (count / ends[-1])).astype(np.int64), count - 1)
    # An image larger than a shard leaves the next one empty.
    parts = np.split(rows, np.flatnonzero(np.diff(bins)) + 1)
    return [
        part[rng.permutation(rng.derive_key(seed, f"pack-shard-{split}", number), len(part))]
        for number, part in enumerate(parts)
    ]


# ------------------------------------------------------------------ plan and records of an unfinished packing
def load_plan(url: str) -> PackingPlan | None:
    """Return the plan of the unfinished packing at `url`, None when there is none. Raises DataError when damaged."""
    plan_url = file_io.join(url, PACKING_FOLDER, "plan.json")
    try:
        return PackingPlan.from_dict(parse_object(file_io.read_bytes(plan_url)))
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError) as error:
        raise DataError(
            f"{redaction.redact(plan_url)}: damaged, or of another version: {error}; remove {PACKING_FOLDER} and start "
            "anew"
        ) from None


def save_plan(config: PackConfig, plan: PackingPlan, rows: PlannedRows) -> PackingPlan:
    """Write rows and plan; return the plan that counts: the first, when two packers start at the same time."""
    url = config.url

    def write(item: tuple[str, int, SplitListing, NDArray[np.int64]]) -> None:
        name, number, split, chosen = item
        shard_packer.write_rows(shard_packer.make_rows_url(url, plan.digest, name, number), split.select_rows(chosen))

    parts = ((name, n, split, part) for name, (split, shards) in rows.items() for n, part in enumerate(shards))
    for _ in shard_packer.map_in_order(write, parts, IO_THREADS):
        pass
    if file_io.create_bytes(file_io.join(url, PACKING_FOLDER, "plan.json"), plan.to_json().encode()):
        return plan
    other = load_plan(url)
    if other is None:
        raise DataError(f"{redaction.redact(url)}: another packing began and ended meanwhile; look at what is there")
    check_same_command(other, config)
    return other


def check_same_command(plan: PackingPlan, config: PackConfig) -> None:
    """Raise DataError when the plan is that of another command."""
    command = config.describe_identity()
    for name in (*command, *plan.identity):
        theirs, ours = plan.identity.get(name, ""), command.get(name, "")
        if theirs != ours:
            raise DataError(
                f"url: {redaction.redact(config.url)}: an unfinished packing with {name} {theirs!r} is there, this "
                f"command has {ours!r}; give the same to resume it, take another --url, or remove {PACKING_FOLDER}"
            )


def load_finished_shards(url: str, plan: PackingPlan) -> dict[ShardId, PackedShard]:
    """Return the records of the shards whose tar is there in full."""
    there = set(file_io.list_names(file_io.join(url, PACKING_FOLDER, "done")))
    entry_urls = {shard: shard_packer.make_entry_url(url, *shard) for shard in plan.shards()}
    entry_urls = {shard: entry_url for shard, entry_url in entry_urls.items() if urls.get_basename(entry_url) in there}
    sizes = {name: file_io.list_sizes(file_io.join(url, name)) for name in plan.splits}
    with ThreadPoolExecutor(IO_THREADS) as pool:
        entries = zip(entry_urls, pool.map(shard_packer.read_entry, entry_urls.values()), strict=True)
        return {
            (name, number): entry
            for (name, number), entry in entries
            if entry.shard is None or sizes[name].get(urls.get_basename(entry.shard.name)) == entry.shard.bytes
        }
