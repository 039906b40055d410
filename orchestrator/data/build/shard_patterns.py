"""Names of tars from patterns: braces as in train-{000000..000146}.tar, and * ? [] against what a folder holds."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Mapping

from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.data.data_errors import DataError
from orchestrator.storage import file_io, urls

MAX_NAMES = 1_000_000

_BRACES = re.compile(r"\{([^{}]*)\}")
_NESTED = re.compile(r"\{[^}]*\{")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# Control characters, and bytes that are not UTF-8 as Python has them.
_UNSUPPORTED_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_GLOB = re.compile(r"[*?\[]")


class FolderSizes:
    """Sizes of the objects in the folders below a URL, each folder listed once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._sizes_by_folder: dict[str, Mapping[str, int]] = {}

    def get_sizes(self, folder: str) -> Mapping[str, int]:
        """Return bytes by name of what lies in a folder, "" for the URL itself."""
        if folder not in self._sizes_by_folder:
            self._sizes_by_folder[folder] = file_io.list_sizes(file_io.join(self.url, folder) if folder else self.url)
        return self._sizes_by_folder[folder]

    def request_sizes(self, names: Collection[str]) -> None:
        """Ask for the sizes of these names where a folder cannot be listed, as on most web servers."""
        if not urls.is_web(self.url):
            return
        by_folder: dict[str, list[str]] = {}
        for name in names:
            folder, _, last = name.rpartition("/")
            if last not in self._sizes_by_folder.get(folder, {}):
                by_folder.setdefault(folder, []).append(last)
        for folder, lasts in by_folder.items():
            there = file_io.list_sizes(file_io.join(self.url, folder) if folder else self.url, lasts)
            self._sizes_by_folder[folder] = {**self._sizes_by_folder.get(folder, {}), **there}

    def get_size(self, name: str) -> int | None:
        """Return the bytes of an object; None when it is not there."""
        folder, _, last = name.rpartition("/")
        return self.get_sizes(folder).get(last)


def match_shards(folders: FolderSizes, pattern: str, field: str) -> tuple[str, ...]:
    """Return the names below the folders' URL that a pattern stands for: in its order with braces, sorted with * ? [].

    Raises ConfigError for a pattern that makes no sense, DataError when a tar is missing or nothing matches.
    """
    if pattern.startswith("/") or "://" in pattern or ".." in re.split("/", _RANGE.sub("", pattern)):
        raise ConfigError(f"{field}: must be a path below the url, got {pattern!r}")
    names: list[str] = []
    for name in expand_braces(pattern, field):
        names += _match_glob(folders, name, field) if _GLOB.search(name) else [name]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ConfigError(f"{field}: {pattern!r} names {twice} twice; name each tar once")
    if odd := [name for name in names if _UNSUPPORTED_CHARACTERS.search(name)]:
        raise DataError(
            f"{field}: the name of {odd[0]!r} must be UTF-8 without control characters; rename the tar "
            f"({len(odd)} such tars)"
        )
    folders.request_sizes(names)
    missing = [name for name in names if folders.get_size(name) is None]
    shown = redaction.redact(folders.url)
    if missing:
        raise DataError(
            f"{field}: {shown}: {missing[0]} is missing ({len(missing)} of {len(names)} named by {pattern!r})"
        )
    if not names:
        raise DataError(f"{field}: {shown}: nothing there matches {pattern!r}")
    return tuple(names)


def expand_braces(pattern: str, field: str) -> list[str]:
    """Return the names that braces stand for: {a,b} and {000..146}, which keeps its zeros."""
    if _NESTED.search(pattern):
        raise ConfigError(f"{field}: {pattern!r} has braces within braces; write the names out")
    results = [pattern]
    while match := _BRACES.search(results[0]):
        choices = _parse_choices(match[1], pattern, field)
        if len(results) * len(choices) > MAX_NAMES:
            raise ConfigError(f"{field}: {pattern!r} stands for over {MAX_NAMES} names; name fewer tars")
        # All results have the same braces, at other places once a choice was longer than another.
        escaped = [choice.replace("\\", r"\\") for choice in choices]
        results = [_BRACES.sub(choice, name, count=1) for name in results for choice in escaped]
    return results


def _parse_choices(inside: str, pattern: str, field: str) -> list[str]:
    if match := _RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        if first > last or last - first >= MAX_NAMES:
            raise ConfigError(f"{field}: {{{inside}}} in {pattern!r} must ascend, over at most {MAX_NAMES} names")
        width = len(match[1]) if match[1].startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(first, last + 1)]
    if "," not in inside:
        raise ConfigError(f"{field}: {{{inside}}} in {pattern!r} must be {{first..last}} or {{one,other}}")
    return inside.split(",")


def _match_glob(folders: FolderSizes, name: str, field: str) -> list[str]:
    folder, _, last = name.rpartition("/")
    if _GLOB.search(folder):
        raise ConfigError(
            f"{field}: * ? [] may stand in the last part of a name only, got {name!r}; use {{a,b}} for folders"
        )
    # Lists and indexes of shards lie beside them.
    there = sorted(at for at in folders.get_sizes(folder) if not at.endswith(".json"))
    return [f"{folder}/{at}" if folder else at for at in fnmatch.filter(there, last) if fnmatch.fnmatchcase(at, last)]
