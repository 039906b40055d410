"""Parts of GoogLeNet's variants, none of them in the paper's text: batch norm, and the separable first row."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from orchestrator.models.layers import ConvReLU

# Table 1 counts 2.7K parameters and 34M operations for its first row: those of a depthwise 7x7 with 8 filters for each
# colour and a 1x1 behind it (8 x 3 x 49 = 1,176 and 24 x 64 = 1,536), as in Google's later Inception stems.
DEPTH_MULTIPLIER = 8
# Google's Inception networks; torch's own is 1e-5.
EPSILON = 1e-3


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
        self.norm = nn.BatchNorm2d(conv.out_channels, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """As ConvReLU's."""
        conv = self.conv
        if conv.kernel_size == (1, 1) and x.device.type == "cpu":  # as ConvReLU does, and with gradients like its
            y = functional.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).permute(0, 3, 1, 2)
        else:
            y = conv(x)
        return functional.relu(self.norm(y), inplace=True)


def with_batch_norms(model: nn.Module) -> None:
    """Put batch norm into every ConvReLU of the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvReLU):
                parent.add_module(name, ConvNormReLU(child))
