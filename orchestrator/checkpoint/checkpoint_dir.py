"""Folders of checkpoints and final weights. Imports no torch, so that inspecting a run is quick."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from orchestrator.config.json_text import parse_json, parse_object
from orchestrator.config.redaction import redact
from orchestrator.storage import commit, file_io
from orchestrator.storage.ranged_reads import RangeReader

EXPORT_FILE = "averaged.safetensors"  # the averaged weights, for any reader of this format
MAX_HEADER_BYTES = 100 * 2**20  # the limit of safetensors
_NAME_PATTERN = re.compile(r"^samples-(\d{15})-attempt-(\d{6})$")


@dataclass(frozen=True)
class CheckpointFolder:
    """An existing checkpoint folder, complete or not."""

    url: str
    samples: int
    attempt: int


def make_checkpoint_url(folder: str, samples: int, attempt: int) -> str:
    """Return the URL of the checkpoint of an attempt at this progress."""
    return file_io.join(folder, f"samples-{samples:015d}-attempt-{attempt:06d}")


def list_checkpoints(folder: str) -> list[CheckpointFolder]:
    """Return the checkpoint folders below `folder`, newest progress first, later attempt first among equals."""
    matches = filter(None, map(_NAME_PATTERN.match, file_io.list_names(folder)))
    places = [CheckpointFolder(file_io.join(folder, match[0]), int(match[1]), int(match[2])) for match in matches]
    return sorted(places, key=lambda place: (place.samples, place.attempt), reverse=True)


def iter_committed_checkpoints(folder: str) -> Iterator[CheckpointFolder]:
    """Yield the complete checkpoints, newest first; each is checked when its turn comes."""
    return (place for place in list_checkpoints(folder) if commit.is_complete(place.url))


def read_weights_digest(url: str) -> str:
    """Return the digest of final weights without loading them. Raises FileNotFoundError, CommitError without it."""
    digest = commit.read_metadata(url).get("weights")
    if not isinstance(digest, str):
        raise commit.CommitError(f"{redact(url)}/{commit.DONE}: must name the digest of the weights, got {digest!r}")
    return digest


def read_class_names(url: str) -> tuple[str, ...] | None:
    """Return the class names of final weights, from the header of their export; None where there is none."""
    export = file_io.join(url, EXPORT_FILE)
    try:
        # A safetensors file begins with the length of its JSON header, which holds the writer's metadata.
        with closing(RangeReader(streams=1)) as reader:
            length = int.from_bytes(reader.read(export, 0, 8), "little")
            return None if length > MAX_HEADER_BYTES else parse_class_names(bytes(reader.read(export, 8, length)))
    except FileNotFoundError:
        return None


def parse_class_names(header: bytes) -> tuple[str, ...] | None:
    """Return the class names in the JSON header of a safetensors file of this project; None for other files."""
    try:
        classes = parse_json(parse_object(header)["__metadata__"]["classes"])
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, classes)) if isinstance(classes, list) else None
