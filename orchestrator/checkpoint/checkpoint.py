"""Checkpoints and final weights: folders with `state.pt` (loadable with weights_only), committed by a DONE file.

A checkpoint is named by samples seen and attempt, so names sort by progress, and no attempt overwrites another's.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from orchestrator.checkpoint.checkpoint_dir import EXPORT_FILE, CheckpointFolder, list_checkpoints, make_checkpoint_url
from orchestrator.config.json_text import parse_json
from orchestrator.config.redaction import redact
from orchestrator.storage import commit, file_io

# 2: momentum by the parameters' names, and float16's scaler.
FORMAT_VERSION = 2
STATE_FILE = "state.pt"
AUDIT_FILE = "audit.json"


class CheckpointError(ValueError):
    """A damaged checkpoint, or one of another format; the message names it."""


class FormatVersionError(CheckpointError):
    """A checkpoint of another version of the format."""


class NonFiniteError(ValueError):
    """A state with NaN or infinite numbers, which is not saved; the message names the tensor."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The newest valid checkpoint, if there is one, and the newer ones that were skipped, with reasons."""

    checkpoint: CheckpointFolder | None
    state: dict[str, Any]
    skipped: list[str]


@dataclass(frozen=True)
class FinalWeights:
    """The weights of a finished run without auxiliary heads, and the hash that identifies them."""

    averaged: dict[str, Tensor]
    raw: dict[str, Tensor]
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    digest: str  # of the averaged weights


def save(folder: str, state: Mapping[str, Any], samples: int, attempt: int) -> str:
    """Write and commit a checkpoint of tensors and plain values; return its URL. Raises NonFiniteError beforehand."""
    url = make_checkpoint_url(folder, samples, attempt)
    _check_finite(url, state)
    metadata = {"format_version": FORMAT_VERSION, "samples": samples, "attempt": attempt, "time": time.time()}
    commit.write_folder(url, {STATE_FILE: serialize_state(state)}, metadata)
    return url


def _check_finite(url: str, state: Mapping[str, Any]) -> None:
    if name := find_non_finite(state):
        raise NonFiniteError(
            f"{redact(url)}: {name} holds NaN or infinite numbers, so nothing was saved: training diverged; lower "
            "schedule.base_rate or lengthen schedule.warmup_epochs"
        )


