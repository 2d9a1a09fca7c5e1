"""Low-rank products with a hand-written backward pass.

Plain autograd on ``x @ W.T + s * (x @ A.T) @ B.T`` builds five nodes a layer and keeps more than it needs. One node keeps the input and the thin
product, and adds in place into the frozen base's own product; nothing is computed for the frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
