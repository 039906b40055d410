"""AlexNet, "SuperVision" of 2012 (Krizhevsky, Sutskever and Hinton, NIPS 2012), as Caffe's bvlc_alexnet has it."""

from __future__ import annotations

from orchestrator.models.config import AlexNetConfig
from orchestrator.models.plain import Conv, FullyConnected, Norm, Pool, without_norms

# Section 3.5 and Figure 2. conv2, conv4 and conv5 see the maps of their own GPU only: two groups. The paper says
# 224 x 224, but without padding its 55 x 55 maps come from 227 x 227. Caffe's normalisation differs from section 3.3
# in k (1, not 2) and in that alpha is divided by n.
ROWS = (
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
UNITS = 4096  # of fc6 and fc7 (section 3.5)


class AlexNet(FullyConnected):
    """60,965,224 parameters at 227 px and 1000 classes."""

    def __init__(self, config: AlexNetConfig, classes: int) -> None:
        super().__init__(without_norms(ROWS, config.lrn), classes, config.image_size, UNITS, config.dropout)