def serialize_state(state: Mapping[str, Any]) -> bytes:
    """Return the bytes of a state."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def load(url: str, device: str = "cpu") -> dict[str, Any]:
    """Return the verified state of a checkpoint. Raises FileNotFoundError (not committed) or CheckpointError."""
    shown = redact(url)
    try:
        version = commit.read_metadata(url).get("format_version")
        if version != FORMAT_VERSION:
            kind = FormatVersionError if isinstance(version, int) else CheckpointError  # as no code writes it
            raise kind(
                f"{shown}: checkpoint format {version!r}; this code reads {FORMAT_VERSION}: resume with the version of "
                "the code that wrote it, or start anew with --new"
            )
        payload = commit.read_folder(url)
    except commit.CommitError as error:
        raise CheckpointError(str(error)) from None
    try:
        commit.check_zip_uncompressed(payload[STATE_FILE])
        state = torch.load(io.BytesIO(payload[STATE_FILE]), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{shown}: holds something other than tensors and plain values: {first}") from None
    except (ValueError, RuntimeError, EOFError, KeyError) as error:  # its checksum is right: it was written like this
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise CheckpointError(f"{shown}: {STATE_FILE} is not what torch.save writes: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{shown}: must hold a dict, got {type(state).__name__}")
    for name, tensor in _iter_tensors(state):
        # A stride of 0 makes terabytes of one number: a sum over it would never end.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{shown}: {name} claims more numbers than it holds; remove this checkpoint")
    if name := find_non_finite(state):
        raise CheckpointError(f"{shown}: {name} holds NaN or infinite numbers; remove this checkpoint")
    return state


def _iter_tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _iter_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def find_non_finite(state: Mapping[str, Any]) -> str:
    """Return the dotted name of the first tensor with NaN or infinite numbers; "" when all are finite."""
    for name, tensor in _iter_tensors(state):
        # A sum is not finite when one number is not, and costs a tenth of checking each; huge numbers overflow it, too.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            return name
    return ""


def find_tensor_mismatch(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], expected_owner: str
) -> str | None:
    """Return the first difference in names or shapes from the expected tensors, those of `expected_owner`, or None."""
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for verb, names in (("lacks", missing), ("has also", extra)):
        if names:
            return f"{verb} {min(names)!r} ({len(names)} such tensors): it is of another network"
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            return f"{name!r} has shape {tuple(tensors[name].shape)}, {expected_owner} has {tuple(tensor.shape)}"
    return None


def load_newest(
    folder: str, device: str = "cpu", find_problem: Callable[[CheckpointFolder], str | None] = lambda place: None
) -> LoadedCheckpoint:
    """Return the newest valid checkpoint and its state, if any; find_problem: returns why one does not count.

    Raises FormatVersionError when the only ones are of another version: a fresh start would throw them away.
    """
    skipped: list[str] = []
    other_version: FormatVersionError | None = None
    for place in list_checkpoints(folder):
        if (reason := find_problem(place)) is not None:
            skipped.append(f"{redact(place.url)}: {reason}")
            continue
        try:
            return LoadedCheckpoint(place, load(place.url, device), skipped)
        except FileNotFoundError:
            skipped.append(f"{redact(place.url)}: not committed (its writer died)")
        except CheckpointError as error:
            other_version = error if isinstance(error, FormatVersionError) else other_version
            skipped.append(str(error))
    if other_version is not None:
        raise other_version
    return LoadedCheckpoint(None, {}, skipped)


def remove_old_checkpoints(
    folder: str, keep: int, saved: str, find_problem: Callable[[CheckpointFolder], str | None] = lambda place: None
) -> None:
    """Remove all but the newest `keep` committed checkpoints from `saved` back, and uncommitted ones.

    Newer ones than `saved` were skipped when this attempt began: they neither count nor go.
    """
    places = list_checkpoints(folder)
    places = places[[place.url for place in places].index(saved) :]
    complete = [place for place in places if find_problem(place) is None and commit.is_complete(place.url)]
    if len(complete) < keep:
        return
    for place in places[places.index(complete[keep - 1]) + 1 :]:
        # DONE first: an interrupted removal leaves no folder that looks complete.
        file_io.remove(file_io.join(place.url, commit.DONE))
        file_io.remove(place.url)


def compute_digest(weights: dict[str, Tensor]) -> str:
    """Return a hash of names, shapes and values: two runs with the same digest give the same scores."""
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()[:16]


def save_final_weights(
    url: str, averaged: dict[str, Tensor], raw: dict[str, Tensor], recipe: dict[str, Any], classes: tuple[str, ...],
    audit: Mapping[str, object] | None = None, metadata: Mapping[str, object] | None = None,
) -> str:  # fmt: skip
    """Write and commit final weights, with the audit record and more metadata; return their digest.

    Raises NonFiniteError, before anything is written, for NaN or infinite weights.
    """
    identity = compute_digest(averaged)
    about = {"recipe": recipe, "classes": list(classes)}
    state = {"averaged": averaged, "raw": raw, **about}
    _check_finite(url, state)
    exported = export_safetensors(averaged, {**about, "weights": identity})
    payload = {STATE_FILE: serialize_state(state), EXPORT_FILE: exported}
    if audit is not None:
        payload[AUDIT_FILE] = json.dumps(audit, sort_keys=True, indent=1).encode()
    commit.write_folder(url, payload, {**(metadata or {}), "format_version": FORMAT_VERSION, "weights": identity})
    return identity


def export_safetensors(weights: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """Return a safetensors file with metadata: texts stay texts, other values become JSON."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return safetensors.save(plain, {"format_version": str(FORMAT_VERSION), **texts})


def load_final_weights(url: str) -> FinalWeights:
    """Return verified final weights. Raises FileNotFoundError or CheckpointError."""
    state = load(url)
    averaged, classes = state["averaged"], tuple(state["classes"])
    return FinalWeights(averaged, state["raw"], state["recipe"], classes, compute_digest(averaged))


def load_audit(url: str) -> object:
    """Return the audit record of final weights, if any. Raises FileNotFoundError (not committed) or CommitError."""
    data = commit.read_folder(url).get(AUDIT_FILE, b"null")
    try:
        return parse_json(data)
    except ValueError as error:
        raise commit.CommitError(f"{redact(url)}/{AUDIT_FILE}: must be JSON: {error}") from None
