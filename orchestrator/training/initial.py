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

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import weights
from orchestrator.checkpoint.format import CheckpointError
from orchestrator.config.errors import ConfigError
from orchestrator.config.json_text import parse_json, parse_object
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from orchestrator.storage import commit, files, urls
from orchestrator.storage.files import StorageError
from orchestrator.training.job import final_of

SUFFIX = ".safetensors"
MOST_NAMED = 4  # layers, or class names, in a text

_DDP, _COMPILED = "module.", "_orig_mod"


@dataclass(frozen=True)
class Loaded:
    """What a network took of given weights."""

    taken: int  # tensors
    kept: tuple[str, ...]  # names of tensors that stay as they were built
    classes: tuple[str, ...] | None = None  # those of the weights, by number, where they say

    def tell(self, url: str, classes: Sequence[str]) -> str:
        """Return a line for people: what was loaded, what is initialised anew, whether `classes` are the weights'."""
        text = f"weights of {urls.redact(url)}: {self.taken} of {self.taken + len(self.kept)} tensors loaded"
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.kept))
        if layers:
            text += f"; initialised anew: {_some(layers)}"
        if self.classes is None or self.classes == tuple(classes):
            return text
        if len(self.classes) != len(classes):
            return f"{text}; they are of {len(self.classes)} classes, the dataset has {len(classes)}"
        other = [
            f"{ours!r} was {theirs!r}" for ours, theirs in zip(classes, self.classes, strict=True) if ours != theirs
        ]
        return f"{text}; {len(other)} of {len(classes)} classes have other names: {_some(other)}"


def digest_of(url: str) -> str:
    """The digest of the weights at `url`, a run's final folder or a .safetensors file: what Recipe.initial_weights is.

    Raises FileNotFoundError, StorageError or CheckpointError.
    """
    return weights.digest(_read(url)[0])


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
        raise ConfigError(f"weights: {urls.redact(url)}: nothing there; {_advice(url)}") from None
    except ValueError as error:  # CheckpointError, or a relative place
        raise ConfigError(str(error)) from None
    if recipe.initial_weights not in ("", digest):
        raise ConfigError(
            f"initial_weights: {recipe.initial_weights!r} is refused: the weights at {urls.redact(url)} are {digest}"
        )
    return recipe.model_copy(update={"initial_weights": digest})


def load_into(model: Network, url: str, digest: str) -> Loaded:
    """Put the weights at `url` into the model, in place; what it took.

    What stays as it was built are the auxiliary heads, where the weights have none, and the layers that give class
    scores, where they are of another number of classes. Raises CheckpointError, and changes nothing, when the weights
    are not those of `digest`, are not there, or do not fit the network elsewhere; StorageError.
    """
    shown = urls.redact(url)
    try:
        found, classes = _read(url)
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
    return Loaded(len(taken), tuple(kept), classes)


def _same_layer(name: str, other: str, heads: tuple[str, ...]) -> bool:
    return any(name.startswith(head) and other.startswith(head) for head in heads)


def _some(texts: Sequence[str]) -> str:
    left = len(texts) - MOST_NAMED
    return ", ".join(texts[:MOST_NAMED]) + (f" and {left} more" if left > 0 else "")


def _advice(url: str) -> str:
    final = final_of(url)
    if commit.is_complete(final):
        return f"the run's weights are in {urls.redact(final)}"
    return f"give a finished run's final folder or a {SUFFIX} file"


def _read(url: str) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Return the averaged weights of a final folder, or all of a file, and their classes; all finite, on the CPU."""
    shown = urls.redact(url)
    try:
        if not url.endswith(SUFFIX):
            found = weights.load(url)
            return found.averaged, found.classes
        data = files.read_bytes(url)
    except FileNotFoundError:
        if url.endswith(SUFFIX) or not files.exists(url) or files.list_names(url):
            raise
        raise _other_kind(shown) from None
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError | IsADirectoryError):
            raise _other_kind(shown) from None
        raise
    try:
        tensors = safe.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"weights: {shown}: no safetensors file: {error}") from None
    if name := checkpoint_format.not_finite(tensors):
        raise CheckpointError(f"weights: {shown}: {name} holds NaN or infinite numbers; give other weights")
    return _without_prefixes(tensors, shown), _classes_of(data)


def _other_kind(shown: str) -> CheckpointError:
    return CheckpointError(
        f"weights: must be a finished run's final folder or a {SUFFIX} file, got {shown}; convert a state dict of "
        "torch.save by safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
    )


def _without_prefixes(tensors: dict[str, Tensor], shown: str) -> dict[str, Tensor]:
    """Return tensors under the names that the network gives them, whatever wrapped it when they were saved."""
    # A compiled part may lie anywhere; `module` is a name that a layer may have, unless all have it.
    named = {".".join(part for part in name.split(".") if part != _COMPILED): name for name in tensors}
    while named and all(name.startswith(_DDP) for name in named):
        named = {name.removeprefix(_DDP): first for name, first in named.items()}
    if len(named) < len(tensors):
        raise CheckpointError(f"weights: {shown}: holds a tensor twice, with and without {_COMPILED}; give one of them")
    return {name: tensors[first] for name, first in named.items()}


def _classes_of(data: bytes) -> tuple[str, ...] | None:
    """Return the classes that a safetensors file of ours names in its header; None for others."""
    try:
        header = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
        classes = parse_json(header["__metadata__"]["classes"])
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, classes)) if isinstance(classes, list) else None
