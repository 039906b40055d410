"""Checkpoint folders: `state.pt` (torch.save of plain values, loadable with weights_only) committed by a DONE file.

A folder is named by samples seen and attempt, so names sort by progress, and no attempt writes over another's.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.places import Place, place_of, places
from orchestrator.storage import archives, commit, files, urls

__all__ = [
    "CheckpointError",
    "Newest",
    "NonFiniteError",
    "OtherVersionError",
    "Place",
    "check_finite",
    "encode",
    "load",
    "misfit",
    "newest",
    "not_finite",
    "place_of",
    "places",
    "prune",
    "save",
    "write",
]

# 2: momentum by the parameters' names, and float16's scaler.
FORMAT_VERSION = 2
STATE = "state.pt"


class CheckpointError(ValueError):
    """A checkpoint is damaged or of another format; the message names it."""


class OtherVersionError(CheckpointError):
    """A checkpoint of another version of the format: good, perhaps, but not for this code."""


class NonFiniteError(ValueError):
    """What is to be saved holds NaN or infinite numbers; the message names the tensor."""


@dataclass(frozen=True)
class Newest:
    """The newest good checkpoint, if there is one, and which newer ones were passed over and why."""

    place: Place | None
    state: dict[str, Any]
    passed_over: list[str]


def save(folder: str, state: Mapping[str, Any], samples: int, attempt: int) -> str:
    """Write and commit a checkpoint below `folder`; its URL. `state` holds tensors and plain values only.

    Raises NonFiniteError, before anything is written, for NaN or infinite weights.
    """
    url = place_of(folder, samples, attempt)
    write(url, state, {"samples": samples, "attempt": attempt, "time": time.time()})
    return url


def write(url: str, state: Mapping[str, Any], about: Mapping[str, object]) -> None:
    """Write and commit one checkpoint folder. Raises NonFiniteError, before anything is written."""
    check_finite(url, state)
    commit.write(url, {STATE: encode(state)}, {"format_version": FORMAT_VERSION, **about})


def check_finite(url: str, state: Mapping[str, Any]) -> None:
    """Raise NonFiniteError for a state that must not be saved at `url`."""
    if name := not_finite(state):
        raise NonFiniteError(
            f"{urls.redact(url)}: {name} holds NaN or infinite numbers, so nothing was saved: training diverged; lower "
            "schedule.base_rate or lengthen schedule.warmup_epochs"
        )


def encode(state: Mapping[str, Any]) -> bytes:
    """The bytes of a state."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def load(url: str, device: str = "cpu") -> dict[str, Any]:
    """The verified state of a checkpoint. Raises FileNotFoundError (not committed) or CheckpointError."""
    shown = urls.redact(url)
    try:
        version = commit.about(url).get("format_version")
        if version != FORMAT_VERSION:
            # What is no number was not written by any version.
            raise (OtherVersionError if isinstance(version, int) else CheckpointError)(
                f"{shown}: checkpoint format {version!r}; this code reads {FORMAT_VERSION}: go on with the version of "
                "the code that wrote it, or start anew with --new"
            )
        payload = commit.read(url)
    except commit.CommitError as error:
        raise CheckpointError(str(error)) from None
    if STATE not in payload:
        raise CheckpointError(f"{shown}: its {commit.DONE} lists no {STATE}")
    try:
        archives.check_stored(payload[STATE])
    except ValueError as error:
        raise CheckpointError(f"{shown}: {STATE} is not what torch.save writes: {error}") from None
    try:
        state = torch.load(io.BytesIO(payload[STATE]), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{shown}: holds something other than tensors and plain values: {first}") from None
    except (RuntimeError, EOFError, KeyError) as error:  # whole by its sum, so it was written like this
        raise CheckpointError(f"{shown}: {STATE} is not what torch.save writes ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{shown}: holds {type(state).__name__}, no state")
    if name := _larger_than_stored(state):
        raise CheckpointError(f"{shown}: {name} claims more numbers than {STATE} holds; remove this checkpoint")
    if name := not_finite(state):
        raise CheckpointError(f"{shown}: {name} holds NaN or infinite numbers; remove this checkpoint")
    return state


def _larger_than_stored(state: Mapping[str, Any], above: str = "") -> str | None:
    """Return the dotted name of the first tensor of more elements than its storage has; None when there is none.

    A stride of 0 makes terabytes of one number: a sum over it would never end.
    """
    for key, value in state.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            if found := _larger_than_stored(value, f"{name}."):
                return found
        elif isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            return name
    return None


def not_finite(state: Mapping[str, Any], above: str = "") -> str | None:
    """The dotted name of the first tensor that holds NaN or infinite numbers; None when all are finite."""
    for key, value in state.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            if found := not_finite(value, f"{name}."):
                return found
        # A sum is not finite as soon as one number is not, and costs a tenth of looking at each; huge numbers may
        # bring it there, too.
        elif isinstance(value, Tensor) and not value.sum().isfinite() and not value.isfinite().all():
            return name
    return None


def misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], whose: str) -> str | None:
    """What keeps tensors from taking the place of the wanted ones, which are `whose`; None when nothing does.

    The first name that only one of them has, or the first of another shape.
    """
    for what, names in (("lacks", wanted.keys() - found.keys()), ("has also", found.keys() - wanted.keys())):
        if names:
            return f"{what} {min(names)!r} ({len(names)} such tensors): it is of another network"
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            return (
                f"{name!r} has shape {tuple(found[name].shape)}, {whose} has {tuple(tensor.shape)}: another width, "
                "kind or number of classes"
            )
    return None


def newest(folder: str, device: str = "cpu", void: Callable[[Place], str | None] = lambda place: None) -> Newest:
    """The newest checkpoint that counts, is complete and undamaged, its state, and what was passed over and why.

    void: why a checkpoint does not count, None when it does. Without a place when there is none, in which case a run
    starts at its beginning. Raises OtherVersionError when there is none but of another version: to start at the
    beginning would throw away what another version of the code can read.
    """
    passed_over: list[str] = []
    other: OtherVersionError | None = None
    for place in places(folder):
        if (reason := void(place)) is not None:
            passed_over.append(f"{urls.redact(place.url)}: {reason}")
            continue
        try:
            return Newest(place, load(place.url, device), passed_over)
        except FileNotFoundError:
            passed_over.append(f"{urls.redact(place.url)}: not committed (its writer died)")
        except CheckpointError as error:
            other = error if isinstance(error, OtherVersionError) else other
            passed_over.append(str(error))
    if other is not None:
        raise other
    return Newest(None, {}, passed_over)


def prune(folder: str, keep: int, saved: str, void: Callable[[Place], str | None] = lambda place: None) -> list[str]:
    """Remove all but the newest `keep` committed checkpoints, and uncommitted ones older than them; what went.

    The newest is `saved`, just written. Newer ones by name were passed over when this attempt began, since they are
    damaged or not committed: they neither count nor go. void: as for `newest`; what does not count there does not here.
    """
    found = places(folder)
    found = found[[place.url for place in found].index(saved) :]
    complete = [place for place in found if void(place) is None and commit.is_complete(place.url)]
    if len(complete) < keep:
        return []
    removed = [place.url for place in found[found.index(complete[keep - 1]) + 1 :]]
    for url in removed:
        # DONE first: a removal that dies half-way leaves no folder that looks complete.
        files.remove(files.join(url, commit.DONE))
        files.remove(url)
    return removed
