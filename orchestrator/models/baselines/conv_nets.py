"""LeNet-5, and AlexNet, ZFNet, VGG-16, SPP-net and Network in Network as rows of data: convolutions, norms, pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.config.plugins import register
from orchestrator.models.layers import ConvReLU, LocalResponseNorm, MaxPool
from orchestrator.models.network import DropoutMasks, Logits, Network

HIDDEN_UNITS = 4096  # of fc6 and fc7, in every network that has them


@dataclass(frozen=True)
class ConvSpec:
    """A k x k convolution with bias and ReLU; `groups` as on several GPUs that see a part of the channels each."""

    name: str
    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


@dataclass(frozen=True)
class NormSpec:
    """Local response normalisation with the constants of models.layers."""

    name: str


@dataclass(frozen=True)
class PoolSpec:
    """A max pool that rounds up, as Caffe's."""

    name: str
    kernel: int = 3
    stride: int = 2


LayerSpec = ConvSpec | NormSpec | PoolSpec


class _GroupedConvReLU(nn.Module):
    def __init__(self, inputs: int, row: ConvSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, row.filters, row.kernel, row.stride, row.padding, groups=row.groups)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(x), inplace=True)


def _build_body(rows: Sequence[LayerSpec], channels: int, side: int) -> tuple[nn.ModuleDict, int, int]:
    """Return the modules of the rows by name, and the channels and side of the map that they make."""
    modules = nn.ModuleDict()
    for row in rows:
        if isinstance(row, NormSpec):
            modules[row.name] = LocalResponseNorm(channels)
        elif isinstance(row, PoolSpec):
            modules[row.name] = MaxPool(row.kernel, row.stride)
            side = max(1, math.ceil((side - row.kernel) / row.stride) + 1)
        else:
            is_pointwise = (row.kernel, row.stride, row.groups) == (1, 1, 1)
            modules[row.name] = ConvReLU(channels, row.filters, 1) if is_pointwise else _GroupedConvReLU(channels, row)
            channels, side = row.filters, (side + 2 * row.padding - row.kernel) // row.stride + 1
    return modules, channels, side


class SpatialPyramidPooling(nn.Module):
    """Spatial pyramid pooling: the maximum over each cell of n x n grids laid over the map (arXiv 1406.4729)."""

    def __init__(self, grids: Sequence[int]) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.bins = sum(n * n for n in self.grids)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> N x C * bins, for any H and W."""
        # Cell i of n goes from floor(i H / n) to ceil((i + 1) H / n), as torch has it and the paper's appendix A.
        return torch.cat([functional.adaptive_max_pool2d(x, n).flatten(1) for n in self.grids], dim=1)


class ConvFCNetwork(Network):
    """A body of rows, perhaps a pyramid, then fc6 and fc7 with ReLU and dropout, then the classifier fc8."""

    def __init__(
        self, rows: Sequence[LayerSpec], num_classes: int, image_size: int, dropout: float, lrn: bool = True,
        pyramid: SpatialPyramidPooling | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_classes)
        self.dropout = dropout
        rows = [row for row in rows if lrn or not isinstance(row, NormSpec)]
        self.body, channels, side = _build_body(rows, 3, image_size)
        self.pyramid = pyramid
        self.fc6 = nn.Linear(channels * (side * side if pyramid is None else pyramid.bins), HIDDEN_UNITS)
        self.fc7 = nn.Linear(HIDDEN_UNITS, HIDDEN_UNITS)
        self.fc8 = nn.Linear(HIDDEN_UNITS, num_classes)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """N x 3 x S x S (mean subtracted) -> Logits; `masks` has "fc6" and "fc7"."""
        x = images
        for module in self.body.values():
            x = module(x)
        x = x.flatten(1) if self.pyramid is None else self.pyramid(x)
        for name, layer in (("fc6", self.fc6), ("fc7", self.fc7)):
            x = functional.relu(layer(x))
            if masks is not None:
                x = x * masks[name]
        return Logits(self.fc8(x))

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Return the outputs of fc6 and fc7."""
        return {name: (HIDDEN_UNITS, self.dropout) for name in ("fc6", "fc7")}

    def get_cost_rows(self) -> dict[str, nn.Module]:
        """Return every layer, pools and normalisations included."""
        pyramid = {} if self.pyramid is None else {"spp": self.pyramid}
        return {**self.body, **pyramid, "fc6": self.fc6, "fc7": self.fc7, "fc8": self.fc8}

    def get_classifiers(self) -> dict[str, nn.Module]:
        """Return the last layer."""
        return {"fc8": self.fc8}


