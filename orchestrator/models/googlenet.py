"""GoogLeNet built from the rows of Table 1 (arXiv 1409.4842, section 5), with its two auxiliary heads."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.layers import ConvReLU, LocalResponseNorm, MaxPool
from orchestrator.models.network import DropoutMasks, Logits, Network


class ConvolutionRow(NamedTuple):
    """A k x k convolution with stride; `reduce` filters of 1x1 in front of it when not 0."""

    name: str
    kernel: int
    stride: int
    filters: int
    reduce: int = 0


class MaxPoolRow(NamedTuple):
    """A 3x3 max pool with stride 2, rounding up (Table 1's sizes need it)."""

    name: str


class InceptionRow(NamedTuple):
    """One Inception module with dimension reductions (Figure 2b): filters of its six convolutions."""

    name: str
    conv1: int
    reduce3: int
    conv3: int
    reduce5: int
    conv5: int
    pool_proj: int


TableRow = ConvolutionRow | MaxPoolRow | InceptionRow

TABLE_1: tuple[TableRow, ...] = (
    ConvolutionRow("conv1", kernel=7, stride=2, filters=64),
    MaxPoolRow("pool1"),
    ConvolutionRow("conv2", kernel=3, stride=1, filters=192, reduce=64),
    MaxPoolRow("pool2"),
    InceptionRow("3a", 64, 96, 128, 16, 32, 32),
    InceptionRow("3b", 128, 128, 192, 32, 96, 64),
    MaxPoolRow("pool3"),
    InceptionRow("4a", 192, 96, 208, 16, 48, 64),
    InceptionRow("4b", 160, 112, 224, 24, 64, 64),
    InceptionRow("4c", 128, 128, 256, 24, 64, 64),
    InceptionRow("4d", 112, 144, 288, 32, 64, 64),
    InceptionRow("4e", 256, 160, 320, 32, 128, 128),
    MaxPoolRow("pool4"),
    InceptionRow("5a", 256, 160, 320, 32, 128, 128),
    InceptionRow("5b", 384, 192, 384, 48, 128, 128),
)

# Local response normalisation follows these rows (Figure 3).
LRN_AFTER = ("pool1", "conv2")

# Auxiliary classifiers read the outputs of these modules (section 5).
AUX_AFTER = ("4a", "4d")
AUX_POOL_KERNEL, AUX_POOL_STRIDE = 5, 3
AUX_FILTERS = 128
AUX_HIDDEN = 1024


class Inception(nn.Module):
    """Figure 2b: 1x1, 1x1 -> 3x3, 1x1 -> 5x5 and 3x3 pool -> 1x1, concatenated over channels.

    naive: Figure 2a, the ablation: no 1x1 in front of the others or behind the pool, so channels only ever grow.
    """

    def __init__(self, inputs: int, row: InceptionRow, naive: bool = False) -> None:
        super().__init__()
        reduce3, reduce5, pool_proj = (inputs,) * 3 if naive else (row.reduce3, row.reduce5, row.pool_proj)
        self.conv1 = ConvReLU(inputs, row.conv1, 1)
        self.reduce3 = nn.Identity() if naive else ConvReLU(inputs, reduce3, 1)
        self.conv3 = ConvReLU(reduce3, row.conv3, 3)
        self.reduce5 = nn.Identity() if naive else ConvReLU(inputs, reduce5, 1)
        self.conv5 = ConvReLU(reduce5, row.conv5, 5)
        self.pool_proj = nn.Identity() if naive else ConvReLU(inputs, pool_proj, 1)
        self.filters = row.conv1 + row.conv3 + row.conv5 + pool_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return N x filters x H x W for N x inputs x H x W."""
        pooled = self.pool_proj(functional.max_pool2d(x, 3, stride=1, padding=1))
        return torch.cat((self.conv1(x), self.conv3(self.reduce3(x)), self.conv5(self.reduce5(x)), pooled), dim=1)


class AuxiliaryHead(nn.Module):
    """Average pool 5x5/3, 1x1 convolution with 128 filters, linear 1024, dropout 70%, linear (section 5)."""

    def __init__(self, inputs: int, side: int, classes: int, width: float) -> None:
        super().__init__()
        # A small preset's map may be smaller than the paper's 14 x 14: the window then is the whole map.
        self.kernel = min(AUX_POOL_KERNEL, side)
        pooled = (side - self.kernel) // AUX_POOL_STRIDE + 1
        filters, hidden = scale_filters(AUX_FILTERS, width), scale_filters(AUX_HIDDEN, width)
        self.conv = ConvReLU(inputs, filters, 1)
        self.hidden = nn.Linear(filters * pooled * pooled, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return N x classes for N x inputs x side x side; `mask` N x hidden multiplies the hidden units."""
        x = functional.avg_pool2d(x, self.kernel, AUX_POOL_STRIDE)
        x = functional.relu(self.hidden(self.conv(x).flatten(1)))
        out: Tensor = self.classifier(x if mask is None else x * mask)
        return out


class GoogLeNet(Network):
    """The network. Auxiliary heads run only in training mode; `drop_auxiliary` removes them permanently."""

    def __init__(self, config: GoogLeNetConfig, classes: int) -> None:
        super().__init__(classes)
        self.config = config
        self.stages, self.norms, self.heads = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        channels, side = 3, config.image_size
        for row in TABLE_1:
            stage, channels, side = _build_stage(row, channels, side, config)
            self.stages[row.name] = stage
            if config.lrn and row.name in LRN_AFTER:
                self.norms[row.name] = LocalResponseNorm(channels)
            if config.auxiliary and row.name in AUX_AFTER:
                self.heads[row.name] = AuxiliaryHead(channels, side, classes, config.width)
        self.final_side = side
        self.classifier = nn.Linear(channels, classes)
        if config.batch_norm:
            for module in list(self.modules()):
                if isinstance(module, ConvReLU):
                    module.add_batch_norm()

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """Return the logits of N x 3 x image_size x image_size images (mean subtracted)."""
        x, auxiliary = images, []
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.norms:
                x = self.norms[name](x)
            if self.training and name in self.heads:
                auxiliary.append(self.heads[name](x, None if masks is None else masks[name]))
        x = functional.avg_pool2d(x, self.final_side).flatten(1)
        if masks is not None:
            x = x * masks["main"]
        return Logits(self.classifier(x), tuple(auxiliary))

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Return units and drop probability of each place that drops: "main" and the auxiliary heads."""
        places = {"main": (self.classifier.in_features, self.config.dropout)}
        for name, head in self.heads.items():
            assert isinstance(head, AuxiliaryHead)
            places[name] = (head.classifier.in_features, self.config.auxiliary_dropout)
        return places

    def get_auxiliary_names(self) -> frozenset[str]:
        """Return all of the auxiliary heads."""
        return frozenset(f"heads.{name}" for name in self.heads.state_dict())

    def drop_auxiliary(self) -> None:
        """Remove the auxiliary heads, as the paper does at inference (section 5)."""
        self.heads = nn.ModuleDict()


def scale_filters(filters: int, width: float) -> int:
    """Return filters times the width multiplier, a whole number and at least 1."""
    return max(1, round(filters * width))


def _build_stage(row: TableRow, channels: int, side: int, config: GoogLeNetConfig) -> tuple[nn.Module, int, int]:
    """Return the module of a row with its output channels and side."""
    if isinstance(row, MaxPoolRow):
        pool = MaxPool()
        return pool, channels, pool.compute_side(side)
    if isinstance(row, ConvolutionRow):
        filters = scale_filters(row.filters, config.width)
        after = math.ceil(side / row.stride)
        if row.reduce == 0:
            build_conv = build_separable_conv if config.stem == "separable" else ConvReLU
            return build_conv(channels, filters, row.kernel, row.stride), filters, after
        reduce = scale_filters(row.reduce, config.width)
        pair = (ConvReLU(channels, reduce, 1), ConvReLU(reduce, filters, row.kernel, row.stride))
        return nn.Sequential(*pair), filters, after
    scaled = InceptionRow(row.name, *(scale_filters(filters, config.width) for filters in row[1:]))
    module = Inception(channels, scaled, naive=config.module == "naive")
    return module, module.filters, side


# Table 1 counts 2.7K parameters and 34M operations for its first row: those of a depthwise 7x7 with 8 filters for each
# colour and a 1x1 behind it (8 x 3 x 49 = 1,176 and 24 x 64 = 1,536), as in Google's later Inception stems.
DEPTH_MULTIPLIER = 8


def build_separable_conv(inputs: int, filters: int, kernel: int, stride: int) -> nn.Module:
    """Build a depthwise k x k convolution without bias or ReLU, then 1x1 with both."""
    # Never more maps in between than come out, for narrow networks.
    maps = inputs * max(1, min(DEPTH_MULTIPLIER, filters // inputs))
    depthwise = nn.Conv2d(inputs, maps, kernel, stride, padding=kernel // 2, groups=inputs, bias=False)
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=ConvReLU(maps, filters, 1)))
