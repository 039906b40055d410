"""GoogLeNet built from Table 1 (arXiv 1409.4842, section 5), with its two auxiliary heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models import table1
from orchestrator.models.config import GoogLeNetConfig
from orchestrator.models.layers import ConvReLU, LocalResponseNorm, MaxPool
from orchestrator.models.network import DropoutMasks, Logits, Network
from orchestrator.models.table1 import ConvolutionRow, InceptionRow, MaxPoolRow


class InceptionReduced(nn.Module):
    """Figure 2b: 1x1, 1x1 -> 3x3, 1x1 -> 5x5 and 3x3 pool -> 1x1, concatenated over channels."""

    def __init__(self, inputs: int, row: InceptionRow) -> None:
        super().__init__()
        self.conv1 = ConvReLU(inputs, row.conv1, 1)
        self.reduce3 = ConvReLU(inputs, row.reduce3, 1)
        self.conv3 = ConvReLU(row.reduce3, row.conv3, 3)
        self.reduce5 = ConvReLU(inputs, row.reduce5, 1)
        self.conv5 = ConvReLU(row.reduce5, row.conv5, 5)
        self.pool_proj = ConvReLU(inputs, row.pool_proj, 1)
        self.filters = row.filters

    def forward(self, x: Tensor) -> Tensor:
        """N x inputs x H x W -> N x filters x H x W."""
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat(
            (self.conv1(x), self.conv3(self.reduce3(x)), self.conv5(self.reduce5(x)), self.pool_proj(pooled)),
            dim=1,
        )


class InceptionNaive(nn.Module):
    """Figure 2a, the ablation: no reductions, and the pooled input itself goes to the output."""

    def __init__(self, inputs: int, row: InceptionRow) -> None:
        super().__init__()
        self.conv1 = ConvReLU(inputs, row.conv1, 1)
        self.conv3 = ConvReLU(inputs, row.conv3, 3)
        self.conv5 = ConvReLU(inputs, row.conv5, 5)
        self.filters = row.conv1 + row.conv3 + row.conv5 + inputs

    def forward(self, x: Tensor) -> Tensor:
        """N x inputs x H x W -> N x (filters + inputs) x H x W: channels only ever grow (section 4)."""
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat((self.conv1(x), self.conv3(x), self.conv5(x), pooled), dim=1)


class AuxiliaryHead(nn.Module):
    """Average pool 5x5/3, 1x1 convolution with 128 filters, linear 1024, dropout 70%, linear (section 5)."""

    def __init__(self, inputs: int, side: int, classes: int, width: float) -> None:
        super().__init__()
        # A small preset's map may be smaller than the paper's 14 x 14: the window then is the whole map.
        self.kernel = min(table1.AUX_POOL_KERNEL, side)
        pooled = (side - self.kernel) // table1.AUX_POOL_STRIDE + 1
        filters = scale_filters(table1.AUX_FILTERS, width)
        hidden = scale_filters(table1.AUX_HIDDEN, width)
        self.conv = ConvReLU(inputs, filters, 1)
        self.hidden = nn.Linear(filters * pooled * pooled, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """N x inputs x side x side -> N x classes; `mask` N x hidden multiplies the hidden units."""
        x = functional.avg_pool2d(x, self.kernel, table1.AUX_POOL_STRIDE)
        x = functional.relu(self.hidden(self.conv(x).flatten(1)))
        out: Tensor = self.classifier(x if mask is None else x * mask)
        return out


class GoogLeNet(Network):
    """The network. Auxiliary heads run only in training mode; `drop_auxiliary` removes them permanently."""

    def __init__(self, config: GoogLeNetConfig, classes: int) -> None:
        super().__init__(classes)
        self.config = config
        self.stages = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        channels, side = 3, config.image_size
        for row in table1.TABLE_1:
            stage, channels, side = _build_stage(row, channels, side, config)
            self.stages[row.name] = stage
            if config.lrn and row.name in table1.LRN_AFTER:
                self.norms[row.name] = LocalResponseNorm(channels)
            if config.auxiliary and row.name in table1.AUX_AFTER:
                self.heads[row.name] = AuxiliaryHead(channels, side, classes, config.width)
        self.final_side = side
        self.classifier = nn.Linear(channels, classes)
        if config.batch_norm:
            add_batch_norms(self)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """N x 3 x image_size x image_size (mean subtracted) -> Logits.

        `masks` are the dropout masks of this batch (see dropout.py); without them nothing is dropped, which
        is what inference wants, since masks are scaled while training.
        """
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
        """Units and drop probability of each place that drops: "main" and the auxiliary heads."""
        places = {"main": (self.classifier.in_features, self.config.dropout)}
        for name, head in self.heads.items():
            assert isinstance(head, AuxiliaryHead)
            places[name] = (head.classifier.in_features, self.config.auxiliary_dropout)
        return places

    def get_cost_rows(self) -> dict[str, nn.Module]:
        """The rows of Table 1, the linear layer and the auxiliary heads."""
        heads = {table1.AUX_ROW_PREFIX + name: head for name, head in self.heads.items()}
        return {**self.stages, table1.LINEAR_ROW_NAME: self.classifier, **heads}

    def get_classifiers(self) -> dict[str, nn.Module]:
        """The linear layer and those that end the auxiliary heads."""
        return {
            name: layer
            for name, layer in self.named_modules()
            if name == "classifier" or (name.startswith("heads.") and name.endswith(".classifier"))
        }

    def get_auxiliary_names(self) -> frozenset[str]:
        """All of the auxiliary heads."""
        return frozenset(f"heads.{name}" for name in self.heads.state_dict())

    def drop_auxiliary(self) -> None:
        """Throw the auxiliary heads away, as the paper does at inference (section 5)."""
        self.heads = nn.ModuleDict()


def scale_filters(filters: int, width: float) -> int:
    """Filters times the width multiplier, a whole number and at least 1."""
    return max(1, round(filters * width))


def _build_stage(row: table1.TableRow, channels: int, side: int, config: GoogLeNetConfig) -> tuple[nn.Module, int, int]:
    """The module of a row with its output channels and side."""
    if isinstance(row, MaxPoolRow):
        # Caffe's and torch's ceil mode: the last window must start inside the map.
        return MaxPool(row.kernel, row.stride), channels, max(1, math.ceil((side - row.kernel) / row.stride) + 1)
    if isinstance(row, ConvolutionRow):
        filters = scale_filters(row.filters, config.width)
        after = math.ceil(side / row.stride)
        if row.reduce == 0:
            if config.stem == "separable":
                return SeparableConvReLU(channels, filters, row.kernel, row.stride), filters, after
            return ConvReLU(channels, filters, row.kernel, row.stride), filters, after
        reduce = scale_filters(row.reduce, config.width)
        pair = (ConvReLU(channels, reduce, 1), ConvReLU(reduce, filters, row.kernel, row.stride))
        return nn.Sequential(*pair), filters, after
    scaled_row = scale_row(row, config.width)
    make = InceptionReduced if config.module == "reduced" else InceptionNaive
    module = make(channels, scaled_row)
    return module, module.filters, side


def scale_row(row: InceptionRow, width: float) -> InceptionRow:
    """The row with every filter count multiplied."""
    return InceptionRow(
        row.name,
        conv1=scale_filters(row.conv1, width),
        reduce3=scale_filters(row.reduce3, width),
        conv3=scale_filters(row.conv3, width),
        reduce5=scale_filters(row.reduce5, width),
        conv5=scale_filters(row.conv5, width),
        pool_proj=scale_filters(row.pool_proj, width),
    )


# Table 1 counts 2.7K parameters and 34M operations for its first row: those of a depthwise 7x7 with 8 filters for each
# colour and a 1x1 behind it (8 x 3 x 49 = 1,176 and 24 x 64 = 1,536), as in Google's later Inception stems.
DEPTH_MULTIPLIER = 8
# Google's Inception networks; torch's own is 1e-5.
BATCH_NORM_EPSILON = 1e-3


class SeparableConvReLU(nn.Module):
    """A depthwise k x k convolution without bias or ReLU, then 1x1 with both."""

    def __init__(self, inputs: int, filters: int, kernel: int, stride: int) -> None:
        super().__init__()
        # Never more maps in between than come out, for narrow networks.
        maps = inputs * max(1, min(DEPTH_MULTIPLIER, filters // inputs))
        self.depthwise = nn.Conv2d(inputs, maps, kernel, stride, padding=kernel // 2, groups=inputs, bias=False)
        self.pointwise = ConvReLU(maps, filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        """N x inputs x H x W -> N x filters x ceil(H / stride) x ceil(W / stride)."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class ConvNormReLU(nn.Module):
    """A ConvReLU's convolution without bias, batch norm, ReLU."""

    def __init__(self, plain: ConvReLU) -> None:
        super().__init__()
        conv = plain.conv
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        self.conv = nn.Conv2d(conv.in_channels, conv.out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=BATCH_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """As ConvReLU's."""
        conv = self.conv
        if conv.kernel_size == (1, 1) and x.device.type == "cpu":  # as ConvReLU does, and with gradients like its
            y = functional.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).permute(0, 3, 1, 2)
        else:
            y = conv(x)
        return functional.relu(self.norm(y), inplace=True)


def add_batch_norms(model: nn.Module) -> None:
    """Put batch norm into every ConvReLU of the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvReLU):
                parent.add_module(name, ConvNormReLU(child))