# Krizhevsky 2012, section 3.5 and Figure 2. conv2, conv4 and conv5 see the maps of their own GPU only: two groups. The
# paper says 224 x 224, but without padding its 55 x 55 maps come from 227 x 227. Caffe's normalisation differs from
# section 3.3 in k (1, not 2) and in that alpha is divided by n.
_ALEXNET = (
    ConvSpec("conv1", 96, kernel=11, stride=4),
    NormSpec("norm1"),
    PoolSpec("pool1"),
    ConvSpec("conv2", 256, kernel=5, padding=2, groups=2),
    NormSpec("norm2"),
    PoolSpec("pool2"),
    ConvSpec("conv3", 384, kernel=3, padding=1),
    ConvSpec("conv4", 384, kernel=3, padding=1, groups=2),
    ConvSpec("conv5", 256, kernel=3, padding=1, groups=2),
    PoolSpec("pool5"),
)


@register("model", "alexnet")
def build_alexnet(num_classes: int, image_size: int, dropout: float, lrn: bool) -> Network:
    """Build AlexNet (Krizhevsky, Sutskever and Hinton, NIPS 2012: "SuperVision"), as Caffe's bvlc_alexnet has it.

    60,965,224 parameters at 227 px and 1000 classes.
    """
    return ConvFCNetwork(_ALEXNET, num_classes, image_size, dropout, lrn)


# arXiv 1311.2901, Figure 3. Convolution, ReLU, pool, then "contrast normalized across feature maps", which is AlexNet's
# normalisation. The padding of conv1 is what makes its maps 110 x 110; conv2 has none: 26 x 26.
_ZFNET = (
    ConvSpec("conv1", 96, kernel=7, stride=2, padding=1),
    PoolSpec("pool1"),
    NormSpec("norm1"),
    ConvSpec("conv2", 256, kernel=5, stride=2),
    PoolSpec("pool2"),
    NormSpec("norm2"),
    ConvSpec("conv3", 384, kernel=3, padding=1),
    ConvSpec("conv4", 384, kernel=3, padding=1),
    ConvSpec("conv5", 256, kernel=3, padding=1),
    PoolSpec("pool5"),
)


@register("model", "zfnet")
def build_zfnet(num_classes: int, image_size: int, dropout: float, lrn: bool) -> Network:
    """Build ZFNet (Zeiler and Fergus, arXiv 1311.2901), the family of Clarifai's networks of 2013.

    62,357,608 parameters at 224 px and 1000 classes.
    """
    return ConvFCNetwork(_ZFNET, num_classes, image_size, dropout, lrn)


# Table 1, ZF-5: normalisation stands before the pool here. The paddings are those that make the table's maps of 55,
# 27 and 13 pixels.
_SPPNET = (
    ConvSpec("conv1", 96, kernel=7, stride=2, padding=1),
    NormSpec("norm1"),
    PoolSpec("pool1"),
    ConvSpec("conv2", 256, kernel=5, stride=2, padding=1),
    NormSpec("norm2"),
    PoolSpec("pool2"),
    ConvSpec("conv3", 384, kernel=3, padding=1),
    ConvSpec("conv4", 384, kernel=3, padding=1),
    ConvSpec("conv5", 256, kernel=3, padding=1),
)
_SPPNET_GRIDS = (6, 3, 2, 1)  # section 3.1: a four-level pyramid, 50 bins


