"""Low-rank changes against the plain expression, with their gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.adapters._kernels import (
    is_pointwise,
    low_rank_cells,
    low_rank_linear,
    merged,
    merging_pays,
    with_weight,
)

SHAPES = [(7, 5), (2, 3, 5), (2, 1, 4, 5), (5,)]
CASES = list(itertools.product(SHAPES, [True, False], [0.0, 0.75, -2.0]))


def inputs(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float64, x_grad: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """x, W, b, A, B: 5 in, 6 out, rank 3."""
    generator = torch.Generator().manual_seed(1)
    x, weight, b, down, up = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (shape, (6, 5), (6,), (3, 5), (6, 3))
    )
    return x.requires_grad_(x_grad), weight, b if bias else None, down.requires_grad_(), up.requires_grad_()


def plainly(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return F.linear(x, weight + scale * up @ down, bias)


@pytest.mark.parametrize(("shape", "bias", "scale"), CASES)
def test_gradcheck(shape: tuple[int, ...], bias: bool, scale: float) -> None:
    given: Any = (*inputs(shape, bias), scale)
    assert torch.autograd.gradcheck(low_rank_linear, given)


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize(("shape", "bias", "scale"), CASES)
def test_equals_the_plain_expression(shape: tuple[int, ...], bias: bool, scale: float, x_grad: bool) -> None:
    ours, theirs = inputs(shape, bias, x_grad=x_grad), inputs(shape, bias, x_grad=x_grad)
    y, expected = low_rank_linear(*ours, scale), plainly(*theirs, scale)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    y.backward(direction)
    expected.backward(direction)
    for name, a, b in zip(["x", "W", "b", "A", "B"], ours, theirs, strict=True):
        if a is not None and b is not None:
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("frozen", ["A", "B", "A and B"])
def test_only_what_is_asked_for_gets_a_gradient(frozen: str) -> None:
    x, weight, bias, down, up = inputs((7, 5), True)
    down.requires_grad_("A" not in frozen)
    up.requires_grad_("B" not in frozen)
    low_rank_linear(x, weight, bias, down, up, 0.5).sum().backward()
    assert x.grad is not None
    assert (down.grad is None) == ("A" in frozen) and (up.grad is None) == ("B" in frozen)


def test_gradients_add_up_where_they_are_kept() -> None:
    x, weight, bias, down, up = inputs((7, 5), True)
    kept = torch.zeros_like(up)
    up.grad = kept
    for _ in range(2):
        low_rank_linear(x, weight, bias, down, up, 0.5).sum().backward()
    one = torch.autograd.grad(plainly(x, weight, bias, down, up, 0.5).sum(), up)[0]
    assert up.grad is kept
    torch.testing.assert_close(kept, 2 * one)


def test_weights_may_lie_in_memory_by_columns_and_end_in_single_cells() -> None:
    x, weight, bias, down, up = inputs((2, 3, 5), True)
    expected = plainly(x, weight, bias, down, up, 0.5)
    turned = up.detach().t().contiguous().t()[:, :, None, None].requires_grad_()
    y = low_rank_linear(x, weight, bias, down[:, :, None, None], turned, 0.5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    plain_up = torch.autograd.grad(expected.square().sum(), up)[0]
    torch.testing.assert_close(turned.grad, plain_up[:, :, None, None], rtol=1e-12, atol=1e-12)


def test_inputs_are_left_as_they_are() -> None:
    given = inputs((2, 3, 5), True)
    before = [t.detach().clone() for t in given if t is not None]
    low_rank_linear(*given, 0.5).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((t for t in given if t is not None), before, strict=True))


def test_a_strided_input() -> None:
    x, weight, bias, down, up = inputs((7, 5), True)
    x = x.detach()
    wide = x.repeat_interleave(2, 1)[:, ::2]
    assert not wide.is_contiguous()
    torch.testing.assert_close(
        low_rank_linear(wide, weight, bias, down, up, 0.5), plainly(x, weight, bias, down, up, 0.5)
    )


def test_float32_weights_on_a_bfloat16_base() -> None:
    x, weight, bias, down, up = inputs((64, 5), True, torch.bfloat16)
    down, up = down.detach().float().requires_grad_(), up.detach().float().requires_grad_()
    y = low_rank_linear(x, weight, bias, down, up, 0.5)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert down.grad is not None and down.grad.dtype == torch.float32
    assert bias is not None
    expected = plainly(x.float(), weight.float(), bias.float(), down, up, 0.5)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3), (6, 5, 1, 1)])
def test_the_merged_weight_and_its_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    down = torch.randn(3, *shape[1:], generator=generator, dtype=torch.float64, requires_grad=True)
    up = torch.randn(6, 3, *(1 for _ in shape[2:]), generator=generator, dtype=torch.float64, requires_grad=True)
    expected = weight + 0.75 * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(shape)
    torch.testing.assert_close(merged(weight, down, up, 0.75), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: merged(weight, a, b, 0.75), (down, up))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank", "learning", "merges"),
    [
        (1280, 32, 32, 16, True, True),  # narrow: 1280·32·32 + 3·16·32·32 against 3·1280·16·64
        (1280, 320, 320, 16, True, False),  # a full-size model, usual rank
        (4096, 320, 320, 128, True, True),  # the same with a rank as people publish
        (4096, 320, 320, 16, False, True),  # drawing: merging costs next to nothing
        (1, 320, 1280, 16, False, False),  # a single row: beside is cheaper even then
    ],
)
def test_the_cheaper_way_is_taken(
    rows: int, inputs: int, outputs: int, rank: int, learning: bool, merges: bool
) -> None:
    assert merging_pays(rows, inputs, outputs, rank, learning) == merges


def a_map(layout: torch.memory_format) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    return x.requires_grad_()


def test_a_convolution_of_single_cells_is_a_linear_layer_of_them() -> None:
    layer = nn.Conv2d(5, 6, 1).double().requires_grad_(False)
    x, (_, _, _, down, up) = a_map(torch.channels_last), inputs((1, 5), True)
    down_RC11, up_OR11 = down[:, :, None, None], up[:, :, None, None]
    assert is_pointwise(layer, x)
    expected = F.conv2d(x, merged(layer.weight, down_RC11, up_OR11, 0.5), layer.bias)
    beside = low_rank_cells(x, layer, down_RC11, up_OR11, 0.5)
    within = with_weight(layer, x, merged(layer.weight, down_RC11, up_OR11, 0.5))
    for found in (beside, within):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous(memory_format=torch.channels_last)
        given = torch.autograd.grad(found.square().sum(), (x, down, up), retain_graph=True)
        wanted = torch.autograd.grad(expected.square().sum(), (x, down, up), retain_graph=True)
        torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "layout"),
    [
        (nn.Conv2d(5, 6, 1), torch.contiguous_format),
        (nn.Conv2d(5, 6, 1, stride=2), torch.channels_last),
        (nn.Conv2d(5, 6, 1, padding=1), torch.channels_last),
        (nn.Conv2d(5, 5, 1, groups=5), torch.channels_last),
        (nn.Conv2d(5, 6, 3, padding=1, dilation=1), torch.channels_last),
        (nn.Linear(3, 6), torch.channels_last),
    ],
)
def test_other_layers_are_not_taken_for_one(layer: nn.Linear | nn.Conv2d, layout: torch.memory_format) -> None:
    layer, x = layer.double(), a_map(layout)
    assert not is_pointwise(layer, x)
    torch.testing.assert_close(with_weight(layer, x, layer.weight), layer(x), rtol=1e-12, atol=1e-12)
