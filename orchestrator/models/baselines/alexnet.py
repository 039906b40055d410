"""AlexNet, "SuperVision" of 2012 (Krizhevsky, Sutskever and Hinton, NIPS 2012), as Caffe's bvlc_alexnet has it."""

from __future__ import annotations

from orchestrator.models.baselines.conv_fc import ConvFCNetwork, ConvSpec, NormSpec, PoolSpec, filter_norms
from orchestrator.models.config import AlexNetConfig

# Section 3.5 and Figure 2. conv2, conv4 and conv5 see the maps of their own GPU only: two groups. The paper says
# 224 x 224, but without padding its 55 x 55 maps come from 227 x 227. Caffe's normalisation differs from section 3.3
# in k (1, not 2) and in that alpha is divided by n.
ROWS = (
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
HIDDEN_UNITS = 4096  # of fc6 and fc7 (section 3.5)


class AlexNet(ConvFCNetwork):
    """60,965,224 parameters at 227 px and 1000 classes."""

    def __init__(self, config: AlexNetConfig, classes: int) -> None:
        super().__init__(filter_norms(ROWS, config.lrn), classes, config.image_size, HIDDEN_UNITS, config.dropout)
