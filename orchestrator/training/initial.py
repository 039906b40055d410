"""Weights to start from instead of random ones: those of a finished run, or a .safetensors file from anywhere."""

from __future__ import annotations

import safetensors
import torch
from safetensors import torch as safe
from torch import Tensor

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import weights
from orchestrator.checkpoint.format import CheckpointError
from orchestrator.config.errors import ConfigError
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from orchestrator.storage import files, urls

SUFFIX = ".safetensors"


def digest_of(url: str) -> str:
    """The digest of the weights at `url`, a run's final folder or a .safetensors file: what Recipe.initial_weights is.

    Raises FileNotFoundError, StorageError or CheckpointError.
    """
    return weights.digest(_read(url))


def given(recipe: Recipe, url: str) -> Recipe:
    """The recipe of a training that starts from the weights at `url`; the same recipe without a URL.

    Raises ConfigError for weights that cannot be used; StorageError.
    """
    if not url:
        if recipe.initial_weights:
            raise ConfigError(
                f"initial_weights: {recipe.initial_weights!r} is refused alone: say with --weights where they lie"
            )
        return recipe
    try:
        digest = digest_of(urls.absolute(url, "weights"))
    except FileNotFoundError:
        raise ConfigError(
            f"weights: {urls.redact(url)}: nothing there; give a finished run's final folder or a {SUFFIX} file"
        ) from None
    except ValueError as error:  # CheckpointError, or a relative place
        raise ConfigError(str(error)) from None
    if recipe.initial_weights not in ("", digest):
        raise ConfigError(
            f"initial_weights: {recipe.initial_weights!r} is refused: the weights at {urls.redact(url)} are {digest}"
        )
    return recipe.model_copy(update={"initial_weights": digest})


def load_into(model: Network, url: str, digest: str) -> tuple[str, ...]:
    """Put the weights at `url` into the model, in place; the names of those that stay as they were built.

    These are the auxiliary heads, where the weights have none, and the layers that give class scores, where they are
    of another number of classes. Raises CheckpointError, and changes nothing, when the weights are not those of
    `digest`, are not there, or do not fit the network elsewhere; StorageError.
    """
    shown = urls.redact(url)
    try:
        found = _read(url)
    except FileNotFoundError:
        raise CheckpointError(f"weights: {shown!r}: nothing there; say with --weights where {digest} lies") from None
    if (is_now := weights.digest(found)) != digest:
        raise CheckpointError(
            f"weights: {shown}: their digest is {is_now}, the run was started from {digest}: give the weights that it "
            "was started from, or start anew with --new"
        )
    own = model.state_dict()
    heads = tuple(f"{name}." for name in model.classifiers())
    kept = [
        name
        for name, tensor in own.items()
        if (name not in found and name in model.auxiliary_names())
        or (name in found and name.startswith(heads) and found[name].shape != tensor.shape)
    ]
    # A layer stays as it is as a whole, though its bias may fit: half of one is of no use.
    kept = [name for name in own if name in kept or any(_same_layer(name, one, heads) for one in kept)]
    offered = {name: tensor for name, tensor in found.items() if name not in kept}
    taken = {name: tensor for name, tensor in own.items() if name not in kept}
    if (problem := checkpoint_format.misfit(offered, taken, "the recipe's network")) is not None:
        raise CheckpointError(
            f"weights: {shown}: {problem}; give weights of this network, or a recipe with their model"
        )
    with torch.no_grad():
        for name, tensor in taken.items():
            tensor.copy_(found[name])
    return tuple(kept)


def _same_layer(name: str, other: str, heads: tuple[str, ...]) -> bool:
    return any(name.startswith(head) and other.startswith(head) for head in heads)


def _read(url: str) -> dict[str, Tensor]:
    """The averaged weights of a final folder, or all of a file, on the CPU; all of them finite."""
    shown = urls.redact(url)
    if not url.endswith(SUFFIX):
        return weights.load(url).averaged
    try:
        found = safe.load(files.read_bytes(url))
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"weights: {shown}: no safetensors file: {error}") from None
    if name := checkpoint_format.not_finite(found):
        raise CheckpointError(f"weights: {shown}: {name} holds NaN or infinite numbers; give other weights")
    return found
