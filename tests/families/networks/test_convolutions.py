"""Convolutions that are computed as products of matrices are the convolutions they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorabake.families.networks import convolutions
from lorabake.families.networks.convolutions import Conv3x3, PointwiseConv2d

CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pointwise_convolution_is_a_convolution_and_keeps_the_layout(layout: torch.memory_format) -> None:
    layer = PointwiseConv2d(5, 7)
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=layout)
    given = layer(x)
    torch.testing.assert_close(given, torch.nn.functional.conv2d(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    assert given.is_contiguous(memory_format=layout)


def frozen(layer: Conv3x3) -> Conv3x3:
    return layer.requires_grad_(False).to(memory_format=CHANNELS_LAST)  # pyright: ignore[reportCallIssue]


def with_gradient(layer: Conv3x3, x_BCHW: Tensor, plainly: bool) -> tuple[Tensor, Tensor]:
    """The output, and the input's gradient for an uneven weighing of it."""
    x_BCHW = x_BCHW.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = torch.nn.Conv2d.forward(layer, x_BCHW) if plainly else layer(x_BCHW)
    weighing = torch.linspace(-1, 2, y.numel()).view(y.shape)
    (gradient,) = torch.autograd.grad(y, x_BCHW, weighing)
    return y.detach(), gradient


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (5, 7), (3, 8)])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0), (1, 0)])
def test_a_product_of_neighbourhoods_is_the_convolution(
    size: tuple[int, int], stride: int, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not padding and min(size) < 3:
        pytest.skip("no whole neighbourhood lies inside")
    monkeypatch.setattr(convolutions, "_MANY_WEIGHTS", 0)
    layer = frozen(Conv3x3(5, 7, stride, padding))
    x_BCHW = torch.randn(3, 5, *size).contiguous(memory_format=CHANNELS_LAST)
    assert layer._is_better_multiplied(x_BCHW)
    (y, gradient), (expected, expected_gradient) = (with_gradient(layer, x_BCHW, plainly) for plainly in (False, True))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)


def test_many_weights_over_few_cells_are_multiplied() -> None:
    """One of SD1.5's own, as wide as it is trained at 128 pixels."""
    layer = frozen(Conv3x3(1280, 1280))
    few, more = (torch.randn(1, 1280, side, side).contiguous(memory_format=CHANNELS_LAST) for side in (4, 17))
    assert layer._is_better_multiplied(few) and not layer._is_better_multiplied(more)
    torch.testing.assert_close(layer(few), torch.nn.Conv2d.forward(layer, few), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["weights in training", "rows elsewhere", "half precision", "few weights"])
def test_whatever_else_is_left_to_the_library(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why != "few weights":
        monkeypatch.setattr(convolutions, "_MANY_WEIGHTS", 0)
    layer = frozen(Conv3x3(4, 4)).requires_grad_(why == "weights in training")
    x_BCHW = torch.randn(2, 4, 5, 5)
    if why != "rows elsewhere":
        x_BCHW = x_BCHW.contiguous(memory_format=CHANNELS_LAST)
    if why == "half precision":
        layer, x_BCHW = layer.bfloat16(), x_BCHW.bfloat16()
    assert not layer._is_better_multiplied(x_BCHW)
    layer(x_BCHW).float().sum().backward() if why == "weights in training" else layer(x_BCHW)
    assert (layer.weight.grad is not None) == (why == "weights in training")
