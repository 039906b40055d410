"""Weights to start from instead of random ones: those of a finished run, or a .safetensors file from anywhere.

Names may carry the prefixes of torch's DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import safetensors
import torch
from safetensors import torch as safe
from torch import Tensor

from orchestrator.checkpoint import checkpoint as checkpoint_format
from orchestrator.checkpoint import weights
from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_json, parse_object
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from orchestrator.storage import commit, file_io, urls
from orchestrator.storage.file_io import StorageError
from orchestrator.training.run_dir import get_final_weights_dir

SAFETENSORS_SUFFIX = ".safetensors"
MAX_NAMES_SHOWN = 4  # layers, or class names, in a text

_DDP_PREFIX, _COMPILED_PART = "module.", "_orig_mod"


@dataclass(frozen=True)
class LoadedWeights:
    """What a network took of given weights."""

    num_loaded: int  # tensors
    initialized_names: tuple[str, ...]  # names of tensors that stay as they were built
    classes: tuple[str, ...] | None = None  # those of the weights, by number, where they say

    def describe(self, url: str, classes: Sequence[str]) -> str:
        """Return a line for people: what was loaded, what is initialised anew, whether `classes` are the weights'."""
        num_tensors = self.num_loaded + len(self.initialized_names)
        text = f"weights of {redaction.redact(url)}: {self.num_loaded} of {num_tensors} tensors loaded"
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.initialized_names))
        if layers:
            text += f"; initialised anew: {_join_first_names(layers)}"
        if self.classes is None or self.classes == tuple(classes):
            return text
        if len(self.classes) != len(classes):
            return f"{text}; they are of {len(self.classes)} classes, the dataset has {len(classes)}"
        other = [
            f"{ours!r} was {theirs!r}" for ours, theirs in zip(classes, self.classes, strict=True) if ours != theirs
        ]
        return f"{text}; {len(other)} of {len(classes)} classes have other names: {_join_first_names(other)}"


def compute_weights_digest(url: str) -> str:
    """The digest of the weights at `url`, a run's final folder or a .safetensors file: what Recipe.initial_weights is.

    Raises FileNotFoundError, StorageError or CheckpointError.
    """
    return weights.compute_digest(_read_weights(url)[0])


def resolve_initial_weights(recipe: Recipe, url: str) -> Recipe:
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
        digest = compute_weights_digest(urls.require_absolute(url, "weights"))
    except FileNotFoundError:
        raise ConfigError(f"weights: {redaction.redact(url)}: nothing there; {_suggest_weights(url)}") from None
    except ValueError as error:  # CheckpointError, or a relative place
        raise ConfigError(str(error)) from None
    if recipe.initial_weights not in ("", digest):
        raise ConfigError(
            f"initial_weights: {recipe.initial_weights!r} is refused: the weights at "
            f"{redaction.redact(url)} are {digest}"
        )
    return recipe.model_copy(update={"initial_weights": digest})


def load_pretrained(model: Network, url: str, digest: str) -> LoadedWeights:
    """Put the weights at `url` into the model, in place; what it took.

    What stays as it was built are the auxiliary heads, where the weights have none, and the layers that give class
    scores, where they are of another number of classes. Raises CheckpointError, and changes nothing, when the weights
    are not those of `digest`, are not there, or do not fit the network elsewhere; StorageError.
    """
    shown = redaction.redact(url)
    try:
        found, classes = _read_weights(url)
    except FileNotFoundError:
        raise CheckpointError(f"weights: {shown!r}: nothing there; say with --weights where {digest} lies") from None
    if (is_now := weights.compute_digest(found)) != digest:
        raise CheckpointError(
            f"weights: {shown}: their digest is {is_now}, the run was started from {digest}: give the weights that it "
            "was started from, or start anew with --new"
        )
    own = model.state_dict()
    heads = tuple(f"{name}." for name in model.get_classifiers())
    kept = [
        name
        for name, tensor in own.items()
        if (name not in found and name in model.get_auxiliary_names())
        or (name in found and name.startswith(heads) and found[name].shape != tensor.shape)
    ]
    # A layer stays as it is as a whole, though its bias may fit: half of one is of no use.
    kept = [name for name in own if name in kept or any(_is_same_layer(name, one, heads) for one in kept)]
    offered = {name: tensor for name, tensor in found.items() if name not in kept}
    taken = {name: tensor for name, tensor in own.items() if name not in kept}
    if (problem := checkpoint_format.find_tensor_mismatch(offered, taken, "the recipe's network")) is not None:
        raise CheckpointError(
            f"weights: {shown}: {problem}; give weights of this network, or a recipe with their model"
        )
    with torch.no_grad():
        for name, tensor in taken.items():
            tensor.copy_(found[name])
    return LoadedWeights(len(taken), tuple(kept), classes)


def _is_same_layer(name: str, other: str, heads: tuple[str, ...]) -> bool:
    return any(name.startswith(head) and other.startswith(head) for head in heads)


def _join_first_names(texts: Sequence[str]) -> str:
    left = len(texts) - MAX_NAMES_SHOWN
    return ", ".join(texts[:MAX_NAMES_SHOWN]) + (f" and {left} more" if left > 0 else "")


def _suggest_weights(url: str) -> str:
    final = get_final_weights_dir(url)
    if commit.is_complete(final):
        return f"the run's weights are in {redaction.redact(final)}"
    return f"give a finished run's final folder or a {SAFETENSORS_SUFFIX} file"


def _read_weights(url: str) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Return the averaged weights of a final folder, or all of a file, and their classes; all finite, on the CPU."""
    shown = redaction.redact(url)
    try:
        if not url.endswith(SAFETENSORS_SUFFIX):
            found = weights.load(url)
            return found.averaged, found.classes
        data = file_io.read_bytes(url)
    except FileNotFoundError:
        if url.endswith(SAFETENSORS_SUFFIX) or not file_io.exists(url) or file_io.list_names(url):
            raise
        raise _make_format_error(shown) from None
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError | IsADirectoryError):
            raise _make_format_error(shown) from None
        raise
    try:
        tensors = safe.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"weights: {shown}: no safetensors file: {error}") from None
    if name := checkpoint_format.find_non_finite(tensors):
        raise CheckpointError(f"weights: {shown}: {name} holds NaN or infinite numbers; give other weights")
    return _strip_prefixes(tensors, shown), _read_class_names(data)


def _make_format_error(shown: str) -> CheckpointError:
    return CheckpointError(
        f"weights: must be a finished run's final folder or a {SAFETENSORS_SUFFIX} file, got {shown}; "
        "convert a state dict of "
        "torch.save by safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
    )


def _strip_prefixes(tensors: dict[str, Tensor], shown: str) -> dict[str, Tensor]:
    """Return tensors under the names that the network gives them, whatever wrapped it when they were saved."""
    # A compiled part may lie anywhere; `module` is a name that a layer may have, unless all have it.
    named = {".".join(part for part in name.split(".") if part != _COMPILED_PART): name for name in tensors}
    while named and all(name.startswith(_DDP_PREFIX) for name in named):
        named = {name.removeprefix(_DDP_PREFIX): first for name, first in named.items()}
    if len(named) < len(tensors):
        raise CheckpointError(
            f"weights: {shown}: holds a tensor twice, with and without {_COMPILED_PART}; give one of them"
        )
    return {name: tensors[first] for name, first in named.items()}


def _read_class_names(data: bytes) -> tuple[str, ...] | None:
    """Return the classes that a safetensors file of ours names in its header; None for others."""
    try:
        header = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
        classes = parse_json(header["__metadata__"]["classes"])
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, classes)) if isinstance(classes, list) else None
