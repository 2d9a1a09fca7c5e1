"""The U-Net's transformers: self-attention over the cells of a feature map, cross-attention over the text.

Shapes: B batch, L cells (height × width), M text tokens, C channels, D text channels. Names and keys are those of
diffusers' files; every ``nn.Linear`` and ``nn.Conv2d`` is called as a child, so that an adapter may stand in its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.attention import attend
from lorabake.families.networks.blocks import to_cells, to_map
from lorabake.families.networks.convolutions import PointwiseConv2d


class Attention(nn.Module):
    """Multi-head attention of a map's cells over themselves, or over the text when ``context_channels`` is given."""

    def __init__(self, channels: int, heads: int, context_channels: int | None = None, exact: bool = False) -> None:
        super().__init__()
        self.heads, self.exact = heads, exact
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BLC: Tensor, context_BMD: Tensor) -> Tensor:
        """BLC -> BLC."""
        q_BLC, k_BMC, v_BMC = self.to_q(x_BLC), self.to_k(context_BMD), self.to_v(context_BMD)
        return self.to_out[0](attend(q_BLC, k_BMC, v_BMC, self.heads, exact=self.exact))


class GEGLU(nn.Module):
    """Gated GELU: half of the projection times the GELU of the other half (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * width)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """BLC -> BL(width)."""
        gated: Tensor = _Gate.apply(self.proj(x_BLC))
        return gated


class _Gate(torch.autograd.Function):
    """value·GELU(gate) over the two halves of the last axis.

    Keeps only its input. Autograd's own form also keeps GELU(gate), four times the block's width for every cell, and joins
    the two halves of the gradient by one more copy.
    """

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        value, gate = halves.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        (grad,), (halves,) = grad_outputs, ctx.saved_tensors
        value, gate = halves.chunk(2, dim=-1)
        grad_halves = torch.empty_like(halves)
        grad_value, grad_gate = grad_halves.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return grad_halves


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back. ``net.1`` is a dropout of zero in the original."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x_BLC: Tensor) -> Tensor:
        """BLC -> BLC."""
        return self.net[2](self.net[0](x_BLC))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on a normed copy and added back."""

    def __init__(self, channels: int, heads: int, text_channels: int, exact: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads, exact=exact)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, text_channels, exact)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x_BLC: Tensor, text_BMD: Tensor) -> Tensor:
        """BLC -> BLC."""
        normed = self.norm1(x_BLC)
        x_BLC = x_BLC + self.attn1(normed, normed)
        x_BLC = x_BLC + self.attn2(self.norm2(x_BLC), text_BMD)
        return x_BLC + self.ff(self.norm3(x_BLC))


class Transformer2DModel(nn.Module):
    """Transformer blocks over a feature map, with a projection on either side and a shortcut around.

    Args:
        linear: the projections are linear layers on cells (SD2) instead of 1×1 convolutions (SD1).
    """

    def __init__(
        self, channels: int, heads: int, depth: int, text_channels: int, groups: int, *, linear: bool, exact: bool
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else PointwiseConv2d(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, heads, text_channels, exact) for _ in range(depth)]
        )
        self.proj_out = nn.Linear(channels, channels) if linear else PointwiseConv2d(channels, channels)

    def forward(self, x_BCHW: Tensor, text_BMD: Tensor) -> Tensor:
        """BCHW -> BCHW."""
        hidden = self.norm(x_BCHW)
        cells_BLC = self.proj_in(to_cells(hidden)) if self.linear else to_cells(self.proj_in(hidden))
        for block in self.transformer_blocks:
            cells_BLC = block(cells_BLC, text_BMD)
        hidden = to_map(self.proj_out(cells_BLC), x_BCHW) if self.linear else self.proj_out(to_map(cells_BLC, x_BCHW))
        return hidden + x_BCHW
