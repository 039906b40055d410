"""The few layers that GoogLeNet is made of. Shapes: N batch, C channels, H height, W width."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

# Caffe replication of section 5's network (bvlc_googlenet).
LRN_SIZE = 5
LRN_ALPHA = 1e-4
LRN_BETA = 0.75
# Google's Inception networks; torch's own is 1e-5.
BATCH_NORM_EPSILON = 1e-3
# Elements that are worked on at a time: 8 MiB in float32. Smaller blocks have more steps at which threads wait for each
# other, which costs far more than it gains once a core is busy with something else.
LRN_BLOCK = 2**21


class ConvReLU(nn.Module):
    """Convolution with bias and ReLU, as every convolution of the paper, also inside Inception.

    padding: kernel // 2 by default; groups: of channels that see a part of the inputs each.
    """

    def __init__(
        self, inputs: int, filters: int, kernel: int, stride: int = 1, padding: int | None = None, groups: int = 1
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, filters, kernel, stride, padding, groups=groups)
        self.norm: nn.Module | None = None

    def add_batch_norm(self) -> None:
        """Normalise between convolution and ReLU; the convolution then has no bias."""
        self.conv.register_parameter("bias", None)
        self.norm = nn.BatchNorm2d(self.conv.out_channels, eps=BATCH_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return N x filters x ceil(H / stride) x ceil(W / stride) for N x inputs x H x W and the default padding."""
        conv = self.conv
        if conv.kernel_size == (1, 1) and x.device.type == "cpu":
            # A 1x1 convolution in channels_last memory is one matrix product over a view, without the set-up
            # that a convolution pays on small maps; two thirds of the network's convolutions are 1x1.
            y = functional.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)
            if self.norm is None:
                return functional.relu(y, inplace=True).permute(0, 3, 1, 2)
            y = y.permute(0, 3, 1, 2)
        else:
            y = conv(x)
        return functional.relu(y if self.norm is None else self.norm(y), inplace=True)


class _LocalResponseNorm(torch.autograd.Function):
    """y = x * s^-beta with s = 1 + alpha/n * (sum of x^2 over n neighbouring channels).

    dx = g * s^-b - 2 b a/n * x * window(g * x * s^(-b-1)): the window is symmetric. s^-0.75 is
    rsqrt(s) * sqrt(rsqrt(s)), which is far cheaper than pow.

    Both passes go through the batch in blocks, write their results where they belong, and share two buffers. The
    backward pass computes s anew from x, so that nothing but the input is kept for it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, band: Tensor) -> Tensor:
        ctx.save_for_backward(x, band)
        y = torch.empty_like(x)
        for scale, spare, xs, ys in _iterate_blocks(x, y):
            _compute_scale(xs, band, spare, out=scale)
            torch.mul(xs, _compute_factor(scale, spare, out=scale), out=ys)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        x, band = ctx.saved_tensors  # type: ignore[attr-defined]
        dx = torch.empty_like(x)
        for scale, spare, xs, gs, ds in _iterate_blocks(x, grads[0], dx):
            _compute_scale(xs, band, spare, out=scale)
            torch.mul(gs, _compute_factor(scale, ds, out=spare), out=ds)  # g * s^-b
            torch.mul(ds, xs, out=spare).div_(scale)
            ds.sub_(_sum_window(spare, band, out=scale).mul_(xs), alpha=2 * LRN_BETA * LRN_ALPHA / LRN_SIZE)
        return dx, None


def _iterate_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield two buffers and some samples of each tensor, until all samples had their turn."""
    first = tensors[0]
    size = max(1, LRN_BLOCK // max(1, first.shape[1:].numel()))
    if first.device.type != "cpu":
        size = max(1, len(first))  # launching more kernels would cost more than the cache saves
    buffers = torch.empty_like(first[:size]), torch.empty_like(first[:size])
    for start in range(0, len(first), size):
        block = [tensor[start : start + size] for tensor in tensors]
        yield *(buffer[: len(block[0])] for buffer in buffers), *block


def _compute_scale(x: Tensor, band: Tensor, spare: Tensor, out: Tensor) -> Tensor:
    return _sum_window(torch.mul(x, x, out=spare), band, out).mul_(LRN_ALPHA / LRN_SIZE).add_(1.0)


def _compute_factor(scale: Tensor, spare: Tensor, out: Tensor) -> Tensor:
    """Return s^-0.75; `out` may be `scale` itself."""
    root = torch.rsqrt(scale, out=out)
    return root.mul_(torch.sqrt(root, out=spare))


def _sum_window(x: Tensor, band: Tensor, out: Tensor) -> Tensor:
    """Return the sum over the channels at most LRN_SIZE // 2 away."""
    if x.device.type != "cpu":
        return out.copy_(functional.conv2d(x, band))  # one kernel, as a 1x1 convolution with a banded matrix
    out.copy_(x)
    for distance in range(1, LRN_SIZE // 2 + 1):
        out[:, distance:].add_(x[:, :-distance])
        out[:, :-distance].add_(x[:, distance:])
    return out


class LocalResponseNorm(nn.Module):
    """Local response normalisation over channels, equal to torch.nn.LocalResponseNorm(5, 1e-4, 0.75, k=1)."""

    band: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        index = torch.arange(channels)
        near = (index[:, None] - index[None, :]).abs() <= LRN_SIZE // 2
        self.register_buffer("band", near.float()[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape as N x C x H x W; computes in at least float32, under autocast too."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            # A model cast as a whole (.double(), .bfloat16()) has cast the band too, whose zeros and ones stay exact.
            out: Tensor = _LocalResponseNorm.apply(x.to(dtype), self.band.to(dtype))  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


class MaxPool(nn.Module):
    """A max pool that rounds up, as Table 1's sizes need. A map smaller than the window is pooled whole."""

    def __init__(self, kernel: int = 3, stride: int = 2) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return N x C x (ceil((H - kernel) / stride) + 1) x ... for N x C x H x W."""
        # torch takes no window larger than the map and ceil mode's reach; images below 31 pixels end in a 1 x 1 map.
        window = (min(self.kernel, x.shape[-2]), min(self.kernel, x.shape[-1]))
        return functional.max_pool2d(x, window, self.stride, ceil_mode=True)

    def compute_side(self, side: int) -> int:
        """Return the side of the output for a square map: the last window must start inside the map."""
        return max(1, math.ceil((side - self.kernel) / self.stride) + 1)
