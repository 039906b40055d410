"""Where checkpoints lie. Needs no torch, so that what only looks at a run is quick."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.storage import commit, files, urls

_NAME = re.compile(r"^samples-(\d{15})-attempt-(\d{6})$")


@dataclass(frozen=True)
class Place:
    """A checkpoint folder that exists, complete or not."""

    url: str
    samples: int
    attempt: int


def place_of(folder: str, samples: int, attempt: int) -> str:
    """The URL of the checkpoint of an attempt at this progress."""
    return files.join(folder, f"samples-{samples:015d}-attempt-{attempt:06d}")


def places(folder: str) -> list[Place]:
    """Checkpoint folders below `folder`, newest progress first, later attempt first among equals."""
    found = []
    for name in files.list_names(folder):
        if match := _NAME.match(name):
            found.append(Place(files.join(folder, name), int(match[1]), int(match[2])))
    return sorted(found, key=lambda place: (place.samples, place.attempt), reverse=True)


def committed(folder: str) -> Iterator[Place]:
    """Those that are complete, newest first; each is asked for when it comes to it."""
    return (place for place in places(folder) if commit.is_complete(place.url))


def stored_digest(url: str) -> str:
    """The digest of final weights without loading them.

    Raises FileNotFoundError when they are not there, CommitError when their DONE file does not name it.
    """
    digest = commit.about(url).get("weights")
    if not isinstance(digest, str):
        raise commit.CommitError(
            f"{urls.redact(url)}/{commit.DONE}: must name the digest of the weights, got {digest!r}"
        )
    return digest