@register("model", "spp-net")
def build_sppnet(num_classes: int, image_size: int, dropout: float, lrn: bool) -> Network:
    """Build SPP-net, MSRA's (He, Zhang, Ren and Sun, arXiv 1406.4729): a pyramid of pools before the first full layer.

    77,037,672 parameters at 1000 classes, at any size of the image.
    """
    return ConvFCNetwork(_SPPNET, num_classes, image_size, dropout, lrn, SpatialPyramidPooling(_SPPNET_GRIDS))


# Table 1, column D: filters and number of the 3x3 convolutions in front of each 2x2 pool.
_VGG_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


@register("model", "vgg-16")
def build_vgg16(num_classes: int, image_size: int, dropout: float) -> Network:
    """Build VGG-16 (Simonyan and Zisserman, arXiv 1409.1556): 138,357,544 parameters at 224 px and 1000 classes."""
    rows: list[LayerSpec] = []
    for block, (filters, depth) in enumerate(_VGG_BLOCKS, 1):
        rows += [ConvSpec(f"conv{block}-{number}", filters, kernel=3, padding=1) for number in range(1, depth + 1)]
        rows.append(PoolSpec(f"pool{block}", kernel=2, stride=2))
    return ConvFCNetwork(rows, num_classes, image_size, dropout)


# Caffe's nin_imagenet. An "mlpconv" layer is a convolution and two of 1x1 ("cccp") behind it (section 3.1).
_NIN = (
    ConvSpec("conv1", 96, kernel=11, stride=4),
    ConvSpec("cccp1", 96, kernel=1),
    ConvSpec("cccp2", 96, kernel=1),
    PoolSpec("pool1"),
    ConvSpec("conv2", 256, kernel=5, padding=2),
    ConvSpec("cccp3", 256, kernel=1),
    ConvSpec("cccp4", 256, kernel=1),
    PoolSpec("pool2"),
    ConvSpec("conv3", 384, kernel=3, padding=1),
    ConvSpec("cccp5", 384, kernel=1),
    ConvSpec("cccp6", 384, kernel=1),
    PoolSpec("pool3"),
)
_NIN_AFTER_DROPOUT = (ConvSpec("conv4", 1024, kernel=3, padding=1), ConvSpec("cccp7", 1024, kernel=1))


@register("model", "nin")
class NIN(Network):
    """Network in Network (Lin, Chen and Yan, arXiv 1312.4400), the ImageNet form of Caffe's model zoo.

    7,595,176 parameters at 1000 classes; no fully connected layer: a map for each class, averaged (section 3.2).
    """

    def __init__(self, num_classes: int, image_size: int, dropout: float) -> None:
        super().__init__(num_classes)
        self.dropout = dropout
        self.body, channels, side = _build_body(_NIN, 3, image_size)
        self.num_dropout_units = channels * side * side
        self.last, channels, _ = _build_body(_NIN_AFTER_DROPOUT, channels, side)
        self.cccp8 = ConvReLU(channels, num_classes, 1)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """N x 3 x S x S (mean subtracted) -> Logits, none below 0: a ReLU follows cccp8 too."""
        x = images
        for module in self.body.values():
            x = module(x)
        if masks is not None:
            x = x * masks["main"].view(x.shape)
        for module in self.last.values():
            x = module(x)
        return Logits(functional.adaptive_avg_pool2d(self.cccp8(x), 1).flatten(1))

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Return every number of the map in front of conv4."""
        return {"main": (self.num_dropout_units, self.dropout)}

    def get_cost_rows(self) -> dict[str, nn.Module]:
        """Return every layer, pools included."""
        return {**self.body, **self.last, "cccp8": self.cccp8}

    def get_classifiers(self) -> dict[str, nn.Module]:
        """Return the last convolution."""
        return {"cccp8.conv": self.cccp8.conv}


@register("model", "lenet-5")
class LeNet5(Network):
    """LeNet-5 (LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 1998, section II.B) in its common form.

    61,706 parameters at 32 px and 10 classes. No dropout, which is younger.

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
