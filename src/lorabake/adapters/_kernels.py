"""Low-rank changes of frozen layers, computed the cheaper of two ways.

*Beside*: x Wᵀ + s (x Aᵀ) Bᵀ. Plain autograd builds five nodes a layer for it and keeps more than it needs. One node keeps the input and the
thin product, and adds in place into the frozen base's own product; nothing is computed for the frozen weight.

*Merged*: x (W + s B A)ᵀ. One product forward and two backward whatever the rank, and two small ones for A and B; nothing thin at all. For narrow
layers, and whenever no gradient is wanted, that is less work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class _LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W and b frozen. N rows, R = rank.

    Thin products are kept as ranks by rows: BLAS takes two to four times as long to make rows by ranks where ranks are few.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scale: float
    ) -> Tensor:
        thin_RN = _scaled(down_RI @ x_NI.t(), scale)
        ctx.save_for_backward(x_NI, thin_RN, weight_OI, down_RI, up_OR)
        ctx.scale = scale
        return F.linear(x_NI, weight_OI, bias_O).addmm_(thin_RN.t(), up_OR.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_NI, thin_RN, weight_OI, down_RI, up_OR = ctx.saved_tensors
        grad_thin_RN = _scaled(up_OR.t() @ grad_NO.t(), ctx.scale)
        wanted = ctx.needs_input_grad
        grad_x = (grad_NO @ weight_OI).addmm_(grad_thin_RN.t(), down_RI) if wanted[0] else None
        grad_down = grad_thin_RN @ x_NI if wanted[3] else None
        grad_up = (thin_RN @ grad_NO).t() if wanted[4] else None
        return grad_x, None, None, grad_down, grad_up, None


class _LowRankLinears(torch.autograd.Function):
    """The same for several layers of one input; S = all ranks."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, scales: Sequence[float], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = (tensors[kind::4] for kind in range(4))
        downs_SI = torch.cat(downs)  # pyright: ignore[reportArgumentType]
        thin_SN = downs_SI @ x_NI.t()
        thins = thin_SN.split([up.shape[1] for up in ups if up is not None])
        outputs: list[Tensor] = []
        for weight_OI, bias_O, up_OR, thin_RN, scale in zip(weights, biases, ups, thins, scales, strict=True):
            assert weight_OI is not None and up_OR is not None
            outputs.append(F.linear(x_NI, weight_OI, bias_O).addmm_(_scaled(thin_RN, scale).t(), up_OR.t()))
        ctx.save_for_backward(x_NI, thin_SN, downs_SI, *weights, *ups)
        ctx.scales = scales
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        count = len(grads)
        x_NI, thin_SN, downs_SI, *rest = ctx.saved_tensors
        weights, ups = rest[:count], rest[count:]
        ranks = [up_OR.shape[1] for up_OR in ups]
        grad_thin_SN = torch.empty_like(thin_SN)
        for part_RN, grad_NO, up_OR, scale in zip(grad_thin_SN.split(ranks), grads, ups, ctx.scales, strict=True):
            _scaled(torch.mm(up_OR.t(), grad_NO.t(), out=part_RN), scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grads[0] @ weights[0]
            for grad_NO, weight_OI in zip(grads[1:], weights[1:], strict=True):
                grad_x.addmm_(grad_NO, weight_OI)
            grad_x.addmm_(grad_thin_SN.t(), downs_SI)
        found: list[Tensor | None] = []
        wanted = ctx.needs_input_grad[2:]
        grad_downs = (grad_thin_SN @ x_NI).split(ranks) if any(wanted[2::4]) else [None] * count
        for index, (thin_RN, grad_NO) in enumerate(zip(thin_SN.split(ranks), grads, strict=True)):
            grad_up = (thin_RN @ grad_NO).t() if wanted[4 * index + 3] else None
            found += [None, None, grad_downs[index], grad_up]
        return grad_x, None, *found


def _scaled(thin: Tensor, scale: float) -> Tensor:
    """In place, where it changes anything: by default alpha is the rank."""
    return thin if scale == 1 else thin.mul_(scale)


class LowRank(NamedTuple):
    """A frozen linear layer and its change W + s·B·A."""

    weight_OI: Tensor
    bias_O: Tensor | None
    down_RI: Tensor
    up_OR: Tensor
    scale: float


def low_rank_linears(x: Tensor, *layers: LowRank) -> tuple[Tensor, ...]:
    """``F.linear(x, W + s·B·A, b)`` for each layer, without ever forming B·A. ``x`` is (…, in); each result (…, out).

    Layers of one input share the reading of it: one thin product for all of them, and one more backward.
    """
    rows_NI = x.reshape(-1, x.shape[-1])
    if len(layers) == 1:  # by far the most, and half of what a small one takes is Python
        weight_OI, bias_O, down_RI, up_OR, scale = layers[0]
        y_NO = _LowRankLinear.apply(rows_NI, weight_OI, bias_O, down_RI.to(x.dtype), up_OR.to(x.dtype), scale)
        return (y_NO.view(*x.shape[:-1], y_NO.shape[-1]),)
    tensors: list[Tensor | None] = []
    for layer in layers:
        tensors += [layer.weight_OI, layer.bias_O, layer.down_RI.to(x.dtype), layer.up_OR.to(x.dtype)]
    outputs = _LowRankLinears.apply(rows_NI, [layer.scale for layer in layers], *tensors)
    return tuple(y_NO.view(*x.shape[:-1], y_NO.shape[-1]) for y_NO in outputs)


def low_rank_cells(x_BCHW: Tensor, layer: nn.Conv2d, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`low_rank_linears` for a 1 x 1 convolution of which `is_pointwise` is true."""
    change = LowRank(layer.weight.flatten(1), layer.bias, down.flatten(1), up.flatten(1), scale)
    (y_BHWC,) = low_rank_linears(x_BCHW.movedim(1, -1), change)
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
