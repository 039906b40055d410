"""Initial weights from a finished run or any .safetensors file, in place of random ones.

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
from orchestrator.checkpoint.checkpoint import CheckpointError
from orchestrator.checkpoint.checkpoint_dir import parse_class_names
from orchestrator.config import redaction
from orchestrator.config.errors import ConfigError
from orchestrator.models.network import Network
from orchestrator.recipe.config import Recipe
from orchestrator.storage import file_io, urls
from orchestrator.storage.file_io import StorageError

SAFETENSORS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class LoadedWeights:
    """The tensors that a network loaded, and those that it did not."""

    num_loaded: int  # tensors
    initialized_names: tuple[str, ...]  # names of tensors that keep their random values
    classes: tuple[str, ...] | None = None  # of the weights, by label, if known

    def describe(self, url: str, classes: Sequence[str]) -> str:
        """Return a line for people: tensors loaded, layers initialised anew, and whether `classes` are others."""
        num_tensors = self.num_loaded + len(self.initialized_names)
        text = f"weights of {redaction.redact(url)}: {self.num_loaded} of {num_tensors} tensors loaded"
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.initialized_names))
        if layers:
            text += f"; initialised anew: {', '.join(layers)}"
        if self.classes is not None and self.classes != tuple(classes):
            text += f"; their {len(self.classes)} classes differ from the {len(classes)} of the dataset"
        return text


def resolve_initial_weights(recipe: Recipe, url: str) -> Recipe:
    """Return the recipe with the digest of the weights at `url`, if any. Raises StorageError, ConfigError."""
    if not url:
        if recipe.initial_weights:
            raise ConfigError(
                f"initial_weights must come with their place, got {recipe.initial_weights!r} alone; set --weights"
            )
        return recipe
    try:
        digest = checkpoint_format.compute_digest(_read_weights(urls.require_absolute(url, "weights"))[0])
    except ValueError as error:  # CheckpointError, or a relative place
        raise ConfigError(str(error)) from None
    if recipe.initial_weights not in ("", digest):
        raise ConfigError(
            f"initial_weights must be the digest of the weights at {redaction.redact(url)}, which is {digest}, got "
            f"{recipe.initial_weights!r}; set another --weights, or leave initial_weights empty"
        )
    return recipe.model_copy(update={"initial_weights": digest})


def load_pretrained(model: Network, url: str, digest: str) -> LoadedWeights:
    """Load the weights at `url` into the model, in place.

    Auxiliary heads that the weights lack, and classifiers of another number of classes, keep their random values.
    Raises CheckpointError, and changes nothing, when the weights are missing, have another digest, or do not fit the
    network elsewhere; StorageError.
    """
    shown = redaction.redact(url)
    tensors, classes = _read_weights(url)
    if (actual := checkpoint_format.compute_digest(tensors)) != digest:
        raise CheckpointError(
            f"weights: {shown}: their digest is {actual}, the run was started from {digest}: give the weights that it "
            "was started from, or start anew with --new"
        )
    own = model.state_dict()
    heads = tuple(f"{name}." for name in model.get_classifiers())
    misfits = [
        name
        for name, tensor in own.items()
        if (name not in tensors and name in model.get_auxiliary_names())
        or (name in tensors and name.startswith(heads) and tensors[name].shape != tensor.shape)
    ]
    # A whole layer keeps its values, even if its bias would fit.
    layers = tuple(head for head in heads if any(name.startswith(head) for name in misfits))
    random = tuple(name for name in own if name in misfits or name.startswith(layers))
    offered = {name: tensor for name, tensor in tensors.items() if name not in random}
    loaded = {name: tensor for name, tensor in own.items() if name not in random}
    if (problem := checkpoint_format.find_tensor_mismatch(offered, loaded, "the recipe's network")) is not None:
        raise CheckpointError(
            f"weights: {shown}: {problem}; give weights of this network, or a recipe with their model"
        )
    with torch.no_grad():
        for name, tensor in loaded.items():
            tensor.copy_(tensors[name])
    return LoadedWeights(len(loaded), random, classes)


def _read_weights(url: str) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """Return the averaged weights of a final folder, or all of a file, and their classes; all finite, on the CPU."""
    shown = redaction.redact(url)
    try:
        if not url.endswith(SAFETENSORS_SUFFIX):
            final = checkpoint_format.load_final_weights(url)
            return final.averaged, final.classes
        data = file_io.read_bytes(url)
    except (FileNotFoundError, StorageError) as error:
        expected = FileNotFoundError | NotADirectoryError | IsADirectoryError
        if not isinstance(error, expected) and not isinstance(error.__cause__, expected):
            raise
        raise CheckpointError(
            f"weights: must be a finished run's final folder or a {SAFETENSORS_SUFFIX} file, got {shown}; convert a "
            "state dict of torch.save by safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
            "'FILE.safetensors')"
        ) from None
    try:
        tensors = safe.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"weights: {shown}: no safetensors file: {error}") from None
    if name := checkpoint_format.find_non_finite(tensors):
        raise CheckpointError(f"weights: {shown}: {name} has NaN or infinite values; give other weights")
    # A compiled part may be anywhere; `module` may be a layer's own name, unless all names begin with it.
    named = {".".join(part for part in name.split(".") if part != "_orig_mod"): each for name, each in tensors.items()}
    while named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): each for name, each in named.items()}
    if len(named) < len(tensors):
        raise CheckpointError(f"weights: {shown}: holds a tensor twice, with and without _orig_mod; give one of them")
    return named, parse_class_names(data[8 : 8 + int.from_bytes(data[:8], "little")])
