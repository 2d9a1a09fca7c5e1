"""The encoder half of T5 1.1 (Raffel et al. 2020, arXiv:1910.10683; gated GELU after Shazeer 2020, arXiv:2002.05202).

Shapes: B batch, L tokens, D channels, H heads. Module paths and state-dict keys are those of the published files: LoRA files
name their layers after them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.dit_config import T5Config


class T5Attention(nn.Module):
    """Self-attention without biases and without scaling; places are told by a number added to each score."""

    def __init__(self, config: T5Config, with_bias: bool) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_channels
        self.q = nn.Linear(config.channels, inner, bias=False)
        self.k = nn.Linear(config.channels, inner, bias=False)
        self.v = nn.Linear(config.channels, inner, bias=False)
        self.o = nn.Linear(inner, config.channels, bias=False)
        self.relative_attention_bias = _embedding(config.buckets, config.heads) if with_bias else None
        """In the first layer alone; all others use what it gives."""

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor) -> Tensor:
        """BLD -> BLD."""
        q, k, v = (layer(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_HLL[None], scale=1.0)
        return self.o(read.transpose(1, 2).flatten(2))


class T5LayerSelfAttention(nn.Module):
    """Attention on a normed copy, added back."""

    def __init__(self, config: T5Config, with_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(config, with_bias)
        self.layer_norm = nn.RMSNorm(config.channels, config.norm_eps)

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor) -> Tensor:
        """BLD -> BLD."""
        return x_BLD + self.SelfAttention(self.layer_norm(x_BLD), bias_HLL)


class T5DenseGatedActDense(nn.Module):
    """GELU of one projection times another, projected back."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.channels, config.width, bias=False)
        self.wi_1 = nn.Linear(config.channels, config.width, bias=False)
        self.wo = nn.Linear(config.width, config.channels, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """BLD -> BLD."""
        return self.wo(F.gelu(self.wi_0(x_BLD), approximate="tanh") * self.wi_1(x_BLD))


class T5LayerFF(nn.Module):
    """The gated MLP on a normed copy, added back."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(config)
        self.layer_norm = nn.RMSNorm(config.channels, config.norm_eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """BLD -> BLD."""
        return x_BLD + self.DenseReluDense(self.layer_norm(x_BLD))


class T5Block(nn.Module):
    """Attention, then MLP."""

    def __init__(self, config: T5Config, with_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5LayerSelfAttention(config, with_bias), T5LayerFF(config)])

    def forward(self, x_BLD: Tensor, bias_HLL: Tensor) -> Tensor:
        """BLD -> BLD."""
        return self.layer[1](self.layer[0](x_BLD, bias_HLL))


class T5Stack(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.block = nn.ModuleList([T5Block(config, with_bias=index == 0) for index in range(config.layers)])
        self.final_layer_norm = nn.RMSNorm(config.channels, config.norm_eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """BLD -> BLD."""
        bias_HLL = self._bias(x_BLD.shape[1], x_BLD.device)
        for block in self.block:
            x_BLD = block(x_BLD, bias_HLL)
        return self.final_layer_norm(x_BLD)

    def _bias(self, length: int, device: torch.device) -> Tensor:
        """What is added to the score of each pair of tokens, by head."""
        places = torch.arange(length, device=device)
        buckets_LL = distance_buckets(places[None] - places[:, None], self.config.buckets, self.config.farthest)
        first = self.block[0].get_submodule("layer.0.SelfAttention.relative_attention_bias")
        return first(buckets_LL).permute(2, 0, 1)


class T5Encoder(nn.Module):
    """Turns token ids into the vectors that a diffusion transformer attends to. Padding is attended to like any other token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = _embedding(config.vocab_size, config.channels)
        self.encoder = T5Stack(config)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """One vector per token, BLD, for rows of any length."""
        return self.encoder(self.shared(ids_BL))


def distance_buckets(distances_LL: Tensor, buckets: int, farthest: int) -> Tensor:
    """Which kind of distance each is: half of the kinds for later tokens, in each half one for every small distance, then ever wider ones.

    Raffel et al. 2020, section 2.1. Distances count from the token that attends to the one attended to.
    """
    half = buckets // 2
    near = half // 2
    away = distances_LL.abs()
    # A distance of 0 is always near, and would have no logarithm.
    share = torch.log(away.clamp(min=1).float() / near) / math.log(farthest / near)
    far = (near + (share * (half - near)).long()).clamp(max=half - 1)
    return torch.where(away < near, away, far) + half * (distances_LL > 0)


def _embedding(count: int, width: int) -> nn.Embedding:
    """An embedding of normal numbers; of none on the meta device, where drawing them would import PyTorch's compiler (1 s)."""
    weight = torch.empty(count, width)
    return nn.Embedding.from_pretrained(weight if weight.is_meta else weight.normal_(), freeze=False)
