"""A network of the user's, seen as the project's own networks are, and the checks that one has to pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orchestrator.config.errors import ConfigError
from orchestrator.config.plugins import create_plugin, format_failure
from orchestrator.models.config import ModelPlugin
from orchestrator.models.network import DropoutMasks, Logits, Network

_TRIAL_CLASSES, _TRIAL_IMAGES = 10, 4


class PluginNetwork(Network):
    """A Network around an nn.Module that returns logits: no auxiliary heads, no masks, the module's own names."""

    module: nn.Module
    has_stock_randomness: ClassVar[bool] = True  # dropout in a forward method cannot be found by looking

    def __init__(self, config: ModelPlugin, num_classes: int) -> None:
        super().__init__(num_classes)
        module = _create_module(config, num_classes)
        self.config, self.num_classes = config, num_classes
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        # Not registered but shared, so that names in weights and checkpoints are the module's own.
        self.__dict__["module"] = module
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = getattr(module, registry)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """Return the logits of N x 3 x S x S images (mean subtracted); takes no masks."""
        return Logits(self.module(images.contiguous(memory_format=self.memory_format)))

    def train(self, mode: bool = True) -> PluginNetwork:
        """Set the mode of the module, whose own method may keep parts of it in another one."""
        self.training = mode
        self.module.train(mode)
        return self

    def get_classifiers(self) -> dict[str, nn.Module]:
        """Return the layers whose parameters have another shape in a network of one class more."""
        with fork_torch_rng(0):
            larger = dict(_create_module(self.config, self.num_classes + 1).named_parameters())
        differing = {name for name, value in self.named_parameters() if larger[name].shape != value.shape}
        layers = {name.rpartition(".")[0] for name in differing}
        return {name: self.get_submodule(name) for name in sorted(layers)}


@contextmanager
def fork_torch_rng(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, from which modules draw their initial weights; give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@lru_cache(maxsize=256)
def has_batch_norm(config: ModelPlugin) -> bool:
    """Return whether a plug-in has batch norms. Raises ConfigError when it cannot be built."""
    return _build_seeded(config, _TRIAL_CLASSES).has_batch_norm


def _build_seeded(config: ModelPlugin, num_classes: int) -> PluginNetwork:
    with fork_torch_rng(0):
        return PluginNetwork(config, num_classes)


@lru_cache(maxsize=256)
def check_model(config: ModelPlugin, num_classes: int) -> None:
    """Build a plug-in twice and run it in both modes, on CPU.

    Raises ConfigError when it fails, has no parameters, returns another shape than N x classes, or draws random numbers
    from anything but torch's seeded generators.
    """
    label = f"model {config.kind!r}"
    model, twin = (_build_seeded(config, num_classes) for _ in range(2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fixed = "draw random numbers from torch's global generator only, which is seeded"
    same = twin.state_dict()
    if same.keys() != state.keys() or not all(torch.equal(value, same[name]) for name, value in state.items()):
        raise ConfigError(f"{label}: initial weights differ between two networks made from the same seed; {fixed}")
    side = config.image_size
    images = torch.randn(_TRIAL_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        mode = "train" if training else "eval"
        outputs = []
        for _ in range(2):
            model.load_state_dict(state)  # batch norms count what they see
            outputs.append(_run_forward(model.train(training), images, num_classes, f"{label} in {mode} mode"))
        if not torch.equal(*outputs):
            raise ConfigError(f"{label}: two forward passes in {mode} mode from the same seed differ; {fixed}")


def _create_module(config: ModelPlugin, num_classes: int) -> nn.Module:
    module = create_plugin("model", config.kind, config.args, num_classes=num_classes)
    label = f"model {config.kind!r}"
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{label} must return a torch.nn.Module, got {type(module).__name__}")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError(f"{label} must have parameters to train, got none; register its layers as attributes")
    return module


def _run_forward(model: PluginNetwork, images: Tensor, num_classes: int, label: str) -> Tensor:
    try:
        with torch.no_grad(), fork_torch_rng(1):
            output: Any = model(images).main
    except Exception as error:  # the user's own code may raise anything
        size = model.config.image_size
        raise ConfigError(f"{label} failed on images of {size} x {size} pixels{format_failure(error)}") from error
    expected = (len(images), num_classes)
    if not isinstance(output, Tensor) or output.shape != expected or not output.is_floating_point():
        shape = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"{label} must return float logits of shape {expected} (N x classes), got {shape}")
    return output
