"""Low-rank changes of frozen layers, computed the cheaper of two ways.

*Beside*: x Wᵀ + s (x Aᵀ) Bᵀ. Plain autograd builds five nodes a layer for it and keeps more than it needs. One node keeps the input and the
thin product, and adds in place into the frozen base's own product; nothing is computed for the frozen weight.

*Merged*: x (W + s B A)ᵀ. One product forward and two backward whatever the rank, and two small ones for A and B; nothing thin at all. For narrow
layers, and whenever no gradient is wanted, that is less work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    product = torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1), alpha=scale)
    return product.view(weight.shape)


class _LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen. N rows, r = rank."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scale: float
    ) -> Tensor:
        thin_NR = x_NI @ down_RI.t()
        y_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(thin_NR, up_OR.t(), alpha=scale)
        ctx.save_for_backward(x_NI, thin_NR, weight_OI, down_RI, up_OR)
        ctx.scale = scale
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, thin_NR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        grad_x = grad_down = grad_up = None
        grad_thin_NR = (grad_NO @ up_OR).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight_OI).addmm_(grad_thin_NR, down_RI)
        if ctx.needs_input_grad[3]:
            grad_down = grad_thin_NR.t() @ x_NI
        if ctx.needs_input_grad[4]:  # thin-tall products are several times faster this way round in BLAS
            grad_up = (thin_NR.t() @ grad_NO).mul_(ctx.scale).t()
        return grad_x, None, None, grad_down, grad_up, None


def low_rank_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scale: float
) -> Tensor:
    """``F.linear(x, W + s·B·A, b)`` for a frozen base, without ever forming B·A. ``x`` is (…, in); the result (…, out)."""
    rows_NI = x.reshape(-1, x.shape[-1])
    y_NO = _LowRankLinear.apply(rows_NI, weight_OI, bias_O, down_RI.to(x.dtype), up_OR.to(x.dtype), scale)
    return y_NO.view(*x.shape[:-1], weight_OI.shape[0])


def low_rank_cells(x_BCHW: Tensor, layer: nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`low_rank_linear` for a 1 x 1 convolution of which `is_pointwise` is true."""
    cells_BHWC = x_BCHW.movedim(1, -1)
    y_BHWC = low_rank_linear(cells_BHWC, layer.weight.flatten(1), layer.bias, down.flatten(1), up.flatten(1), scale)
    return y_BHWC.movedim(-1, 1)


def is_pointwise(layer: nn.Module, x_BCHW: Tensor) -> bool:
    """Whether a layer is a 1 x 1 convolution and its input lies in memory cell by cell: then it is a linear layer of the cells."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
    )


def with_weight(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer gives with another weight of the same shape."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if is_pointwise(layer, x):
        return F.linear(x.movedim(1, -1), weight.flatten(1), layer.bias).movedim(-1, 1)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
