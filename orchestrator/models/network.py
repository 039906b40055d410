"""The interface of every network: its outputs, its dropout places, the parts that only training needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Logits(NamedTuple):
    """Class scores of a forward pass, and those of the auxiliary heads while training."""

    main: Tensor  # N x classes
    auxiliary: tuple[Tensor, ...] = ()  # each N x classes, in the order in which they stand in the network


DropoutMasks = dict[str, Tensor]  # dropout masks by place, each N x units, scaled by 1 / (1 - p)


class Network(nn.Module, ABC):
    """A classifier of square RGB images. Raises ValueError for fewer than 2 classes."""

    # Standard deviation of initial weights times the root of fan-in: He's for ReLU (arXiv 1502.01852).
    gain: ClassVar[float] = math.sqrt(2.0)
    # Whether layers draw from torch's global generators while training; those are then seeded before every step.
    has_stock_randomness: ClassVar[bool] = False
    memory_format: torch.memory_format = torch.channels_last  # of weights and activations
    classifier_name: ClassVar[str] = "classifier"  # last parts of the names of the layers that give class scores

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")

    @abstractmethod
    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """Return the scores of N x 3 x S x S images. Without masks nothing is dropped, in either mode."""

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Return units and drop probability of each place that drops; `masks` has a mask for each."""
        return {}

    def get_classifiers(self) -> dict[str, nn.Module]:
        """Return the layers that give class scores, by name: all layers that depend on the number of classes."""
        end = f".{self.classifier_name}"
        return {name: layer for name, layer in self.named_modules() if f".{name}".endswith(end)}

    def get_auxiliary_names(self) -> frozenset[str]:
        """Return the names in the state dict that only training needs: the auxiliary heads'."""
        return frozenset()

    def drop_auxiliary(self) -> None:
        """Remove permanently what only training needs."""

    @property
    def has_batch_norm(self) -> bool:
        """True when outputs while training depend on the batch, so that losses depend on the number of workers."""
        return any(isinstance(module, _BatchNorm) for module in self.modules())
