"""What others say of the same tars, for cross-checks: timm's _info.json and webdataset's wids index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.json_text import parse_json
from orchestrator.data.errors import DataError
from orchestrator.data.shard_names import Folders
from orchestrator.storage import files, urls

WIDS = "wids-shard-index-v1"
# A list of 100,000 shards has about 20 MB.
MAX_BYTES = 128 * 2**20
# More samples or bytes than any shard has.
MAX_COUNT = 2**46
# What a list of shards holds, also one that is damaged.
_MARKS = (b'"shard_lengths"', b'"wids-shard-index-v1"')


@dataclass(frozen=True)
class Said:
    """One shard according to another list."""

    source: str  # the list's name
    samples: int
    bytes: int | None = None
    md5: str | None = None

    def disagreement(self, name: str, samples: int, size: int, md5: str | None) -> str | None:
        """How what was found differs; None when it does not."""
        if self.samples != samples:
            return f"{name}: {samples} samples, {self.source} says {self.samples}"
        if self.bytes is not None and self.bytes != size:
            return f"{name}: {size} bytes, {self.source} says {self.bytes}"
        if self.md5 is not None and self.md5 != md5:
            return f"{name}: its md5 is {md5}, {self.source} says {self.md5}"
        return None


@dataclass(frozen=True)
class Lists:
    """All lists that lie beside the tars."""

    by_shard: dict[str, tuple[Said, ...]]  # name of the shard below the URL
    sources: tuple[str, ...]
    left_out: tuple[str, ...]  # shards that a list names and that are not adopted
    foreign: dict[str, str]  # files in .json that are something else and no JSON, with the reason


def gathered(folders: Folders, shards: Sequence[str]) -> Lists:
    """What the lists in the URL's folder and in those of the shards say.

    A file that is no JSON and nothing like a list (annotations in JSON Lines, say) is passed over. Raises DataError for
    a list that is damaged or disagrees with itself.
    """
    foreign: dict[str, str] = {}
    found: dict[str, list[Said]] = {}
    sources, left_out, wanted = [], [], set(shards)
    for folder in sorted({"", *(name.rpartition("/")[0] for name in shards)}):
        for last, size in sorted(folders.known(folder).items()):
            if (
                not last.endswith(".json")
                or last.endswith(".index.json")
                or last == "manifest.json"
                or size > MAX_BYTES
            ):
                continue
            source = f"{folder}/{last}" if folder else last
            data = files.read_bytes(files.join(folders.url, source))
            try:
                listed = list(_entries(data, source, folder, shards))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not any(mark in data for mark in _MARKS):
                    foreign[source] = str(error)
                    continue
                shown = urls.redact(files.join(folders.url, source))
                raise DataError(f"{shown}: damaged: {error!r}; mend it, or move it away") from None
            sources += [source] if listed else []
            for name, said in listed:
                if name in wanted:
                    found.setdefault(name, []).append(said)
                else:
                    left_out.append(name)
    return Lists(
        {name: tuple(said) for name, said in found.items()}, tuple(sources), tuple(sorted(set(left_out))), foreign
    )


def _entries(data: bytes, source: str, folder: str, shards: Sequence[str]) -> Iterator[tuple[str, Said]]:
    """Shard (below the URL) and what is said of it; nothing when the JSON is about something else."""
    known = {name.rpartition("/")[2]: name for name in shards}

    def placed(name: str) -> str:
        # Lists are moved about and hold URLs of other places: what counts is the last part, if no exact name does.
        exact = f"{folder}/{name}" if folder else name
        return exact if exact in shards_set else known.get(name.rpartition("/")[2], exact)

    shards_set = set(shards)
    found = parse_json(data)
    if not isinstance(found, dict):
        return
    if found.get("__kind__") == WIDS:
        for entry in found["shardlist"]:
            size = entry.get("filesize")
            said = Said(source, _count(entry["nsamples"]), None if size is None else _count(size), entry.get("md5sum"))
            yield placed(str(entry["url"])), said
        return
    lists = found["splits"].values() if isinstance(found.get("splits"), dict) else [found]
    for split in lists:
        if isinstance(split, dict) and "shard_lengths" in split:
            for name, count in _lengths(split, source, folder, shards):
                yield placed(name), Said(source, count)


def _lengths(split: dict[str, Any], source: str, folder: str, shards: Sequence[str]) -> Iterator[tuple[str, int]]:
    lengths = split["shard_lengths"]
    if isinstance(lengths, dict):
        pairs = [(str(name), _count(count)) for name, count in lengths.items()]
    else:
        names = split.get("filenames")
        if names is None:  # in the order of their names, as they would be listed
            names = sorted(name.rpartition("/")[2] for name in shards if name.rpartition("/")[0] == folder)
        if len(names) != len(lengths):
            raise ValueError(f"{len(names)} shards, but the counts of {len(lengths)}")
        pairs = [(str(name), _count(count)) for name, count in zip(names, lengths, strict=True)]
    total = sum(count for _, count in pairs)
    if split.get("num_samples", total) != total:
        raise ValueError(f"num_samples is {split['num_samples']}, the sum of shard_lengths {total}")
    yield from pairs


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{value!r} is no count")
    return value
