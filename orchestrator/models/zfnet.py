"""ZFNet (Zeiler and Fergus, arXiv 1311.2901), the family of Clarifai's networks of 2013."""

from __future__ import annotations

from orchestrator.models.config import ZFNetConfig
from orchestrator.models.plain import Conv, FullyConnected, Norm, Pool, without_norms

# Figure 3. Convolution, ReLU, pool, then "contrast normalized across feature maps", which is AlexNet's normalisation.
# The padding of conv1 is what makes its maps 110 x 110; conv2 has none: 26 x 26.
ROWS = (
    Conv("conv1", 96, kernel=7, stride=2, padding=1),
    Pool("pool1"),
    Norm("norm1"),
    Conv("conv2", 256, kernel=5, stride=2),
    Pool("pool2"),
    Norm("norm2"),
    Conv("conv3", 384, kernel=3, padding=1),
    Conv("conv4", 384, kernel=3, padding=1),
    Conv("conv5", 256, kernel=3, padding=1),
    Pool("pool5"),
)
UNITS = 4096  # of fc6 and fc7 (Figure 3)


class ZFNet(FullyConnected):
    """62,357,608 parameters at 224 px and 1000 classes."""

    def __init__(self, config: ZFNetConfig, classes: int) -> None:
        super().__init__(without_norms(ROWS, config.lrn), classes, config.image_size, UNITS, config.dropout)
