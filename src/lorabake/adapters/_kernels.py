"""Low-rank changes of frozen layers, computed the cheaper of two ways.

*Beside*: x Wᵀ + s (x Aᵀ) Bᵀ. Autograd keeps the input and the thin product for it, and computes nothing for the frozen weight. (A node of
our own with a hand-written backward pass saves a sum, and loses more than that in Python.)

*Merged*: x (W + s B A)ᵀ. One product forward and two backward whatever the rank, and two small ones for A and B; nothing thin at all. For narrow
layers, and whenever no gradient is wanted, that is less work.
"""

from __future__ import annotations

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
    return weight_of(torch.addmm(rows_of(weight), up.flatten(1), rows_of(down), alpha=scale), weight)


def rows_of(weight: Tensor) -> Tensor:
    """A weight as a matrix, a row for each output: (out, in) as it is, (out, in, height, width) as channels-last weights lie in memory."""
    return weight if weight.dim() == 2 else weight.movedim(1, -1).flatten(1)


def weight_of(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`rows_of`, with the shape of ``like``: a view."""
    if like.dim() == 2:
        return rows
    outputs, channels, height, width = like.shape
    return rows.view(outputs, height, width, channels).movedim(-1, 1)


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


def with_weight(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """What a layer gives with another weight of the same shape."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if is_pointwise(layer, x):
        return F.linear(x.movedim(1, -1), weight.flatten(1), layer.bias).movedim(-1, 1)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
