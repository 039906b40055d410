"""What was met while packing: report.json beside the manifest, a table for people, and when broken images are too many.

The report names files as the source does, without its place, so that the same images give the same report.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from orchestrator.config.printable import printable
from orchestrator.data.decode import BACKGROUND_NAME
from orchestrator.data.image_format import EXTENSIONS, OTHERS, PROPER_NAMES, TAKEN
from orchestrator.data.pack_state import Plan, ShardId
from orchestrator.data.shard_packing import Entry, LeftOut

NAME = "report.json"
# So many may be broken in a small dataset, too.
ALWAYS_ALLOWED = 10
SHOWN = 10

MEANINGS: dict[str, str] = {
    "cmyk": "CMYK JPEG, decoded to RGB",
    "ycck": "YCCK JPEG, decoded to RGB",
    "grey": "greyscale, spread over three channels",
    "progressive": "progressive JPEG",
    "transparent": f"transparent, laid on {BACKGROUND_NAME}",
    **{kind: f"{PROPER_NAMES[kind]}, stored as PNG" for kind in TAKEN[2:]},
    "png-named-jpeg": "PNG with the name of a JPEG, stored as .png",
    "jpeg-named-png": "JPEG with the name of a PNG, stored as .jpg",
    "exif-broken": "EXIF data that cannot be read, ignored",
    "exif-rotated": "EXIF orientation, ignored",
    "empty": "0 bytes: left out",
    "no-image": "no image: left out",
    "too-large": "too many pixels, bytes or scans, or too long a strip: left out",
    "undecodable": "cannot be decoded: left out",
    **{kind: f"{PROPER_NAMES[kind]}: left out; convert to JPEG or PNG first" for kind in OTHERS},
}


def left_out(entries: Mapping[ShardId, Entry]) -> list[LeftOut]:
    """Broken images, in the order of the shards."""
    return [bad for _, entry in sorted(entries.items()) for bad in entry.left_out]


def describe_left_out(plan: Plan, entries: Mapping[ShardId, Entry]) -> str:
    """Return how many pictures of which formats are not in the dataset, and what to do; empty when all are.

    Files that are passed over by their names count where a format has such names.
    """
    kinds = Counter(bad.defect for bad in left_out(entries))
    for extension, count in plan.ignored.items():
        if extension in EXTENSIONS:
            kinds[EXTENSIONS[extension]] += count
    if not kinds:
        return ""
    others = any(kind in OTHERS for kind in kinds)
    counted = ", ".join(f"{count} {PROPER_NAMES.get(kind, kind)}" for kind, count in kinds.most_common())
    return f"{kinds.total()} left out: {counted}" + ("; convert them to JPEG or PNG first" if others else "")


def too_many(plan: Plan, entries: Mapping[ShardId, Entry], max_bad: float) -> str | None:
    """None, or what to say when more images are broken than may be."""
    bad = left_out(entries)
    allowed = max(ALWAYS_ALLOWED, int(max_bad * plan.samples))
    if len(bad) <= allowed:
        return None
    seen = sum(entry.images for entry in entries.values())
    kinds = Counter(one.defect for one in bad)
    counted = ", ".join(f"{count} {PROPER_NAMES.get(kind, kind)}" for kind, count in kinds.most_common())
    listed = "; ".join(f"{one.key} ({one.source}): {one.reason}" for one in bad[:SHOWN])
    more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return (
        f"max_bad: {len(bad)} of the first {seen} images are broken, of {plan.samples} at most {allowed} may be: mend "
        f"the source, or give a larger --max-bad. Broken ({counted}): {listed}{more}"
    )


def content(plan: Plan, entries: Mapping[ShardId, Entry]) -> dict[str, Any]:
    """The report in JSON form."""
    return {
        "name": plan.name,
        "made": plan.made,
        "classes": len(plan.classes),
        "ignored_files": plan.ignored,
        "splits": {name: _split(plan, name, entries) for name in plan.splits},
    }


def to_bytes(plan: Plan, entries: Mapping[ShardId, Entry]) -> bytes:
    """The report as a file, the same bytes for the same content."""
    return (json.dumps(content(plan, entries), indent=1, sort_keys=True) + "\n").encode()


def table(plan: Plan, entries: Mapping[ShardId, Entry]) -> Table:
    """The report for people: a row for each thing that was met."""
    found = content(plan, entries)["splits"]
    shown = Table("", *found, title=Text(f"{printable(plan.name)}: {len(plan.classes)} classes", style="italic"))
    for title, name in (("shards", "shards"), ("images", "images"), ("MiB", "bytes"), ("reduced in size", "resized")):
        values = [split[name] / 2**20 if name == "bytes" else split[name] for split in found.values()]
        shown.add_row(title, *(f"{value:,.0f}" for value in values))
    shown.add_row(
        "images of a class", *(f"{s['fewest_of_a_class']:,} to {s['most_of_a_class']:,}" for s in found.values())
    )
    shown.add_row("classes without images", *(f"{len(split['classes_without_images']):,}" for split in found.values()))
    for kind, meaning in MEANINGS.items():
        counts = [split["met"].get(kind, 0) for split in found.values()]
        if any(counts):
            shown.add_row(meaning, *(f"{count:,}" for count in counts))
    for extension, count in plan.ignored.items():
        what = extension if " " in extension else f"other files, {extension or 'without extension'}"
        shown.add_row(Text(printable(what)), f"{count:,}")
    return shown


def _split(plan: Plan, name: str, entries: Mapping[ShardId, Entry]) -> dict[str, Any]:
    own = {shard: entry for shard, entry in entries.items() if shard[0] == name}
    shards = [entry.shard for entry in own.values() if entry.shard is not None]
    bad = left_out(own)
    met: Counter[str] = Counter(one.defect for one in bad)
    for entry in own.values():
        met.update(entry.oddities)
    lost = Counter(one.label for one in bad)
    per_class = [count - lost[label] for label, count in enumerate(plan.splits[name].per_class)]
    return {
        "shards": len(shards),
        "images": sum(shard.samples for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "resized": sum(entry.resized for entry in own.values()),
        "met": dict(met),
        "fewest_of_a_class": min(per_class),
        "most_of_a_class": max(per_class),
        "classes_without_images": [plan.classes[label] for label, count in enumerate(per_class) if not count],
        "left_out": [
            {"key": one.key, "source": one.source, "class": plan.classes[one.label], "defect": one.defect,
             "reason": one.reason} for one in bad
        ],
    }  # fmt: skip
