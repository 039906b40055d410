"""The Inception module, with and without dimension reductions (Figure 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.layers import ConvReLU
from orchestrator.models.table1 import InceptionRow


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
