"""LeNet-5 (LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 1998, section II.B) in its common form."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.config.plugins import register
from orchestrator.models.network import DropoutMasks, Logits, Network


@register("model", "lenet-5")
class LeNet5(Network):
    """61,706 parameters at 32 px and 10 classes. No dropout, which is younger.

    As in the original: greyscale input, 5x5 convolutions without padding, mean pools, tanh. Unlike it, as is common:
    C3 sees all six maps of S2, pools have no weights of their own, and a linear layer with softmax stands in for
    the radial basis functions.
    """

    gain: ClassVar[float] = 1.0  # tanh keeps the variance of small signals

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes)
        self.c1 = nn.Conv2d(1, 6, 5)
        self.c3 = nn.Conv2d(6, 16, 5)
        side = ((image_size - 4) // 2 - 4) // 2
        self.c5 = nn.Linear(16 * side * side, 120)  # a convolution that covers its whole input
        self.f6 = nn.Linear(120, 84)
        self.classifier = nn.Linear(84, num_classes)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """N x 3 x S x S (mean subtracted) -> Logits; no masks are asked for. Colours are averaged to grey."""
        x = images.mean(dim=1, keepdim=True)
        for conv in (self.c1, self.c3):
            x = functional.avg_pool2d(torch.tanh(conv(x)), 2)
        x = x.flatten(1)
        for layer in (self.c5, self.f6):
            x = torch.tanh(layer(x))
        return Logits(self.classifier(x))

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Return none."""
        return {}

    def get_cost_rows(self) -> dict[str, nn.Module]:
        """Return the layers with weights, by the paper's names."""
        return {"C1": self.c1, "C3": self.c3, "C5": self.c5, "F6": self.f6, "output": self.classifier}

    def get_classifiers(self) -> dict[str, nn.Module]:
        """Return the last layer."""
        return {"classifier": self.classifier}
