"""Flux.1's denoiser (Black Forest Labs 2024): two streams, text and picture, that attend jointly, then one stream of both.

Shapes: B batch, L tokens of the picture, M of the text, C channels, D channels of the text encoder, P of the pooled text.
Module paths and state-dict keys are those of Black Forest Labs' own files, after which LoRA files name their layers, but for
the norms' weights (``scale`` there). Queries, keys and values are one product here, and three layers in diffusers' folders:
:mod:`flux_layout` tells how the two belong together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.dit import (
    QKV,
    Modulation,
    QKNorm,
    StreamAttention,
    Turns,
    VectorEmbedder,
    modulated_norm,
    patches,
    recomputed,
    recomputing,
    rotary_attention,
    rotary_turns,
    unpatched,
)
from lorabake.families.networks.dit_config import FluxConfig
from lorabake.families.networks.unet import timestep_sinusoids

_MLP_RATIO = 4
_TIME_CHANNELS = 256
_TIME_SCALE = 1000.0


def _mlp(channels: int) -> nn.Sequential:
    width = _MLP_RATIO * channels
    return nn.Sequential(nn.Linear(channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, channels))


class DoubleStreamBlock(nn.Module):
    """Picture and text with weights of their own; each token attends to those of both."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.img_mod = Modulation(channels, 6)
        self.img_attn = StreamAttention(channels, heads)
        self.img_mlp = _mlp(channels)
        self.txt_mod = Modulation(channels, 6)
        self.txt_attn = StreamAttention(channels, heads)
        self.txt_mlp = _mlp(channels)

    def forward(self, img_BLC: Tensor, txt_BMC: Tensor, told_BC: Tensor, turns: Turns) -> tuple[Tensor, Tensor]:
        """Both streams, changed. ``turns`` holds the text's tokens first."""
        img_shift, img_scale, img_gate, *img_mlp = self.img_mod(told_BC)
        txt_shift, txt_scale, txt_gate, *txt_mlp = self.txt_mod(told_BC)
        of_img = self.img_attn.queries(modulated_norm(img_BLC, img_shift, img_scale))
        of_txt = self.txt_attn.queries(modulated_norm(txt_BMC, txt_shift, txt_scale))
        joint = QKV(*(torch.cat(pair, dim=1) for pair in zip(of_txt, of_img, strict=True)))
        read_txt, read_img = rotary_attention(joint, turns).split([txt_BMC.shape[1], img_BLC.shape[1]], dim=1)
        img_BLC = torch.addcmul(img_BLC, img_gate, self.img_attn.proj(read_img))
        txt_BMC = torch.addcmul(txt_BMC, txt_gate, self.txt_attn.proj(read_txt))
        return _after_mlp(self.img_mlp, img_BLC, *img_mlp), _after_mlp(self.txt_mlp, txt_BMC, *txt_mlp)


def _after_mlp(mlp: nn.Module, x_BLC: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x_BLC, gate, mlp(modulated_norm(x_BLC, shift, scale)))


class SingleStreamBlock(nn.Module):
    """One stream of text and picture; attention and MLP side by side, so that their products are two large ones."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.channels, self.heads = channels, heads
        self.linear1 = nn.Linear(channels, (3 + _MLP_RATIO) * channels)
        self.linear2 = nn.Linear((1 + _MLP_RATIO) * channels, channels)
        self.norm = QKNorm(channels // heads)
        self.modulation = Modulation(channels, 3)

    def forward(self, x_BLC: Tensor, told_BC: Tensor, turns: Turns) -> Tensor:
        """BLC -> BLC, the text's tokens first."""
        shift, scale, gate = self.modulation(told_BC)
        both = self.linear1(modulated_norm(x_BLC, shift, scale))
        qkv_BLC, width_BLW = both.split([3 * self.channels, _MLP_RATIO * self.channels], dim=-1)
        read_BLC = rotary_attention(self.norm(qkv_BLC, self.heads), turns)
        mixed = self.linear2(torch.cat([read_BLC, F.gelu(width_BLW, approximate="tanh")], dim=-1))
        return torch.addcmul(x_BLC, gate, mixed)


