"""The denoiser of SD1.x and SD2.x (Rombach et al. 2022, arXiv:2112.10752; Ronneberger et al. 2015, arXiv:1505.04597).

SDXL's differs in its sizes, and in what it is told of the whole text and of the picture's framing (Podell et al. 2023,
arXiv:2307.01952, section 2.2).

Shapes: B batch, C channels, H and W of the latents, E time embedding, M text tokens, D text channels, P pooled text.
Module paths and state-dict keys equal those of diffusers' ``UNet2DConditionModel``: they are the key table of LoRA files.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorabake.families.networks.blocks import Downsample2D, ResnetBlock2D, Upsample2D
from lorabake.families.networks.config import UNetConfig
from lorabake.families.networks.transformer import Transformer2DModel


class TimestepEmbedding(nn.Module):
    """Two linear layers from the sinusoids of a timestep to the embedding every residual block reads."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, sinusoids_BS: Tensor) -> Tensor:
        """BS -> BE."""
        return self.linear_2(F.silu(self.linear_1(sinusoids_BS)))


class UNetBlock(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer where ``attentions`` is not empty.

    Of its first ``gradient_checkpointing`` pairs only what passes between them is kept, and the rest recomputed in the backward pass.
    """

    resnets: nn.ModuleList
    attentions: nn.ModuleList
    gradient_checkpointing: int = 0

    def pairs(self) -> list[list[nn.Module]]:
        """Each residual block with its transformer, if it has one, in the order of their turns."""
        return [[resnet, *self.attentions[index : index + 1]] for index, resnet in enumerate(self.resnets)]

    def step(
        self, index: int, x_BCHW: Tensor, time_BE: Tensor, text_BMD: Tensor, kept_BKHW: Tensor | None = None
    ) -> Tensor:
        """The residual block ``index``, over ``kept`` channels too if given, and its transformer."""
        if index < self.gradient_checkpointing and torch.is_grad_enabled():
            return _recomputed(self._pair, index, x_BCHW, time_BE, text_BMD, kept_BKHW)
        return self._pair(index, x_BCHW, time_BE, text_BMD, kept_BKHW)

    def _pair(self, index: int, x_BCHW: Tensor, time_BE: Tensor, text_BMD: Tensor, kept_BKHW: Tensor | None) -> Tensor:
        if kept_BKHW is not None:
            x_BCHW = torch.cat([x_BCHW, kept_BKHW], dim=1)
        x_BCHW = self.resnets[index](x_BCHW, time_BE)
        return self.attentions[index](x_BCHW, text_BMD) if index < len(self.attentions) else x_BCHW


class DownBlock(UNetBlock):
    """One resolution on the way down; its outputs are kept for the way up."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        incoming = config.block_out_channels[max(level - 1, 0)]
        count = config.layers_per_block[level]
        self.resnets = nn.ModuleList(
            [_resnet(config, incoming if i == 0 else channels, channels, time_channels) for i in range(count)]
        )
        self.attentions = nn.ModuleList(
            [_transformer(config, level) for _ in range(count)] if config.attends_down[level] else []
        )
        last = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample2D(channels)])

    def forward(self, x_BCHW: Tensor, time_BE: Tensor, text_BMD: Tensor) -> list[Tensor]:
        """The map after each residual block, and after the down-sampling: coarser last."""
        kept: list[Tensor] = []
        for index in range(len(self.resnets)):
            x_BCHW = self.step(index, x_BCHW, time_BE, text_BMD)
            kept.append(x_BCHW)
        kept += [downsample(x_BCHW) for downsample in self.downsamplers]
        return kept


class MidBlock(UNetBlock):
    """The coarsest map: residual block, transformer, residual block."""

    def __init__(self, config: UNetConfig, time_channels: int) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList([_resnet(config, channels, channels, time_channels) for _ in range(2)])
        self.attentions = nn.ModuleList([_transformer(config, len(config.block_out_channels) - 1)])

    def forward(self, x_BCHW: Tensor, time_BE: Tensor, text_BMD: Tensor) -> Tensor:
        """BCHW -> BCHW."""
        return self.step(1, self.step(0, x_BCHW, time_BE, text_BMD), time_BE, text_BMD)


