"""Final weights of a run: what evaluation, scoring and users load."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.storage import commit

AVERAGED, RAW = "averaged", "raw"


@dataclass(frozen=True)
class FinalWeights:
    """The weights of a finished run, the auxiliary heads left out, with the hash that identifies them."""

    averaged: dict[str, Tensor]
    raw: dict[str, Tensor]
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    digest: str  # of the averaged weights


def digest(weights: dict[str, Tensor]) -> str:
    """A hash of names, shapes and values: two runs with the same digest give the same scores."""
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()[:16]


def save(
    url: str, averaged: dict[str, Tensor], raw: dict[str, Tensor], recipe: dict[str, Any], classes: tuple[str, ...]
) -> str:
    """Write and commit final weights; their digest."""
    identity = digest(averaged)
    state = {AVERAGED: averaged, RAW: raw, "recipe": recipe, "classes": list(classes)}
    checkpoint_format.write(url, state, {"weights": identity})
    return identity


def stored_digest(url: str) -> str:
    """The digest of final weights without loading them. Raises FileNotFoundError when they are not there."""
    return str(commit.about(url)["weights"])


def load(url: str) -> FinalWeights:
    """Verified final weights. Raises FileNotFoundError or CheckpointError."""
    state = checkpoint_format.load(url)
    return FinalWeights(state[AVERAGED], state[RAW], state["recipe"], tuple(state["classes"]), digest(state[AVERAGED]))
