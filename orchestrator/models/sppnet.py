"""SPP-net, MSRA's (He, Zhang, Ren and Sun, arXiv 1406.4729): a pyramid of pools in front of the first full layer."""

from __future__ import annotations

from orchestrator.models.config import SPPNetConfig
from orchestrator.models.plain import Conv, FullyConnected, Norm, Pool, Pyramid, without_norms

# Table 1, ZF-5: normalisation stands before the pool here. The paddings are those that make the table's maps of 55,
# 27 and 13 pixels.
ROWS = (
    Conv("conv1", 96, kernel=7, stride=2, padding=1),
    Norm("norm1"),
    Pool("pool1"),
    Conv("conv2", 256, kernel=5, stride=2, padding=1),
    Norm("norm2"),
    Pool("pool2"),
    Conv("conv3", 384, kernel=3, padding=1),
    Conv("conv4", 384, kernel=3, padding=1),
    Conv("conv5", 256, kernel=3, padding=1),
)
GRIDS = (6, 3, 2, 1)  # section 3.1: a four-level pyramid, 50 bins
UNITS = 4096  # of fc6 and fc7 (Table 1)


class SPPNet(FullyConnected):
    """77,037,672 parameters at 1000 classes, whatever the size of the image."""

    def __init__(self, config: SPPNetConfig, classes: int) -> None:
        rows = without_norms(ROWS, config.lrn)
        super().__init__(rows, classes, config.image_size, UNITS, config.dropout, Pyramid(GRIDS))