class FinalLayer(nn.Module):
    """Tokens to the channels of their latent cells."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x_BLC: Tensor, told_BC: Tensor) -> Tensor:
        """BLC -> BL(out). ``told_BC`` has been through SiLU already, so the first of ``adaLN_modulation`` is not run."""
        shift, scale = self.adaLN_modulation[1](told_BC)[:, None].chunk(2, dim=-1)
        return self.linear(modulated_norm(x_BLC, shift, scale))


class FluxTransformer(nn.Module):
    """Predicts the direction from picture to noise. Set ``gradient_checkpointing`` to the share of blocks, 0 to 1, that are recomputed in the backward pass."""

    gradient_checkpointing: float = 0.0

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        channels, heads = config.channels, config.heads
        self.img_in = nn.Linear(config.token_channels, channels)
        self.time_in = VectorEmbedder(_TIME_CHANNELS, channels)
        self.vector_in = VectorEmbedder(config.pooled_channels, channels)
        self.guidance_in = VectorEmbedder(_TIME_CHANNELS, channels) if config.guidance else None
        self.txt_in = nn.Linear(config.text_channels, channels)
        self.double_blocks = nn.ModuleList([DoubleStreamBlock(channels, heads) for _ in range(config.double_blocks)])
        self.single_blocks = nn.ModuleList([SingleStreamBlock(channels, heads) for _ in range(config.single_blocks)])
        self.final_layer = FinalLayer(channels, config.token_channels)

    def blocks(self) -> list[list[nn.Module]]:
        """What is recomputed as one, in the order of their turns."""
        return [[block] for block in (*self.double_blocks, *self.single_blocks)]

    def forward(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BMD: Tensor,
        pooled_BP: Tensor,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """The prediction for each latent, BCHW.

        Args:
            latents_BCHW: noisy latents in the weights' type; even height and width.
            timesteps_B: 1000 × the share of noise, 0 (clean) to 1000 (noise), whole or not.
            text_BMD: the T5 encoder's output.
            pooled_BP: CLIP's pooled text.
            guidance_B: the guidance scale; needed if the network is told one, else not looked at.
        """
        height, width = latents_BCHW.shape[2:]
        told_BC = F.silu(self._told(timesteps_B, pooled_BP, guidance_B))
        turns = rotary_turns(
            _positions(text_BMD.shape[1], height // 2, width // 2, latents_BCHW.device), self.config.axes
        )
        img, txt = self.img_in(patches(latents_BCHW)), self.txt_in(text_BMD)
        double = len(self.double_blocks)
        again = recomputing(self.gradient_checkpointing, double + len(self.single_blocks))
        for index, block in enumerate(self.double_blocks):
            img, txt = recomputed(block, img, txt, told_BC, turns) if again(index) else block(img, txt, told_BC, turns)
        joint = torch.cat([txt, img], dim=1)
        for index, block in enumerate(self.single_blocks, double):
            joint = recomputed(block, joint, told_BC, turns) if again(index) else block(joint, told_BC, turns)
        return unpatched(self.final_layer(joint[:, txt.shape[1] :], told_BC), height, width)

    def _told(self, timesteps_B: Tensor, pooled_BP: Tensor, guidance_B: Tensor | None) -> Tensor:
        """What every block is told, BC: time, guidance and pooled text."""
        told_BC = self.time_in(timestep_sinusoids(timesteps_B, _TIME_CHANNELS).to(pooled_BP.dtype))
        if self.guidance_in is not None:
            if guidance_B is None:
                raise ValueError("This network is told a guidance scale, and none was given.")
            sinusoids = timestep_sinusoids(_TIME_SCALE * guidance_B.float(), _TIME_CHANNELS)
            told_BC = told_BC + self.guidance_in(sinusoids.to(pooled_BP.dtype))
        return told_BC + self.vector_in(pooled_BP)


def _positions(text_tokens: int, height: int, width: int, device: torch.device) -> Tensor:
    """Where each token is, LA: the text's at the origin, then the picture's at (0, y, x), row by row."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    places = torch.stack([torch.zeros_like(y), y, x], dim=-1).flatten(0, 1)
    return torch.cat([places.new_zeros(text_tokens, 3), places])
