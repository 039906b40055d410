"""Network in Network (Lin, Chen and Yan, arXiv 1312.4400), the ImageNet form of Caffe's model zoo (nin_imagenet)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.baselines.conv_fc import ConvSpec, PoolSpec, build_body
from orchestrator.models.config import NINConfig
from orchestrator.models.layers import ConvReLU
from orchestrator.models.network import DropoutMasks, Logits, Network

# An "mlpconv" layer is a convolution and two of 1x1 ("cccp") behind it (section 3.1).
ROWS = (
    ConvSpec("conv1", 96, kernel=11, stride=4),
    ConvSpec("cccp1", 96, kernel=1),
    ConvSpec("cccp2", 96, kernel=1),
    PoolSpec("pool1"),
    ConvSpec("conv2", 256, kernel=5, padding=2),
    ConvSpec("cccp3", 256, kernel=1),
    ConvSpec("cccp4", 256, kernel=1),
    PoolSpec("pool2"),
    ConvSpec("conv3", 384, kernel=3, padding=1),
    ConvSpec("cccp5", 384, kernel=1),
    ConvSpec("cccp6", 384, kernel=1),
    PoolSpec("pool3"),
)
ROWS_AFTER_DROPOUT = (ConvSpec("conv4", 1024, kernel=3, padding=1), ConvSpec("cccp7", 1024, kernel=1))


class NIN(Network):
    """7,595,176 parameters at 1000 classes; no fully connected layer: a map for each class, averaged (section 3.2)."""

    def __init__(self, config: NINConfig, classes: int) -> None:
        super().__init__(classes)
        self.dropout = config.dropout
        self.body, channels, side = build_body(ROWS, 3, config.image_size)
        self.num_dropout_units = channels * side * side
        self.last, channels, _ = build_body(ROWS_AFTER_DROPOUT, channels, side)
        self.cccp8 = ConvReLU(channels, classes, 1)

    def forward(self, images: Tensor, masks: DropoutMasks | None = None) -> Logits:
        """N x 3 x S x S (mean subtracted) -> Logits, none below 0: a ReLU follows cccp8 too."""
        x = images
        for module in self.body.values():
            x = module(x)
        if masks is not None:
            x = x * masks["main"].view(x.shape)
        for module in self.last.values():
            x = module(x)
        return Logits(functional.adaptive_avg_pool2d(self.cccp8(x), 1).flatten(1))

    def get_dropout_units(self) -> dict[str, tuple[int, float]]:
        """Every number of the map in front of conv4."""
        return {"main": (self.num_dropout_units, self.dropout)}

    def get_cost_rows(self) -> dict[str, nn.Module]:
        """Every layer, pools included."""
        return {**self.body, **self.last, "cccp8": self.cccp8}

    def get_classifiers(self) -> dict[str, nn.Module]:
        """The last convolution."""
        return {"cccp8.conv": self.cccp8.conv}
