"""What every network is to the rest of the project: its outputs, its dropout places, what only training needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Logits(NamedTuple):
    """What a forward pass gives: class scores, and those of the auxiliary heads while training."""

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

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")

    @abstractmethod
    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """N x 3 x S x S -> scores. Without masks nothing is dropped, in either mode."""

    @abstractmethod
    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Units and drop probability of each place that drops; `masks` has a mask for each."""

    @abstractmethod
    def get_cost_rows(self) -> dict[str, nn.Module]:
        """The parts that a table of costs lists, by name, in the order in which an image passes through them."""

    @abstractmethod
    def get_classifiers(self) -> dict[str, nn.Module]:
        """The layers that give class scores, by their names in the network: all that depends on the classes."""

    def get_auxiliary_names(self) -> frozenset[str]:
        """Names in the state dict that only training needs: the auxiliary heads'."""
        return frozenset()

    def drop_auxiliary(self) -> None:
        """Throw away for good what only training needs."""

    @property
    def has_batch_norm(self) -> bool:
        """Whether outputs while training depend on the other images of the batch.

        Such a network is exempt from elastic determinism: with another number of workers its losses differ.
        """
        return any(isinstance(module, _BatchNorm) for module in self.modules())
