"""Networks before GoogLeNet as rows of data: convolutions and pools, then fully connected layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.layers import ConvReLU, LocalResponseNorm, max_pool
from orchestrator.models.network import DropoutMasks, Logits, Network


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


class _MaxPool(nn.Module):
    def __init__(self, row: PoolSpec) -> None:
        super().__init__()
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x, self.row.kernel, self.row.stride)


def build_body(rows: Sequence[LayerSpec], channels: int, side: int) -> tuple[nn.ModuleDict, int, int]:
    """The modules of the rows by name, and the channels and side of the map that they make."""
    modules = nn.ModuleDict()
    for row in rows:
        if isinstance(row, NormSpec):
            modules[row.name] = LocalResponseNorm(channels)
        elif isinstance(row, PoolSpec):
            modules[row.name] = _MaxPool(row)
            side = max(1, math.ceil((side - row.kernel) / row.stride) + 1)
        else:
            one_by_one = (row.kernel, row.stride, row.groups) == (1, 1, 1)
            modules[row.name] = ConvReLU(channels, row.filters, 1) if one_by_one else _GroupedConvReLU(channels, row)
            channels, side = row.filters, (side + 2 * row.padding - row.kernel) // row.stride + 1
    return modules, channels, side


def filter_norms(rows: Sequence[LayerSpec], lrn: bool) -> list[LayerSpec]:
    """The rows, without their normalisations unless `lrn`."""
    return [row for row in rows if lrn or not isinstance(row, NormSpec)]


class SpatialPyramidPooling(nn.Module):
    """Spatial pyramid pooling: the maximum over each cell of n x n grids laid over the map (arXiv 1406.4729)."""

    def __init__(self, grids: Sequence[int]) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.bins = sum(n * n for n in self.grids)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> N x C * bins, whatever H and W."""
        # Cell i of n goes from floor(i H / n) to ceil((i + 1) H / n), as torch has it and the paper's appendix A.
        return torch.cat([functional.adaptive_max_pool2d(x, n).flatten(1) for n in self.grids], dim=1)


class ConvFCNetwork(Network):
    """A body of rows, perhaps a pyramid, then fc6 and fc7 with ReLU and dropout, then the classifier fc8."""

    def __init__(
        self, rows: Sequence[LayerSpec], classes: int, image_size: int, units: int, dropout: float,
        pyramid: SpatialPyramidPooling | None = None,
    ) -> None:  # fmt: skip
        super().__init__(classes)
        self.dropout = dropout
        self.body, channels, side = build_body(rows, 3, image_size)
        self.pyramid = pyramid
        self.fc6 = nn.Linear(channels * (side * side if pyramid is None else pyramid.bins), units)
        self.fc7 = nn.Linear(units, units)
        self.fc8 = nn.Linear(units, classes)

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
        """The outputs of fc6 and fc7."""
        return {name: (self.fc7.in_features, self.dropout) for name in ("fc6", "fc7")}

    def get_cost_rows(self) -> dict[str, nn.Module]:
        """Every layer, pools and normalisations included."""
        pyramid = {} if self.pyramid is None else {"spp": self.pyramid}
        return {**self.body, **pyramid, "fc6": self.fc6, "fc7": self.fc7, "fc8": self.fc8}

    def get_classifiers(self) -> dict[str, nn.Module]:
        """The last layer."""
        return {"fc8": self.fc8}
