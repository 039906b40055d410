"""LeNet-5, and AlexNet, ZFNet, VGG-16, SPP-net and Network in Network as rows of data: convolutions, norms, pools."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.config.plugins import register
from orchestrator.models.layers import ConvReLU, LocalResponseNorm, MaxPool
from orchestrator.models.network import DropoutMasks, Logits, Network

HIDDEN_UNITS = 4096  # of fc6 and fc7, in every network that has them


class Conv(NamedTuple):
    """A k x k convolution with bias and ReLU; `groups` as on several GPUs that see a part of the channels each."""

    name: str
    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


class Norm(NamedTuple):
    """Local response normalisation with the constants of models.layers."""

    name: str


class Pool(NamedTuple):
    """A max pool that rounds up, as Caffe's."""

    name: str
    kernel: int = 3
    stride: int = 2


Layer = Conv | Norm | Pool


class Body(nn.ModuleDict):
    """The modules of rows by name, and the channels and side of the map that they make."""

    def __init__(self, rows: Sequence[Layer], channels: int, side: int) -> None:
        super().__init__()
        for row in rows:
            if isinstance(row, Norm):
                self[row.name] = LocalResponseNorm(channels)
            elif isinstance(row, Pool):
                self[row.name] = pool = MaxPool(row.kernel, row.stride)
                side = pool.compute_side(side)
            else:
                self[row.name] = ConvReLU(channels, *row[1:])
                channels, side = row.filters, (side + 2 * row.padding - row.kernel) // row.stride + 1
        self.channels, self.side = channels, side

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of N x C x H x W."""
        for module in self.values():
            x = module(x)
        return x


class SpatialPyramidPooling(nn.Module):
    """Spatial pyramid pooling: the maximum over each cell of n x n grids laid over the map (arXiv 1406.4729)."""

    def __init__(self, grids: Sequence[int]) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.bins = sum(n * n for n in self.grids)

    def forward(self, x: Tensor) -> Tensor:
        """Return N x C * bins for N x C x H x W, for any H and W."""
        # Cell i of n goes from floor(i H / n) to ceil((i + 1) H / n), as torch has it and the paper's appendix A.
        return torch.cat([functional.adaptive_max_pool2d(x, n).flatten(1) for n in self.grids], dim=1)


class ConvFCNetwork(Network):
    """A body of rows, perhaps a pyramid, then fc6 and fc7 with ReLU and dropout, then the classifier fc8."""

    classifier_name = "fc8"

    def __init__(
        self, num_classes: int, image_size: int, dropout: float, lrn: bool = True, *, rows: Sequence[Layer],
        grids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__(num_classes)
        self.dropout = dropout
        self.body = Body([row for row in rows if lrn or not isinstance(row, Norm)], 3, image_size)
        self.pyramid = SpatialPyramidPooling(grids) if grids else None
        bins = self.pyramid.bins if self.pyramid else self.body.side**2
        self.fc6 = nn.Linear(self.body.channels * bins, HIDDEN_UNITS)
        self.fc7 = nn.Linear(HIDDEN_UNITS, HIDDEN_UNITS)
        self.fc8 = nn.Linear(HIDDEN_UNITS, num_classes)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """Return the logits of N x 3 x S x S images (mean subtracted); `masks` has "fc6" and "fc7"."""
        x = self.body(images)
        x = x.flatten(1) if self.pyramid is None else self.pyramid(x)
        for name, layer in (("fc6", self.fc6), ("fc7", self.fc7)):
            x = functional.relu(layer(x))
            if masks is not None:
                x = x * masks[name]
        return Logits(self.fc8(x))

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Return the outputs of fc6 and fc7."""
        return {name: (HIDDEN_UNITS, self.dropout) for name in ("fc6", "fc7")}


# Krizhevsky, Sutskever and Hinton (NIPS 2012: "SuperVision"), section 3.5 and Figure 2, as Caffe's bvlc_alexnet:
# 60,965,224 parameters at 227 px and 1000 classes. conv2, conv4 and conv5 see the maps of their own GPU only: two
# groups. The paper says 224 x 224, but without padding its 55 x 55 maps come from 227 x 227. Caffe's normalisation
# differs from section 3.3 in k (1, not 2) and in that alpha is divided by n.
_ALEXNET = (
    Conv("conv1", 96, kernel=11, stride=4),
    Norm("norm1"),
    Pool("pool1"),
    Conv("conv2", 256, kernel=5, padding=2, groups=2),
    Norm("norm2"),
    Pool("pool2"),
    Conv("conv3", 384, kernel=3, padding=1),
    Conv("conv4", 384, kernel=3, padding=1, groups=2),
    Conv("conv5", 256, kernel=3, padding=1, groups=2),
    Pool("pool5"),
)

_UNGROUPED = (
    Conv("conv3", 384, kernel=3, padding=1),
    Conv("conv4", 384, kernel=3, padding=1),
    Conv("conv5", 256, kernel=3, padding=1),
)

