"""SPP-net, MSRA's (He, Zhang, Ren and Sun, arXiv 1406.4729): a pyramid of pools in front of the first full layer."""

from __future__ import annotations

from orchestrator.models.baselines.conv_fc import (
    ConvFCNetwork,
    ConvSpec,
    NormSpec,
    PoolSpec,
    SpatialPyramidPooling,
    filter_norms,
)
from orchestrator.models.config import SPPNetConfig

# Table 1, ZF-5: normalisation stands before the pool here. The paddings are those that make the table's maps of 55,
# 27 and 13 pixels.
ROWS = (
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
GRIDS = (6, 3, 2, 1)  # section 3.1: a four-level pyramid, 50 bins
HIDDEN_UNITS = 4096  # of fc6 and fc7 (Table 1)


class SPPNet(ConvFCNetwork):
    """77,037,672 parameters at 1000 classes, whatever the size of the image."""

    def __init__(self, config: SPPNetConfig, classes: int) -> None:
        rows = filter_norms(ROWS, config.lrn)
        super().__init__(rows, classes, config.image_size, HIDDEN_UNITS, config.dropout, SpatialPyramidPooling(GRIDS))
