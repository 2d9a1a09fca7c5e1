"""Convolutions of feature maps, as products of matrices where those are faster on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Measured on one AVX2 core, torch 2.13, milliseconds forward + backward to the input, convolution / product of matrices
# (channels in, out, side of the map):
#   one map    640,640,8  18.6 / 14.9     1920,640,8   105 / 44     1280,1280,4  23 / 27     2560,1280,4   276 / 55
#              1280,1280,8 136 / 56       2560,1280,8  279 / 118    320,320,16   11 / 13     1280,1280,16  245 / 180
#   four maps  1280,1280,2   77 / 33      2560,1280,4  363 / 143    2560,1280,8  581 / 380   1920,640,8    138 / 139
# A kernel made for large maps reads the weights again and again where they are many and the map is small.
_MANY_WEIGHTS = 1_200_000 * 9
_FEW_CELLS = 256


class PointwiseConv2d(nn.Conv2d):
    """A 1×1 convolution, computed as a linear layer of the cells where they lie one after another (on a small map in half the time)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """BCHW -> B(out)HW, in the input's memory layout."""
        if input.device.type == "cpu" and input.is_contiguous(memory_format=torch.channels_last):
            return F.linear(input.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        return super().forward(input)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution. With many frozen weights over few cells it is one product: every cell's neighbourhood times the kernel."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding)

    def forward(self, input: Tensor) -> Tensor:
        """BCHW -> B(out)HW, in the input's memory layout."""
        if self._is_better_multiplied(input):
            return _Neighbourhoods.apply(input, self.weight, self.bias, self.stride[0], int(self.padding[0]))
        return super().forward(input)

    def _is_better_multiplied(self, x_BCHW: Tensor) -> bool:
        weight = self.weight
        if weight.numel() < _MANY_WEIGHTS or weight.requires_grad or x_BCHW.device.type != "cpu":
            return False
        cells = x_BCHW.shape[0] * x_BCHW.shape[2] * x_BCHW.shape[3] // self.stride[0] ** 2
        lie_as_rows = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x_BCHW, weight))
        return cells <= _FEW_CELLS and lie_as_rows and x_BCHW.dtype == weight.dtype == torch.float32


class _Neighbourhoods(torch.autograd.Function):
    """The convolution as a product; no gradient of the weight. K = 9 C, the cells of a neighbourhood row by row; h, w are of the output."""

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_OCKK: Tensor, bias_O: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        padded = F.pad(x_BCHW.movedim(1, -1), (0, 0, padding, padding, padding, padding))
        batch, height, width, channels = padded.shape
        h, w = (height - 3) // stride + 1, (width - 3) // stride + 1
        maps, rows, cells, _ = padded.stride()
        around = (batch, h, w, 3, 3, channels)
        near = padded.as_strided(around, (maps, stride * rows, stride * cells, rows, cells, 1))
        weight_OK = weight_OCKK.movedim(1, -1).flatten(1)
        ctx.save_for_backward(weight_OK)
        ctx.around, ctx.padded, ctx.stride, ctx.padding = around, padded.shape, stride, padding
        return F.linear(near.reshape(batch * h * w, -1), weight_OK, bias_O).view(batch, h, w, -1).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BOhw: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight_OK,), stride, edge = ctx.saved_tensors, ctx.stride, ctx.padding
        _, h, w, *_ = ctx.around
        rows_NO = grad_BOhw.movedim(1, -1).reshape(-1, len(weight_OK))
        near = (rows_NO @ weight_OK).view(ctx.around)
        padded = near.new_zeros(ctx.padded)
        for row in range(3):
            for cell in range(3):
                reached = padded[:, row : row + stride * h : stride, cell : cell + stride * w : stride]
                reached += near[:, :, :, row, cell]
        _, height, width, _ = ctx.padded
        inner = padded[:, edge : height - edge, edge : width - edge]
        return inner.movedim(-1, 1), None, None, None, None
