"""What a packing keeps while it is under way, so that it can go on after a kill.

URL/_packing/plan.json      what is packed and how; written after the rows, so a plan that is there is whole
URL/_packing/rows/PLAN/     the rows of each shard, by the digest of the plan
URL/_packing/done/          an entry for each finished shard, written after its tar and index
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from orchestrator.config.base import Config
from orchestrator.config.errors import ConfigError
from orchestrator.config.fingerprint import fingerprint
from orchestrator.config.json_text import parse_object
from orchestrator.data import pack_plan, shard_packing
from orchestrator.data.errors import DataError
from orchestrator.data.pack_config import Made, Pack
from orchestrator.data.shard_packing import PACKING, Entry
from orchestrator.data.sources.listing import SplitListing
from orchestrator.storage import files, urls

PLAN_VERSION = 1
# Small objects are written and read side by side: a store answers each in its own time.
STREAMS = 16

ShardId = tuple[str, int]  # split and number
# By split: its listing, and the rows of each shard.
PlannedRows = dict[str, tuple[SplitListing, list[pack_plan.Rows]]]


class PlannedSplit(Config):
    """A split of a plan."""

    is_tar: bool
    bytes: int
    shards: tuple[int, ...]  # images of each
    per_class: tuple[int, ...]  # images of each

    @property
    def samples(self) -> int:
        """Images, before broken ones are left out."""
        return sum(self.shards)


class Plan(Config):
    """What is packed and how."""

    version: int = PLAN_VERSION
    identity: dict[str, str]
    name: str
    classes: tuple[str, ...]
    titles: tuple[str, ...]
    made: Made
    ignored: dict[str, int]
    splits: dict[str, PlannedSplit]

    @property
    def samples(self) -> int:
        """Images of all splits."""
        return sum(split.samples for split in self.splits.values())

    def digest(self) -> str:
        """A short hash of all of it, which names the folder of its rows."""
        return fingerprint(self, length=16)

    def shards(self) -> list[ShardId]:
        """Every shard, split by split."""
        return [(name, number) for name, split in self.splits.items() for number in range(len(split.shards))]


def load(url: str) -> Plan | None:
    """The plan of the unfinished packing at `url`, None when there is none. Raises DataError when it is damaged."""
    where = files.join(url, PACKING, "plan.json")
    try:
        plan = Plan.from_dict(parse_object(files.read_bytes(where)))
    except FileNotFoundError:
        return None
    except (ConfigError, ValueError) as error:
        raise DataError(
            f"{urls.redact(where)}: damaged, or of another version: {error}; remove {PACKING} and start anew"
        ) from None
    return plan


def keep(config: Pack, plan: Plan, rows: PlannedRows) -> Plan:
    """Write rows and plan; the plan of who was first, when two start at the same time."""
    url, digest = config.url, plan.digest()

    def kept(item: tuple[str, int, SplitListing, pack_plan.Rows]) -> None:
        name, number, split, chosen = item
        shard_packing.write_rows(shard_packing.rows_url(url, digest, name, number), split.take(chosen))

    parts = ((name, n, split, part) for name, (split, shards) in rows.items() for n, part in enumerate(shards))
    for _ in shard_packing.in_order(kept, parts, STREAMS):
        pass
    if files.create_bytes(files.join(url, PACKING, "plan.json"), plan.to_json().encode()):
        return plan
    other = load(url)
    if other is None:
        raise DataError(f"{urls.redact(url)}: another packing began and ended meanwhile; look at what is there")
    refuse_another(other, config)
    return other


def refuse_another(plan: Plan, config: Pack) -> None:
    """Raise DataError when the plan is that of another command."""
    for name, ours in config.identity().items():
        theirs = plan.identity.get(name, "")
        if theirs != ours:
            raise DataError(
                f"url: {urls.redact(config.url)}: an unfinished packing with {name} {theirs!r} is there, this command "
                f"has {ours!r}: give the same to go on with it, take another --url, or remove {PACKING} there"
            )
    if plan.identity.keys() != config.identity().keys():
        raise DataError(f"url: {urls.redact(config.url)}: an unfinished packing of another kind of source is there")


def done(url: str, plan: Plan) -> dict[ShardId, Entry]:
    """Entries of the shards whose tar is there in full."""
    there = set(files.list_names(files.join(url, PACKING, "done")))
    shards = [shard for shard in plan.shards() if urls.name(shard_packing.entry_url(url, *shard)) in there]
    sizes = {name: files.sizes(files.join(url, name)) for name in plan.splits}
    with ThreadPoolExecutor(STREAMS) as pool:
        read = pool.map(lambda shard: shard_packing.read_entry(shard_packing.entry_url(url, *shard)), shards)
        found = dict(zip(shards, read, strict=True))
    return {
        (name, number): entry
        for (name, number), entry in found.items()
        if entry.shard is None or sizes[name].get(urls.name(entry.shard.name)) == entry.shard.bytes
    }
