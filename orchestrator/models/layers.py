"""The few layers that GoogLeNet is made of. Shapes: N batch, C channels, H height, W width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Caffe replication of section 5's network (bvlc_googlenet).
LRN_SIZE = 5
LRN_ALPHA = 1e-4
LRN_BETA = 0.75


class ConvReLU(nn.Module):
    """Convolution with bias and ReLU, as every convolution of the paper, also inside Inception."""

    def __init__(self, inputs: int, filters: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, filters, kernel, stride, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """N x inputs x H x W -> N x filters x ceil(H / stride) x ceil(W / stride)."""
        conv = self.conv
        if conv.kernel_size == (1, 1) and x.device.type == "cpu":
            # A 1x1 convolution in channels_last memory is one matrix product over a view, without the set-up
            # that a convolution pays on small maps; two thirds of the network's convolutions are 1x1.
            y = functional.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
            return functional.relu(y, inplace=True).permute(0, 3, 1, 2)
        return functional.relu(conv(x), inplace=True)


class _LocalResponseNorm(torch.autograd.Function):
    """y = x * s^-beta with s = 1 + alpha/n * (sum of x^2 over n neighbouring channels).

    The window sum is a banded matrix over channels, so both passes are a 1x1 convolution (one matrix product,
    fast in channels_last) plus point-wise work; s^-0.75 is rsqrt(s) * rsqrt(sqrt(s)), which is far cheaper
    than pow. The backward pass is written out, since autograd would keep five intermediates:
    dx = g * s^-b - 2 b a/n * x * band(g * x * s^(-b-1)); the band is symmetric.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, band: Tensor) -> Tensor:
        scale = functional.conv2d(x * x, band).add_(1.0)
        root = scale.rsqrt()
        factor = root * root.sqrt()  # s^-1/2 * s^-1/4
        ctx.save_for_backward(x, band, scale, factor)
        return x * factor

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        x, band, scale, factor = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        inner = functional.conv2d((grad * x).mul_(factor).div_(scale), band)
        return (grad * factor).sub_(inner.mul_(x), alpha=2 * LRN_BETA), None


class LocalResponseNorm(nn.Module):
    """Local response normalisation over channels, equal to torch.nn.LocalResponseNorm(5, 1e-4, 0.75, k=1)."""

    band: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        index = torch.arange(channels)
        near = (index[:, None] - index[None, :]).abs() <= LRN_SIZE // 2
        band = near.float() * (LRN_ALPHA / LRN_SIZE)
        self.register_buffer("band", band[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W -> the same shape; computed in at least float32 whatever autocast says."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            # A model cast as a whole (.double(), .bfloat16()) has cast the band too.
            out: Tensor = _LocalResponseNorm.apply(x.to(dtype), self.band.to(dtype))  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


def max_pool(x: Tensor, kernel: int = 3, stride: int = 2) -> Tensor:
    """N x C x H x W -> N x C x (ceil((H - kernel) / stride) + 1) x ...: rounds up, as Table 1's sizes need.

    A map smaller than the window is pooled whole.
    """
    # torch refuses a window larger than the map and its ceil mode's reach; images below 31 pixels end in a 1 x 1 map.
    window = (min(kernel, x.shape[-2]), min(kernel, x.shape[-1]))
    return functional.max_pool2d(x, window, stride, ceil_mode=True)
