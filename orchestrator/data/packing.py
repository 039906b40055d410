"""Packing as a whole: a plan that is kept, shards that are packed in any order, a report and a manifest at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property

from orchestrator.data import manifest, pack_plan, pack_report, pack_state, shard_packing
from orchestrator.data.decode import BACKGROUND_NAME
from orchestrator.data.errors import DataError
from orchestrator.data.manifest import Manifest
from orchestrator.data.pack_config import Pack
from orchestrator.data.pack_state import Plan, PlannedRows, PlannedSplit, ShardId
from orchestrator.data.shard_packing import PACKING, Entry, ImageReader, ShardTask, Treatment
from orchestrator.data.sources import kinds
from orchestrator.data.sources.listing import Row, SplitListing
from orchestrator.storage import files, urls
from orchestrator.storage.ranged import Ranges

# Images by which the size of reduced ones is estimated.
ESTIMATE_IMAGES = 256


@dataclass(frozen=True)
class Packing:
    """A packing under way; `done` has the entries of an earlier start."""

    config: Pack
    plan: Plan
    roots: dict[str, str]  # by split; held-out images lie in that of train
    done: dict[ShardId, Entry]

    @cached_property
    def _plan_digest(self) -> str:
        return self.plan.digest()

    def left(self) -> list[ShardId]:
        """The shards that are still to be packed."""
        return [shard for shard in self.plan.shards() if shard not in self.done]

    def task(self, shard: ShardId, threads: int) -> ShardTask:
        """The task of one shard."""
        split, number = shard
        layout = self.config.layout
        return ShardTask(
            url=self.config.url,
            plan=self._plan_digest,
            split=split,
            number=number,
            root=self.roots.get(split, self.roots["train"]),
            is_tar=self.plan.splits[split].is_tar,
            treatment=Treatment(resize=layout.resize, quality=layout.quality, decode=layout.decode),
            threads=threads,
        )


def begin(config: Pack, say: Callable[[str], None]) -> Packing | Manifest:
    """The packing that a resolved command asks for, planned anew or gone on with; the manifest when all is done.

    Raises DataError for a source that is unfit, and when another dataset or packing is at the URL.
    """
    url, shown = config.url, urls.redact(config.url)
    if files.exists(files.join(url, manifest.NAME)):
        return _finished(config, manifest.load(url, allow_elsewhere=True, field="url"), say)
    plan, places = pack_state.load(url), _places(config)
    if plan is not None:
        pack_state.refuse_another(plan, config)
        packing = Packing(config, plan, places, pack_state.done(url, plan))
        total = len(plan.shards())
        say(f"going on with the packing in {shown}: {len(packing.done)} of {total} shards are there")
        return packing
    plan = pack_state.keep(config, *planned(config, places, say))
    return Packing(config, plan, places, {})


def preview(config: Pack, say: Callable[[str], None]) -> Plan:
    """The plan of a resolved command; nothing is written. Raises what `begin` raises."""
    plan = pack_state.load(config.url)
    if plan is None:
        return planned(config, _places(config), say)[0]
    pack_state.refuse_another(plan, config)
    return plan


def planned(config: Pack, places: dict[str, str], say: Callable[[str], None]) -> tuple[Plan, PlannedRows]:
    """The plan, and for each split its listing and the rows of each shard. Raises DataError for an unfit source."""
    say(f"listing {', '.join(sorted({urls.redact(place) for place in places.values()}))}")
    found = kinds.listed(config.source, places)
    ratio = _ratio(config, found.splits["train"])
    layout = config.layout
    rows = {
        name: (split, pack_plan.shards(split, layout.seed, name, layout.shard_mib * 2**20, layout.min_shards, ratio))
        for name, split in found.splits.items()
    }
    plan = Plan(
        identity=config.identity(),
        name=config.name,
        classes=found.classes,
        titles=found.titles,
        made={**config.made(), "listing": found.digest()},
        ignored=dict(found.ignored),
        splits={
            name: PlannedSplit(
                is_tar=split.is_tar,
                bytes=int(split.lengths.sum()),
                shards=tuple(map(len, shards)),
                per_class=tuple(pack_plan.per_class(split, len(found.classes))),
            )
            for name, (split, shards) in rows.items()
        },
    )
    return plan, rows


def conclude(packing: Packing, entries: dict[ShardId, Entry]) -> Manifest:
    """Write report and manifest when every shard has its entry; nothing else of the packing stays.

    Raises DataError when a split is left without images.
    """
    url, plan = packing.config.url, packing.plan
    for (name, number), entry in entries.items():
        if entry.images != plan.splits[name].shards[number]:
            raise DataError(
                f"{urls.redact(url)}: shard {number} of {name} was made of {entry.images} images, the plan has "
                f"{plan.splits[name].shards[number]}: another packing was here; remove {PACKING} and start anew"
            )
    listed = {
        name: tuple(shard for n in range(len(split.shards)) if (shard := entries[name, n].shard) is not None)
        for name, split in plan.splits.items()
    }
    for name, shards in listed.items():
        if not shards:
            raise DataError(f"{urls.redact(url)}: no image of the {name} split can be decoded")
    transparent = any("transparent" in entry.oddities for entry in entries.values())
    how = {**plan.made, **({manifest.BACKGROUND: BACKGROUND_NAME} if transparent else {})}
    made = Manifest(name=plan.name, classes=plan.classes, titles=plan.titles, made=how, splits=listed)
    files.write_bytes(files.join(url, pack_report.NAME), pack_report.to_bytes(plan, entries))
    _sweep(url, plan)
    manifest.save(url, made)
    files.remove(files.join(url, PACKING))
    return made


def _places(config: Pack) -> dict[str, str]:
    """Where the images of each split lie. Raises DataError when the dataset would lie among them."""
    places = kinds.roots(config.source)
    for place in places.values():
        if f"{config.url}/".startswith(place.rstrip("/") + "/"):
            raise DataError(
                f"url: {urls.redact(config.url)} is refused: it lies in {urls.redact(place)}, which is to be packed"
            )
    return places


def _ratio(config: Pack, split: SplitListing) -> float:
    """Bytes to be stored for a byte of the source, by a sample of the images."""
    layout = config.layout
    if not layout.resize:
        return 1.0
    chosen = split.take(pack_plan.sample(split, layout.seed, ESTIMATE_IMAGES))
    columns = (chosen.keys, chosen.names, chosen.labels.tolist(), chosen.offsets.tolist(), chosen.lengths.tolist())
    rows = [Row(*values) for values in zip(*columns, strict=True)]
    treatment = Treatment(resize=layout.resize, quality=layout.quality, decode=False)
    before = after = 0
    with closing(Ranges(pack_state.STREAMS)) as ranges:
        reader = ImageReader(ranges, split.root, split.is_tar, treatment)
        for row, packed in shard_packing.in_order(reader.packed, rows, pack_state.STREAMS):
            if not packed.finding.defect:
                before, after = before + row.length, after + len(packed.image)
    return after / before if before else 1.0


def _finished(config: Pack, found: Manifest, say: Callable[[str], None]) -> Manifest:
    """The manifest that is there already. Raises DataError when it is not that of this command."""
    shown = urls.redact(config.url)
    fix = "take another --url, or remove what is there"
    wanted: dict[str, object] = {"name": config.name, **config.made()}
    has: dict[str, object] = {"name": found.name, **found.made}
    for name in (name for name in wanted if wanted[name] != has.get(name)):
        raise DataError(
            f"url: {shown}: the dataset {found.name!r} is there, packed with {name} {has.get(name)!r}; this command "
            f"has {wanted[name]!r}: {fix}"
        )
    plan = pack_state.load(config.url)
    if plan is None or plan.made.get("listing") != found.made.get("listing"):
        places = _places(config)
        say(f"a dataset is there; listing {urls.redact(places['train'])} to compare")
        if kinds.listed(config.source, places).digest() != found.made.get("listing"):
            raise DataError(f"url: {shown}: the dataset {found.name!r} is there, packed from other images: {fix}")
    files.remove(files.join(config.url, PACKING))
    return found


def _sweep(url: str, plan: Plan) -> None:
    """Remove the unfinished temporary files that killed processes left in a local dataset."""
    if not urls.is_local(url):
        return
    for name in plan.splits:
        for path in _leftovers(urls.local_path(files.join(url, name))):
            os.unlink(path)


def _leftovers(folder_path: str) -> Iterator[str]:
    with os.scandir(folder_path) as entries:
        yield from [entry.path for entry in entries if entry.name.startswith(files.TEMP_PREFIX)]
