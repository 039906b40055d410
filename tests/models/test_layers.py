"""Local response normalisation against torch's own, and pooling that rounds up."""

import math

import pytest
import torch
from torch import Tensor, nn

from orchestrator.models import layers
from orchestrator.models.layers import LRN_ALPHA, LRN_BETA, LRN_SIZE, ConvReLU, LocalResponseNorm, MaxPool

REFERENCE = nn.LocalResponseNorm(LRN_SIZE, LRN_ALPHA, LRN_BETA, k=1.0)


def random(shape: tuple[int, ...], scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)


def value_and_gradient(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(leaf)
    # A gradient that differs everywhere, so that a window shifted by a channel shows.
    (gradient,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 2, out.numel(), dtype=x.dtype).view_as(out))
    return out.detach(), gradient


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0, 1e5])
@pytest.mark.parametrize("channels", [2, 5, 64])
def test_lrn_equals_torchs(channels: int, scale: float, layout: torch.memory_format) -> None:
    x = random((2, channels, 5, 7), scale).contiguous(memory_format=layout)
    out, gradient = value_and_gradient(LocalResponseNorm(channels), x)
    wanted, wanted_gradient = value_and_gradient(REFERENCE, x)
    torch.testing.assert_close(out, wanted, rtol=2e-6, atol=1e-7)
    # Where the two terms of the gradient nearly cancel, float32 leaves an error relative to the terms.
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-5, atol=2e-6)
    assert out.is_contiguous(memory_format=layout)


def test_lrn_is_no_identity_at_these_sizes() -> None:
    x = random((1, 8, 3, 3), 300.0)
    assert (LocalResponseNorm(8)(x) / x).max() < 0.9, "else the comparison with torch's would prove nothing"


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_lrn_passes_gradcheck_in_double(scale: float) -> None:
    x = random((2, 6, 2, 3), scale, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(LocalResponseNorm(6).double(), (x,), eps=1e-6 * scale)


def test_lrn_in_double_equals_torchs_to_more_digits_than_float_has() -> None:
    x = random((2, 16, 4, 4), 200.0, torch.float64)
    module = LocalResponseNorm(16)
    torch.testing.assert_close(module(x), REFERENCE(x), rtol=1e-14, atol=0)
    assert module(x).dtype == torch.float64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [1, 200, 350, 10**6])
def test_lrn_is_the_same_in_blocks_of_any_size(
    block: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A sample has 168 elements: blocks of 1, 1, 2 and all 5 samples, the last of the third being half full.
    x = random((5, 7, 4, 6), 200.0).contiguous(memory_format=layout)
    monkeypatch.setattr(layers, "LRN_BLOCK", 10**9)
    wanted = value_and_gradient(LocalResponseNorm(7), x)
    monkeypatch.setattr(layers, "LRN_BLOCK", block)
    assert all(map(torch.equal, value_and_gradient(LocalResponseNorm(7), x), wanted))


def test_lrn_leaves_its_input_and_the_gradient_it_is_given() -> None:
    x = random((3, 6, 4, 4), 200.0).requires_grad_()
    gradient = random((3, 6, 4, 4), 1.0)
    before, given = x.detach().clone(), gradient.clone()
    LocalResponseNorm(6)(x).backward(gradient)
    assert torch.equal(x, before)
    assert torch.equal(gradient, given)


def test_lrn_takes_a_gradient_of_any_strides() -> None:
    # As the sum's, whose strides are all 0.
    x = random((3, 6, 4, 4), 200.0, torch.float64).requires_grad_()
    (got,) = torch.autograd.grad(LocalResponseNorm(6)(x).sum(), x)
    (wanted,) = torch.autograd.grad(REFERENCE(x).sum(), x)
    torch.testing.assert_close(got, wanted)


def test_lrn_of_no_samples() -> None:
    x = torch.empty(0, 6, 4, 4, requires_grad=True)
    out = LocalResponseNorm(6)(x)
    out.sum().backward()
    assert x.grad is not None and out.shape == x.grad.shape == x.shape


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 40])
def test_the_window_is_the_banded_convolution_that_other_devices_use(channels: int) -> None:
    x = random((2, channels, 3, 5), 100.0, torch.float64)
    band = LocalResponseNorm(channels).double().band
    got = layers._sum_window(x, band, torch.empty_like(x))
    torch.testing.assert_close(got, torch.nn.functional.conv2d(x, band))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lrn_computes_in_float32_under_autocast_and_keeps_the_type(dtype: torch.dtype) -> None:
    x = random((1, 16, 4, 4), 200.0).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = LocalResponseNorm(16)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, REFERENCE(x.float()).to(dtype), rtol=0, atol=0)


def test_lrn_has_nothing_to_store() -> None:
    module = LocalResponseNorm(16)
    assert not module.state_dict()
    assert not list(module.parameters())


@pytest.mark.parametrize("side", [3, 4, 7, 8, 14, 15, 28, 49, 112])
def test_max_pool_rounds_up(side: int) -> None:
    x = random((1, 2, side, side), 1.0)
    pooled = MaxPool()(x)
    assert pooled.shape[2:] == (math.ceil((side - 3) / 2) + 1,) * 2
    assert pooled[0, 0, -1, -1] == x[0, 0, 2 * (pooled.shape[2] - 1) :, 2 * (pooled.shape[3] - 1) :].max(), "cut window"


@pytest.mark.parametrize("side", [1, 2])
def test_max_pool_takes_a_map_smaller_than_its_window_whole(side: int) -> None:
    x = random((1, 2, side, side), 1.0)
    assert torch.equal(MaxPool()(x), x.amax(dim=(2, 3), keepdim=True))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (5, 1), (7, 2)])
@pytest.mark.parametrize("side", [8, 9])
def test_convolutions_keep_the_size_but_for_the_stride_and_end_in_relu(kernel: int, stride: int, side: int) -> None:
    out = ConvReLU(3, 4, kernel, stride)(random((1, 3, side, side), 1.0))
    assert out.shape == (1, 4, math.ceil(side / stride), math.ceil(side / stride))
    assert out.min() == 0
    assert out.max() > 0
