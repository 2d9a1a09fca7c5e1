"""Pieces that diffusion transformers share (Peebles and Xie 2022, arXiv:2212.09748; Esser et al. 2024, arXiv:2403.03206).

Shapes: B batch, L tokens, C channels, H heads, D channels per head, P pairs of channels that are turned (D / 2), A axes of a
position. Module names are those of Black Forest Labs' files, after which kohya-format LoRA files name their layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabake.families.networks.attention import attend

NORM_EPS = 1e-6


class Turns(NamedTuple):
    """Cosine and sine of the angle that each token's pairs of channels are turned by, LP, float32."""

    cos_LP: Tensor
    sin_LP: Tensor


class QKV(NamedTuple):
    """Queries, keys and values, BLHD."""

    q: Tensor
    k: Tensor
    v: Tensor


class VectorEmbedder(nn.Module):
    """Two linear layers that bring one vector per sample (the sinusoids of a time, a pooled text) to the network's width."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_channels, channels)
        self.out_layer = nn.Linear(channels, channels)

    def forward(self, vector_BV: Tensor) -> Tensor:
        """BV -> BC."""
        return self.out_layer(F.silu(self.in_layer(vector_BV)))


class Modulation(nn.Module):
    """What the time and the pooled text make of every channel: ``count`` vectors (shifts, scales, gates) per sample."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(channels, count * channels)

    def forward(self, told_BC: Tensor) -> tuple[Tensor, ...]:
        """``count`` tensors B1C. ``told_BC`` has been through SiLU already: once for all blocks."""
        return self.lin(told_BC)[:, None].chunk(self.count, dim=-1)


class QKNorm(nn.Module):
    """Queries and keys brought to one length per head, so that scores stay in range (Henry et al. 2020, arXiv:2010.04245)."""

    def __init__(self, head_channels: int) -> None:
        super().__init__()
        self.query_norm = nn.RMSNorm(head_channels, NORM_EPS)
        self.key_norm = nn.RMSNorm(head_channels, NORM_EPS)

    def forward(self, qkv_BLC: Tensor, heads: int) -> QKV:
        """Queries, keys and values out of the channels of one product, ordered by kind, then head."""
        q, k, v = qkv_BLC.unflatten(-1, (3, heads, -1)).unbind(2)
        return QKV(self.query_norm(q), self.key_norm(k), v)


class StreamAttention(nn.Module):
    """One stream's share in a joint attention: its queries, keys and values, and the projection of what it reads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm = QKNorm(channels // heads)
        self.proj = nn.Linear(channels, channels)

    def queries(self, x_BLC: Tensor) -> QKV:
        """Normed queries and keys, and values."""
        return self.norm(self.qkv(x_BLC), self.heads)


def rotary_turns(positions_LA: Tensor, widths: Sequence[int], theta: float = 10000.0) -> Turns:
    """Angles of rotary position embedding (Su et al. 2021, arXiv:2104.09864) with some channels of each head for every axis.

    Args:
        positions_LA: each token's position on every axis.
        widths: channels per head for each axis, even; their sum is D.
        theta: the slowest pair turns by nearly 1/theta per position, the fastest by 1.
    """
    angles = [
        positions_LA[:, axis, None].double()
        * theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions_LA.device) / width)
        for axis, width in enumerate(widths)
    ]
    angles_LP = torch.cat(angles, dim=-1)
    return Turns(angles_LP.cos().float(), angles_LP.sin().float())


def turned(x_BLHD: Tensor, turns: Turns) -> Tensor:
    """Each pair of neighbouring channels turned by its token's angle; computed in float32."""
    even, odd = x_BLHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.cos_LP[:, None], turns.sin_LP[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_BLHD.dtype)


def rotary_attention(qkv: QKV, turns: Turns) -> Tensor:
    """Attention of all tokens to all tokens, positions told by turning queries and keys; BLC."""
    q, k = turned(qkv.q, turns).flatten(2), turned(qkv.k, turns).flatten(2)
    return attend(q, k, qkv.v.flatten(2), qkv.q.shape[2])


def modulated_norm(x_BLC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """norm(x)·(1 + scale) + shift, the norm without weights of its own."""
    return torch.addcmul(shift_B1C, F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=NORM_EPS), 1 + scale_B1C)


def patches(latents_BCHW: Tensor, side: int = 2) -> Tensor:
    """Squares of ``side`` × ``side`` latent cells as tokens, row by row: BL(C·side·side), a channel's cells together."""
    return F.pixel_unshuffle(latents_BCHW, side).flatten(2).transpose(1, 2)


def unpatched(tokens_BLC: Tensor, height: int, width: int, side: int = 2) -> Tensor:
    """The inverse of :func:`patches`, for latents of ``height`` × ``width`` cells."""
    map_BCHW = tokens_BLC.transpose(1, 2).unflatten(2, (height // side, width // side))
    return F.pixel_shuffle(map_BCHW, side)


def recomputing(share: float, blocks: int) -> Callable[[int], bool]:
    """Whether the block of each index is recomputed where a share of them is: the first ones, whose turn in the backward pass comes last,
    when the others' activations are gone. None where no gradient is wanted."""
    count = math.ceil(share * blocks) if torch.is_grad_enabled() else 0
    return lambda index: index < count


def recomputed(block: Callable[..., Any], *arguments: Any) -> Any:
    """A block's output; what it computes on the way is not kept, but computed again in the backward pass."""
    return checkpoint(block, *arguments, use_reentrant=False)
