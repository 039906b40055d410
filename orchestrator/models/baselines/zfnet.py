"""ZFNet (Zeiler and Fergus, arXiv 1311.2901), the family of Clarifai's networks of 2013."""

from __future__ import annotations

from orchestrator.models.baselines.conv_fc import ConvFCNetwork, ConvSpec, NormSpec, PoolSpec, filter_norms
from orchestrator.models.config import ZFNetConfig

# Figure 3. Convolution, ReLU, pool, then "contrast normalized across feature maps", which is AlexNet's normalisation.
# The padding of conv1 is what makes its maps 110 x 110; conv2 has none: 26 x 26.
ROWS = (
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
HIDDEN_UNITS = 4096  # of fc6 and fc7 (Figure 3)


class ZFNet(ConvFCNetwork):
    """62,357,608 parameters at 224 px and 1000 classes."""

    def __init__(self, config: ZFNetConfig, classes: int) -> None:
        super().__init__(filter_norms(ROWS, config.lrn), classes, config.image_size, HIDDEN_UNITS, config.dropout)
