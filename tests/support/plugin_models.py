"""Networks that a user might name in a recipe, good ones and bad ones; loaded by `tests.support.plugin_models:NAME`."""

import random
from typing import Any

import torch
from torch import Tensor, nn


class Flat(nn.Module):
    """A linear layer over the pixels; `bottleneck` is as wide as there might be classes."""

    def __init__(self, num_classes: int, side: int = 8, bottleneck: int = 10, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3 * side * side, bottleneck)
        self.norm = nn.BatchNorm1d(bottleneck) if norm else nn.Identity()
        self.head = nn.Linear(bottleneck, num_classes)
        self.scale = nn.Parameter(torch.ones(num_classes))
        self.register_buffer("step", torch.zeros(()), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.norm(self.first(images.view(len(images), -1)))) * self.scale
        return logits


class FixedClasses(Flat):
    """Ignores the number of classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(7)


class ReturnsPair(Flat):
    """Returns logits and something else."""

    def forward(self, images: Tensor) -> Any:
        """Return a tuple."""
        return super().forward(images), images


class PythonRandomWeights(Flat):
    """Draws a weight from Python's generator."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.scale, random.random())


class PythonRandomForward(Flat):
    """Drops units by Python's generator."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits that differ in every pass."""
        return super().forward(images) * random.random()


class PythonRandomTraining(Flat):
    """The same, in training alone."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits that differ in every pass in train mode."""
        return super().forward(images) * (random.random() if self.training else 1.0)


class Dropping(Flat):
    """Drops units as torch does."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return nn.functional.dropout(super().forward(images), 0.5, self.training)


class Fails(Flat):
    """Cannot take these images."""

    def forward(self, images: Tensor) -> Tensor:
        """Raise RuntimeError."""
        return super().forward(images[:, :, 1:])


class LooksAtNumbers(Flat):
    """Cannot run on the meta device."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(images) * (1.0 if float(images.sum()) > 1 else 2.0)


def no_parameters(num_classes: int) -> nn.Module:
    """Return a network without parameters."""
    return nn.Flatten()


def no_module(num_classes: int) -> int:
    """Return something else."""
    return num_classes


def takes_classes(classes: int) -> nn.Module:
    """Return a network, but call the argument by another name."""
    return Flat(classes)
