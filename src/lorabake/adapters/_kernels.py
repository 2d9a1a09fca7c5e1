"""Low-rank changes of frozen layers, computed the cheaper of two ways.

*Beside*: x Wᵀ + s (x Aᵀ) Bᵀ. Autograd keeps the input and the thin product for it, and computes nothing for the frozen weight. (A node of
our own with a hand-written backward pass saves a sum, and loses more than that in Python.)

*Merged*: x (W + s B A)ᵀ. One product forward and two backward whatever the rank, and two small ones for A and B; nothing thin at all. For narrow
layers, and whenever no gradient is wanted, that is less work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def merging_pays(rows: int, inputs: int, outputs: int, rank: int, learning: bool) -> bool:
    """Whether the merged way takes fewer multiplications.

    Args:
        rows: positions the layer is applied to.
        inputs, outputs: of the layer's matrix; a convolution's inputs are channels times kernel cells.
        rank: of the change.
        learning: gradients are wanted, of the input, A and B.
    """
    dense, thin, merge = rows * inputs * outputs, rows * rank * (inputs + outputs), rank * inputs * outputs
    return dense + 3 * merge < 3 * thin if learning else merge < thin


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + s·B·A in the shape of W, (out, in) or (out, in, height, width); differentiable in A and B."""
    return weights_of(torch.addmm(rows_of(weight), up.flatten(1), rows_of(down), alpha=scale), weight)


def rows_of(weight: Tensor) -> Tensor:
    """A weight as a matrix, a row for each output: (out, in) as it is, (out, in, height, width) as channels-last weights lie in memory.

    The same for a stack of weights, (L, out, in, height, width).
    """
    return weight if weight.dim() in (2, 3) else weight.movedim(-3, -1).flatten(-3)


def weights_of(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`rows_of`, for one weight or a stack of them; each has the shape of ``like``. A view."""
    if like.dim() == 2:
        return rows
    _, channels, height, width = like.shape
    return rows.unflatten(-1, (height, width, channels)).movedim(-1, -3)


def low_rank_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """``F.linear(x, W + s·B·A, b)``, (…, in) -> (…, out), without ever forming B·A.

    The thin product is kept as ranks by rows: BLAS takes two to four times as long to make rows by ranks where ranks are few. For the same
    reason B is best where it lies in memory as its transpose does. The change is added in place: nothing keeps the base's own product.

    Args:
        x: input; N rows in all.
        weight_OI: W, frozen.
        bias_O: b, frozen.
        down: A, (rank, in) or (rank, in, 1, 1), in any float type.
        up: B, (out, rank) or (out, rank, 1, 1), in any float type.
        scale: s.
    """
    x_NI = x.reshape(-1, x.shape[-1])
    return _with_change(F.linear(x_NI, weight_OI, bias_O), x_NI, down, up, scale).view(*x.shape[:-1], -1)


def low_rank_layer(layer: nn.Linear, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """:func:`low_rank_linear` of a layer, which may keep its weight in whatever form it likes."""
    x_NI = x.reshape(-1, x.shape[-1])
    return _with_change(layer.forward(x_NI), x_NI, down, up, scale).view(*x.shape[:-1], -1)


def _with_change(y_NO: Tensor, x_NI: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The base's product with the change added in place."""
    thin_RN = down.flatten(1).to(x_NI.dtype) @ x_NI.t()
    return y_NO.addmm_(thin_RN.t(), up.flatten(1).t().to(x_NI.dtype), alpha=scale)


def low_rank_cells(x_BCHW: Tensor, layer: nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`low_rank_linear` for a 1 x 1 convolution of which `is_pointwise` is true."""
    cells_BHWC = x_BCHW.movedim(1, -1)
    return low_rank_linear(cells_BHWC, layer.weight.flatten(1), layer.bias, down, up, scale).movedim(-1, 1)


def is_pointwise(layer: nn.Module, x_BCHW: Tensor) -> bool:
    """Whether a layer is a 1 x 1 convolution and its input lies in memory cell by cell: then it is a linear layer of the cells."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
    )


def with_weight(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, *, bias: bool = True) -> Tensor:
    """What a layer gives with another weight of the same shape; without its bias if that is not wanted."""
    own = layer.bias if bias else None
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, own)
    if is_pointwise(layer, x):
        return F.linear(x.movedim(1, -1), weight.flatten(1), own).movedim(-1, 1)
    return F.conv2d(x, weight, own, layer.stride, layer.padding, layer.dilation, layer.groups)


def low_rank_product(x: Tensor, down_RI: Tensor, up_OR: Tensor) -> Tensor:
    """x Aᵀ Bᵀ, (…, in) -> (…, out), in the type of ``x``; laid out as in :func:`low_rank_linear`."""
    thin_RN = down_RI.to(x.dtype) @ x.reshape(-1, x.shape[-1]).t()
    return (thin_RN.t() @ up_OR.t().to(x.dtype)).view(*x.shape[:-1], -1)


class _Hadamard(torch.autograd.Function):
    """(A1 B1) ∘ (A2 B2). Keeps the four thin matrices and none of the two products, which the backward pass computes again."""

    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        return (a1 @ b1).mul_(a2 @ b2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        a1, b1, a2, b2 = ctx.saved_tensors
        (grad,) = grads
        of_first = (a2 @ b2).mul_(grad)
        first = of_first @ b1.mT, a1.mT @ of_first
        of_second = torch.matmul(a1, b1, out=of_first).mul_(grad)
        return *first, of_second @ b2.mT, a2.mT @ of_second


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """(A1 B1) ∘ (A2 B2), each A (…, out, rank) and each B (…, rank, in); differentiable once."""
    return _Hadamard.apply(a1, b1, a2, b2)
