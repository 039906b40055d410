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

from orchestrator.checkpoint.checkpoint_dir import CheckpointFolder, list_checkpoints, make_checkpoint_url
from orchestrator.config import redaction
from orchestrator.storage import commit, file_io

__all__ = [
    "__GONE__",
    "CheckpointError",
    "FormatVersionError",
    "LoadedCheckpoint",
    "NonFiniteError",
    "check_finite",
    "find_non_finite",
    "find_tensor_mismatch",
    "load",
    "load_newest",
    "remove_old_checkpoints",
    "save",
    "serialize_state",
    "write_folder",
]

# 2: momentum by the parameters' names, and float16's scaler.
FORMAT_VERSION = 2
STATE_FILE = "state.pt"


class CheckpointError(ValueError):
    """A checkpoint is damaged or of another format; the message names it."""


class FormatVersionError(CheckpointError):
    """A checkpoint of another version of the format: good, perhaps, but not for this code."""


class NonFiniteError(ValueError):
    """What is to be saved holds NaN or infinite numbers; the message names the tensor."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The newest good checkpoint, if there is one, and which newer ones were passed over and why."""

    checkpoint: CheckpointFolder | None
    state: dict[str, Any]
    skipped: list[str]


def save(folder: str, state: Mapping[str, Any], samples: int, attempt: int) -> str:
    """Write and commit a checkpoint below `folder`; its URL. `state` holds tensors and plain values only.

    Raises NonFiniteError, before anything is written, for NaN or infinite weights.
    """
    url = make_checkpoint_url(folder, samples, attempt)
    write_folder(url, state, {"samples": samples, "attempt": attempt, "time": time.time()})
    return url


def write_folder(url: str, state: Mapping[str, Any], about: Mapping[str, object]) -> None:
    """Write and commit one checkpoint folder. Raises NonFiniteError, before anything is written."""
    check_finite(url, state)
    commit.write_folder(url, {STATE_FILE: serialize_state(state)}, {"format_version": FORMAT_VERSION, **about})


def check_finite(url: str, state: Mapping[str, Any]) -> None:
    """Raise NonFiniteError for a state that must not be saved at `url`."""
    if name := find_non_finite(state):
        raise NonFiniteError(
            f"{redaction.redact(url)}: {name} holds NaN or infinite numbers, so nothing was saved: "
            "training diverged; lower "
            "schedule.base_rate or lengthen schedule.warmup_epochs"
        )


def serialize_state(state: Mapping[str, Any]) -> bytes:
    """The bytes of a state."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def load(url: str, device: str = "cpu") -> dict[str, Any]:
    """The verified state of a checkpoint. Raises FileNotFoundError (not committed) or CheckpointError."""
    shown = redaction.redact(url)
    try:
        version = commit.read_metadata(url).get("format_version")
        if version != FORMAT_VERSION:
            # What is no number was not written by any version.
            raise (FormatVersionError if isinstance(version, int) else CheckpointError)(
                f"{shown}: checkpoint format {version!r}; this code reads {FORMAT_VERSION}: go on with the version of "
                "the code that wrote it, or start anew with --new"
            )
        payload = commit.read_folder(url)
    except commit.CommitError as error:
        raise CheckpointError(str(error)) from None
    if STATE_FILE not in payload:
        raise CheckpointError(f"{shown}: its {commit.DONE} lists no {STATE_FILE}")
    try:
        commit.check_zip_uncompressed(payload[STATE_FILE])
    except ValueError as error:
        raise CheckpointError(f"{shown}: {STATE_FILE} is not what torch.save writes: {error}") from None
    try:
        state = torch.load(io.BytesIO(payload[STATE_FILE]), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{shown}: holds something other than tensors and plain values: {first}") from None
    except (RuntimeError, EOFError, KeyError) as error:  # whole by its sum, so it was written like this
        raise CheckpointError(f"{shown}: {STATE_FILE} is not what torch.save writes ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{shown}: holds {type(state).__name__}, no state")
    if name := _find_oversized_tensor(state):
        raise CheckpointError(f"{shown}: {name} claims more numbers than {STATE_FILE} holds; remove this checkpoint")
    if name := find_non_finite(state):
        raise CheckpointError(f"{shown}: {name} holds NaN or infinite numbers; remove this checkpoint")
    return state


def _find_oversized_tensor(state: Mapping[str, Any], above: str = "") -> str | None:
    """Return the dotted name of the first tensor of more elements than its storage has; None when there is none.

    A stride of 0 makes terabytes of one number: a sum over it would never end.
    """
    for key, value in state.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            if found := _find_oversized_tensor(value, f"{name}."):
                return found
        elif isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            return name
    return None


def find_non_finite(state: Mapping[str, Any], above: str = "") -> str | None:
    """The dotted name of the first tensor that holds NaN or infinite numbers; None when all are finite."""
    for key, value in state.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            if found := find_non_finite(value, f"{name}."):
                return found
        # A sum is not finite as soon as one number is not, and costs a tenth of looking at each; huge numbers may
        # bring it there, too.
        elif isinstance(value, Tensor) and not value.sum().isfinite() and not value.isfinite().all():
            return name
    return None


def find_tensor_mismatch(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], whose: str) -> str | None:
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


def load_newest(
    folder: str, device: str = "cpu", void: Callable[[CheckpointFolder], str | None] = lambda place: None
) -> LoadedCheckpoint:
    """The newest checkpoint that counts, is complete and undamaged, its state, and what was passed over and why.

    void: why a checkpoint does not count, None when it does. Without a place when there is none, in which case a run
    starts at its beginning. Raises OtherVersionError when there is none but of another version: to start at the
    beginning would throw away what another version of the code can read.
    """
    passed_over: list[str] = []
    other: FormatVersionError | None = None
    for place in list_checkpoints(folder):
        if (reason := void(place)) is not None:
            passed_over.append(f"{redaction.redact(place.url)}: {reason}")
            continue
        try:
            return LoadedCheckpoint(place, load(place.url, device), passed_over)
        except FileNotFoundError:
            passed_over.append(f"{redaction.redact(place.url)}: not committed (its writer died)")
        except CheckpointError as error:
            other = error if isinstance(error, FormatVersionError) else other
            passed_over.append(str(error))
    if other is not None:
        raise other
    return LoadedCheckpoint(None, {}, passed_over)


def remove_old_checkpoints(
    folder: str, keep: int, saved: str, void: Callable[[CheckpointFolder], str | None] = lambda place: None
) -> list[str]:
    """Remove all but the newest `keep` committed checkpoints, and uncommitted ones older than them; what went.

    The newest is `saved`, just written. Newer ones by name were passed over when this attempt began, since they are
    damaged or not committed: they neither count nor go. void: as for `newest`; what does not count there does not here.
    """
    found = list_checkpoints(folder)
    found = found[[place.url for place in found].index(saved) :]
    complete = [place for place in found if void(place) is None and commit.is_complete(place.url)]
    if len(complete) < keep:
        return []
    removed = [place.url for place in found[found.index(complete[keep - 1]) + 1 :]]
    for url in removed:
        # DONE first: a removal that dies half-way leaves no folder that looks complete.
        file_io.remove(file_io.join(url, commit.DONE))
        file_io.remove(url)
    return removed
