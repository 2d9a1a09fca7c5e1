"""The autoencoder between pictures and latents (Rombach et al. 2022, arXiv:2112.10752, section 3.1).

Shapes: B batch, C channels, H and W. Pictures are RGB in [-1, 1]; latents are as the encoder gives them, not yet scaled by
``config.scaling_factor``. Module paths and state-dict keys equal those of diffusers' ``AutoencoderKL``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.attention import attend
from lorabake.families.networks.blocks import Downsample2D, ResnetBlock2D, Upsample2D, to_cells, to_map
from lorabake.families.networks.config import VaeConfig

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class LatentDistribution:
    """The encoder's answer: a normal distribution for every latent number."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw, BCHW. Drawn on the generator's device, so that equal seeds give equal latents anywhere."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean)


class VaeAttention(nn.Module):
    """Single-head self-attention over the cells of a map, with a norm before and a shortcut around."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, _EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """BCHW -> BCHW."""
        cells_BLC = to_cells(self.group_norm(x_BCHW))
        mixed_BLC = self.to_out[0](
            attend(self.to_q(cells_BLC), self.to_k(cells_BLC), self.to_v(cells_BLC), heads=1, exact=True)
        )
        return x_BCHW + to_map(mixed_BLC, x_BCHW)


class _MidBlock(nn.Module):
    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = nn.ModuleList([ResnetBlock2D(channels, channels, groups, _EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([VaeAttention(channels, groups)] if config.mid_block_add_attention else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.resnets[0](x_BCHW)
        for attention in self.attentions:
            x_BCHW = attention(x_BCHW)
        return self.resnets[1](x_BCHW)


class _Level(nn.Module):
    """Residual blocks at one resolution, then the way to the next; only one of the two lists is ever filled."""

    def __init__(self, in_channels: int, out_channels: int, count: int, groups: int) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * count]
        self.resnets = nn.ModuleList([ResnetBlock2D(widths[i], out_channels, groups, _EPS) for i in range(count)])
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x_BCHW = module(x_BCHW)
        return x_BCHW


class Encoder(nn.Module):
    """Picture to the parameters of its latents' distribution."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, channels in enumerate(widths):
            block = _Level(widths[max(level - 1, 0)], channels, config.layers_per_block, groups)
            if level < len(widths) - 1:
                block.downsamplers.append(Downsample2D(channels, pad_after=True))
            self.down_blocks.append(block)
        self.mid_block = _MidBlock(config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """BCHW -> B(2·latent_channels)(H/scale)(W/scale): means, then log-variances."""
        hidden = self.conv_in(images_BCHW)
        for block in self.down_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(hidden))))


class Decoder(nn.Module):
    """Latents to picture."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _MidBlock(config)
        self.up_blocks = nn.ModuleList()
        for level, channels in enumerate(widths):
            block = _Level(widths[max(level - 1, 0)], channels, config.layers_per_block + 1, groups)
            if level < len(widths) - 1:
                block.upsamplers.append(Upsample2D(channels))
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        """BCHW -> B3(H·scale)(W·scale)."""
        hidden = self.mid_block(self.conv_in(latents_BCHW))
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder, with a 1×1 convolution on either side of the latents."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, images_BCHW: Tensor) -> LatentDistribution:
        """The distribution of the latents of pictures in [-1, 1]; not scaled."""
        mean, logvar = self.quant_conv(self.encoder(images_BCHW)).chunk(2, dim=1)
        return LatentDistribution(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """The pictures of unscaled latents, in [-1, 1] give or take the decoder's overshoot."""
        return self.decoder(self.post_quant_conv(latents_BCHW))