class UpBlock(UNetBlock):
    """One resolution on the way up: every residual block reads a kept map beside its input."""

    def __init__(self, config: UNetConfig, level: int, time_channels: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        channels = widths[level]
        incoming = widths[min(level + 1, len(widths) - 1)]
        count = config.layers_per_block[level] + 1
        kept = [channels] * (count - 1) + [widths[max(level - 1, 0)]]
        self.resnets = nn.ModuleList(
            [
                _resnet(config, (incoming if i == 0 else channels) + kept[i], channels, time_channels)
                for i in range(count)
            ]
        )
        self.attentions = nn.ModuleList(
            [_transformer(config, level) for _ in range(count)] if config.attends_up[level] else []
        )
        self.upsamplers = nn.ModuleList([Upsample2D(channels)] if level > 0 else [])

    def forward(self, x_BCHW: Tensor, kept: list[Tensor], time_BE: Tensor, text_BMD: Tensor) -> Tensor:
        """Takes its share of maps off the end of ``kept``; the output has the size of the map then last in it."""
        for index in range(len(self.resnets)):
            x_BCHW = self.step(index, x_BCHW, time_BE, text_BMD, kept.pop())
        for upsample in self.upsamplers:
            x_BCHW = upsample(x_BCHW, (kept[-1].shape[2], kept[-1].shape[3]))
        return x_BCHW


class UNet2DConditionModel(nn.Module):
    """Predicts the noise (or v) in noisy latents, given the timestep and the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_channels = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_channels)
        if config.micro_channels is not None:
            self.add_embedding = TimestepEmbedding(config.micro_channels, time_channels)
        self.down_blocks = nn.ModuleList([DownBlock(config, level, time_channels) for level in range(len(widths))])
        self.mid_block = MidBlock(config, time_channels)
        self.up_blocks = nn.ModuleList(
            [UpBlock(config, level, time_channels) for level in reversed(range(len(widths)))]
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def blocks(self) -> list[list[nn.Module]]:
        """The pairs of residual block and transformer: what is recomputed as one, in the order of their turns."""
        return [pair for block in self._levels() for pair in block.pairs()]

    def _levels(self) -> list[Any]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def checkpoint_gradients(self, share: float) -> None:
        """Keep few activations and recompute the others in the backward pass, in a share of the pairs of residual block and transformer.

        They are the first ones: their turn in the backward pass comes last, when the others' activations are gone.
        """
        left = math.ceil(share * len(self.blocks()))
        for block in self._levels():
            block.gradient_checkpointing = min(left, len(block.resnets))
            left -= block.gradient_checkpointing

    def forward(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BMD: Tensor,
        pooled_BP: Tensor | None = None,
        sizes_BS: Tensor | None = None,
    ) -> Tensor:
        """The prediction for each latent, BCHW.

        Args:
            latents_BCHW: noisy latents in the weights' type; any height and width.
            timesteps_B: training timesteps, 0 (clean) to 999 (noise), whole or not.
            text_BMD: the text encoder's output.
            pooled_BP: the whole text as one vector, for networks with ``config.micro_channels``.
            sizes_BS: the :data:`MICRO_SIZES` numbers of the picture's framing, in pixels, for the same networks.

        Raises:
            ValueError: the network is told of text and sizes and they are not given.
        """
        sinusoids = timestep_sinusoids(timesteps_B, self.config.block_out_channels[0]).to(latents_BCHW.dtype)
        time_BE = self.time_embedding(sinusoids)
        if self.config.micro_channels is not None:
            time_BE = time_BE + self._told(pooled_BP, sizes_BS, latents_BCHW.dtype)
        time_BE = F.silu(time_BE)
        hidden = self.conv_in(latents_BCHW)
        kept = [hidden]
        for block in self.down_blocks:
            kept += block(kept[-1], time_BE, text_BMD)
        hidden = self.mid_block(kept[-1], time_BE, text_BMD)
        for block in self.up_blocks:
            hidden = block(hidden, kept, time_BE, text_BMD)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))

    def _told(self, pooled_BP: Tensor | None, sizes_BS: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Pooled text and the sinusoids of every size, embedded as the time is: BE."""
        if pooled_BP is None or sizes_BS is None:
            raise ValueError("This U-Net is told the pooled text and the picture's sizes: give both.")
        sinusoids_BSC = timestep_sinusoids(sizes_BS.flatten(), self.config.size_channels).view(*sizes_BS.shape, -1)
        return self.add_embedding(torch.cat([pooled_BP.to(dtype), sinusoids_BSC.flatten(1).to(dtype)], dim=1))


def timestep_sinusoids(timesteps_B: Tensor, channels: int) -> Tensor:
    """Cosines then sines of the timestep at ``channels``/2 frequencies from 1 down to 1/10000, float32, B×channels.

    After Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, with the cosines first as SD has them.
    """
    half = channels // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timesteps_B.device) * (-math.log(10000) / half)
    )
    angles = timesteps_B[:, None].float() * frequencies
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(sinusoids, (0, 1)) if channels % 2 else sinusoids


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, time_channels: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels, out_channels, config.norm_num_groups, config.norm_eps, time_channels)


def _transformer(config: UNetConfig, level: int) -> Transformer2DModel:
    return Transformer2DModel(
        config.block_out_channels[level],
        config.heads[level],
        config.transformer_depth[level],
        config.cross_attention_dim,
        config.norm_num_groups,
        linear=config.use_linear_projection,
        exact=config.exact_attention,
    )


def _recomputed(function: Any, *arguments: Any) -> Tensor:
    result = checkpoint(function, *arguments, use_reentrant=False)
    assert isinstance(result, Tensor)
    return result
