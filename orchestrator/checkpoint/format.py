"""Checkpoint folders: `state.pt` (torch.save of plain values, loadable with weights_only) committed by a DONE file.

A folder is named by samples seen and attempt, so names sort by progress, and no attempt writes over another's.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.storage import commit, files

FORMAT_VERSION = 1
STATE = "state.pt"
_NAME = re.compile(r"^samples-(\d{15})-attempt-(\d{6})$")


class CheckpointError(ValueError):
    """A checkpoint is damaged or of another format; the message names it."""


@dataclass(frozen=True)
class Place:
    """A checkpoint folder that exists, complete or not."""

    url: str
    samples: int
    attempt: int


@dataclass(frozen=True)
class Newest:
    """The newest good checkpoint, if there is one, and which newer ones were passed over and why."""

    place: Place | None
    state: dict[str, Any]
    passed_over: list[str]


def save(folder: str, state: Mapping[str, Any], samples: int, attempt: int) -> str:
    """Write and commit a checkpoint below `folder`; its URL. `state` holds tensors and plain values only."""
    url = place_of(folder, samples, attempt)
    write(url, state, {"samples": samples, "attempt": attempt})
    return url


def place_of(folder: str, samples: int, attempt: int) -> str:
    """The URL of the checkpoint of an attempt at this progress."""
    return files.join(folder, f"samples-{samples:015d}-attempt-{attempt:06d}")


def write(url: str, state: Mapping[str, Any], about: Mapping[str, object]) -> None:
    """Write and commit one checkpoint folder."""
    commit.write(url, {STATE: encode(state)}, {"format_version": FORMAT_VERSION, **about})


def encode(state: Mapping[str, Any]) -> bytes:
    """The bytes of a state."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def load(url: str, device: str = "cpu") -> dict[str, Any]:
    """The verified state of a checkpoint. Raises FileNotFoundError (not committed) or CheckpointError."""
    try:
        version = commit.about(url).get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{url}: checkpoint format {version!r}; this code reads {FORMAT_VERSION}")
        payload = commit.read(url)
    except commit.CommitError as error:
        raise CheckpointError(str(error)) from None
    if STATE not in payload:
        raise CheckpointError(f"{url}: its {commit.DONE} lists no {STATE}")
    try:
        state = torch.load(io.BytesIO(payload[STATE]), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{url}: holds something other than tensors and plain values: {first}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{url}: holds {type(state).__name__}, no state")
    return state


def places(folder: str) -> list[Place]:
    """Checkpoint folders below `folder`, newest progress first, later attempt first among equals."""
    found = []
    for name in files.list_names(folder):
        if match := _NAME.match(name):
            found.append(Place(files.join(folder, name), int(match[1]), int(match[2])))
    return sorted(found, key=lambda place: (place.samples, place.attempt), reverse=True)


def newest(folder: str, device: str = "cpu") -> Newest:
    """The newest checkpoint that is complete and undamaged, its state, and what was passed over and why.

    Without a place when there is none, in which case a run starts at its beginning.
    """
    passed_over: list[str] = []
    for place in places(folder):
        try:
            return Newest(place, load(place.url, device), passed_over)
        except FileNotFoundError:
            passed_over.append(f"{place.url}: not committed (its writer died)")
        except CheckpointError as error:
            passed_over.append(str(error))
    return Newest(None, {}, passed_over)


def prune(folder: str, keep: int, saved: str) -> list[str]:
    """Remove all but the newest `keep` committed checkpoints, and uncommitted ones older than them; what went.

    The newest is `saved`, just written. Newer ones by name were passed over when this attempt began, since they are
    damaged or not committed: they neither count nor go.
    """
    found = places(folder)
    found = found[[place.url for place in found].index(saved) :]
    complete = [place for place in found if commit.is_complete(place.url)]
    if len(complete) < keep:
        return []
    removed = [place.url for place in found[found.index(complete[keep - 1]) + 1 :]]
    for url in removed:
        # DONE first: a removal that dies half-way leaves no folder that looks complete.
        files.remove(files.join(url, commit.DONE))
        files.remove(url)
    return removed