# Zeiler and Fergus (arXiv 1311.2901), Figure 3, the family of Clarifai's networks of 2013: 62,357,608 parameters at
# 224 px and 1000 classes. Convolution, ReLU, pool, then "contrast normalized across feature maps", which is AlexNet's
# normalisation. The padding of conv1 is what makes its maps 110 x 110; conv2 has none: 26 x 26.
_ZFNET = (
    Conv("conv1", 96, kernel=7, stride=2, padding=1),
    Pool("pool1"),
    Norm("norm1"),
    Conv("conv2", 256, kernel=5, stride=2),
    Pool("pool2"),
    Norm("norm2"),
    *_UNGROUPED,
    Pool("pool5"),
)

# MSRA's SPP-net (He, Zhang, Ren and Sun, arXiv 1406.4729), Table 1, ZF-5: 77,037,672 parameters at 1000 classes, at any
# size of the image. Normalisation stands before the pool here. The paddings are those that make the table's maps of 55,
# 27 and 13 pixels.
_SPPNET = (
    Conv("conv1", 96, kernel=7, stride=2, padding=1),
    Norm("norm1"),
    Pool("pool1"),
    Conv("conv2", 256, kernel=5, stride=2, padding=1),
    Norm("norm2"),
    Pool("pool2"),
    *_UNGROUPED,
)
_SPPNET_GRIDS = (6, 3, 2, 1)  # section 3.1: a four-level pyramid, 50 bins


def _list_vgg_rows() -> list[Layer]:
    """Return Table 1, column D: filters and number of the 3x3 convolutions in front of each 2x2 pool."""
    rows: list[Layer] = []
    for block, (filters, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        rows += [Conv(f"conv{block}-{number}", filters, kernel=3, padding=1) for number in range(1, depth + 1)]
        rows.append(Pool(f"pool{block}", kernel=2, stride=2))
    return rows


register("model", "alexnet")(partial(ConvFCNetwork, rows=_ALEXNET))
register("model", "zfnet")(partial(ConvFCNetwork, rows=_ZFNET))
register("model", "spp-net")(partial(ConvFCNetwork, rows=_SPPNET, grids=_SPPNET_GRIDS))
# Simonyan and Zisserman (arXiv 1409.1556): 138,357,544 parameters at 224 px and 1000 classes.
register("model", "vgg-16")(partial(ConvFCNetwork, rows=_list_vgg_rows()))

# Caffe's nin_imagenet. An "mlpconv" layer is a convolution and two of 1x1 ("cccp") behind it (section 3.1).
_NIN = (
    Conv("conv1", 96, kernel=11, stride=4),
    Conv("cccp1", 96, kernel=1),
    Conv("cccp2", 96, kernel=1),
    Pool("pool1"),
    Conv("conv2", 256, kernel=5, padding=2),
    Conv("cccp3", 256, kernel=1),
    Conv("cccp4", 256, kernel=1),
    Pool("pool2"),
    Conv("conv3", 384, kernel=3, padding=1),
    Conv("cccp5", 384, kernel=1),
    Conv("cccp6", 384, kernel=1),
    Pool("pool3"),
)
_NIN_AFTER_DROPOUT = (Conv("conv4", 1024, kernel=3, padding=1), Conv("cccp7", 1024, kernel=1))


@register("model", "nin")
class NIN(Network):
    """Network in Network (Lin, Chen and Yan, arXiv 1312.4400), the ImageNet form of Caffe's model zoo.

    7,595,176 parameters at 1000 classes; no fully connected layer: a map for each class, averaged (section 3.2).
    """

    classifier_name = "cccp8.conv"

    def __init__(self, num_classes: int, image_size: int, dropout: float) -> None:
        super().__init__(num_classes)
        self.dropout = dropout
        self.body = Body(_NIN, 3, image_size)
        self.last = Body(_NIN_AFTER_DROPOUT, self.body.channels, self.body.side)
        self.cccp8 = ConvReLU(self.last.channels, num_classes, 1)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """Return the logits of N x 3 x S x S images (mean subtracted), none below 0: a ReLU follows cccp8 too."""
        x = self.body(images)
        if masks is not None:
            x = x * masks["main"].view(x.shape)
        return Logits(functional.adaptive_avg_pool2d(self.cccp8(self.last(x)), 1).flatten(1))

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Return every number of the map in front of conv4."""
        return {"main": (self.body.channels * self.body.side**2, self.dropout)}


@register("model", "lenet-5")
class LeNet5(Network):
    """LeNet-5 (LeCun, Bottou, Bengio and Haffner, Proceedings of the IEEE 1998, section II.B) in its common form.

    61,706 parameters at 32 px and 10 classes. Unlike in the original, as is common, C3 sees all six maps of S2, pools
    have no weights of their own, and a linear layer with softmax stands in for the radial basis functions.
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
        """Return the logits of N x 3 x S x S images (mean subtracted), made grey; takes no masks."""
        x = images.mean(dim=1, keepdim=True)
        for conv in (self.c1, self.c3):
            x = functional.avg_pool2d(torch.tanh(conv(x)), 2)
        x = x.flatten(1)
        for layer in (self.c5, self.f6):
            x = torch.tanh(layer(x))
        return Logits(self.classifier(x))
