"""Final weights of a run, for evaluation, scoring and users."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import torch as safetensors
from torch import Tensor

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint.checkpoint_dir import EXPORT_FILE
from orchestrator.config import redaction
from orchestrator.config.json_text import parse_json
from orchestrator.storage import commit

AVERAGED, RAW = "averaged", "raw"
AUDIT_FILE = "audit.json"


@dataclass(frozen=True)
class FinalWeights:
    """The weights of a finished run without auxiliary heads, and the hash that identifies them."""

    averaged: dict[str, Tensor]
    raw: dict[str, Tensor]
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    digest: str  # of the averaged weights


def compute_digest(weights: dict[str, Tensor]) -> str:
    """Return a hash of names, shapes and values: two runs with the same digest give the same scores."""
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()[:16]


def save(
    url: str, averaged: dict[str, Tensor], raw: dict[str, Tensor], recipe: dict[str, Any], classes: tuple[str, ...],
    audit: Mapping[str, object] | None = None, metadata: Mapping[str, object] | None = None,
) -> str:  # fmt: skip
    """Write and commit final weights, with the record of their training data (JSON); return their digest.

    metadata: JSON for the DONE file.

    Raises NonFiniteError, before anything is written, for NaN or infinite weights.
    """
    identity = compute_digest(averaged)
    state = {AVERAGED: averaged, RAW: raw, "recipe": recipe, "classes": list(classes)}
    checkpoint_format.check_finite(url, state)
    payload = {
        checkpoint_format.STATE_FILE: checkpoint_format.serialize_state(state),
        EXPORT_FILE: export_safetensors(averaged, {"recipe": recipe, "classes": list(classes), "weights": identity}),
    }
    if audit is not None:
        payload[AUDIT_FILE] = json.dumps(audit, sort_keys=True, indent=1).encode()
    facts = {"format_version": checkpoint_format.FORMAT_VERSION, "weights": identity}
    commit.write_folder(url, payload, {**(metadata or {}), **facts})
    return identity


def export_safetensors(weights: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """Return a safetensors file with metadata: texts stay texts, other values become JSON."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return safetensors.save(plain, {"format_version": str(checkpoint_format.FORMAT_VERSION), **texts})


def load(url: str) -> FinalWeights:
    """Return verified final weights. Raises FileNotFoundError or CheckpointError."""
    state = checkpoint_format.load(url)
    return FinalWeights(
        state[AVERAGED], state[RAW], state["recipe"], tuple(state["classes"]), compute_digest(state[AVERAGED])
    )


def load_audit(url: str) -> object:
    """Return the record that was saved with final weights, JSON; None when there is none.

    Raises FileNotFoundError (not committed) or CommitError (damaged).
    """
    data = commit.read_folder(url).get(AUDIT_FILE)
    try:
        return None if data is None else parse_json(data)
    except ValueError as error:
        raise commit.CommitError(f"{redaction.redact(url)}/{AUDIT_FILE}: must be JSON: {error}") from None
