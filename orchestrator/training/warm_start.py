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
    """The tensors that a network loaded, and those that it did not."""

    num_loaded: int  # tensors
    initialized_names: tuple[str, ...]  # names of tensors that keep their random values
    classes: tuple[str, ...] | None = None  # of the weights, by label, if known

    def describe(self, url: str, classes: Sequence[str]) -> str:
        """Return a line for people: tensors loaded, layers initialised anew, and classes that differ from `classes`."""
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
    """Return the digest of the weights at `url`, a final folder or a .safetensors file, for Recipe.initial_weights.

    Raises FileNotFoundError, StorageError or CheckpointError.
    """
    return weights.compute_digest(_read_weights(url)[0])


def resolve_initial_weights(recipe: Recipe, url: str) -> Recipe:
    """Return the recipe of a training that starts from the weights at `url`; the same recipe without a URL.

    Raises ConfigError for weights that cannot be used; StorageError.
    """
    if not url:
        if recipe.initial_weights:
            raise ConfigError(
                f"initial_weights must come with their place, got {recipe.initial_weights!r} alone; set --weights"
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
    try:
        tensors, classes = _read_weights(url)
    except FileNotFoundError:
        raise CheckpointError(f"weights: {shown!r}: nothing there; set --weights to where {digest} lies") from None
    if (actual := weights.compute_digest(tensors)) != digest:
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
    random = [name for name in own if any(_is_same_layer(name, other, heads) for other in misfits)]
    offered = {name: tensor for name, tensor in tensors.items() if name not in random}
    loaded = {name: tensor for name, tensor in own.items() if name not in random}
    if (problem := checkpoint_format.find_tensor_mismatch(offered, loaded, "the recipe's network")) is not None:
        raise CheckpointError(
            f"weights: {shown}: {problem}; give weights of this network, or a recipe with their model"
        )
    with torch.no_grad():
        for name, tensor in loaded.items():
            tensor.copy_(tensors[name])
    return LoadedWeights(len(loaded), tuple(random), classes)


def _is_same_layer(name: str, other: str, heads: tuple[str, ...]) -> bool:
    return name == other or any(name.startswith(head) and other.startswith(head) for head in heads)


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
            final = weights.load(url)
            return final.averaged, final.classes
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
        raise CheckpointError(f"weights: {shown}: {name} has NaN or infinite values; give other weights")
    return _strip_prefixes(tensors, shown), _read_class_names(data)


def _make_format_error(shown: str) -> CheckpointError:
    return CheckpointError(
        f"weights: must be a finished run's final folder or a {SAFETENSORS_SUFFIX} file, got {shown}; "
        "convert a state dict of "
        "torch.save by safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
    )


def _strip_prefixes(tensors: dict[str, Tensor], shown: str) -> dict[str, Tensor]:
    """Return tensors under the names that the network gives them, whatever wrapped it when they were saved."""
    # A compiled part may be anywhere; `module` may be a layer's own name, unless all names begin with it.
    named = {".".join(part for part in name.split(".") if part != _COMPILED_PART): name for name in tensors}
    while named and all(name.startswith(_DDP_PREFIX) for name in named):
        named = {name.removeprefix(_DDP_PREFIX): first for name, first in named.items()}
    if len(named) < len(tensors):
        raise CheckpointError(
            f"weights: {shown}: holds a tensor twice, with and without {_COMPILED_PART}; give one of them"
        )
    return {name: tensors[first] for name, first in named.items()}


def _read_class_names(data: bytes) -> tuple[str, ...] | None:
    """Return the classes in the header of a safetensors file that this project wrote; None for other files."""
    try:
        header = parse_object(data[8 : 8 + int.from_bytes(data[:8], "little")])
        classes = parse_json(header["__metadata__"]["classes"])
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(map(str, classes)) if isinstance(classes, list) else None
