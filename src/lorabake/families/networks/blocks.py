"""Convolutional pieces that the U-Net and the autoencoder share. Names and keys are those of diffusers' files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.convolutions import Conv3x3, PointwiseConv2d


class ResnetBlock2D(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))), after He et al. 2015 (arXiv:1512.03385), pre-activated.

    Args:
        time_channels: width of the time embedding, or None for a block that has no time (the autoencoder's).
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, eps: float, time_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = PointwiseConv2d(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, time_BE: Tensor | None = None) -> Tensor:
        """Same height and width, ``out_channels`` channels. ``time_BE`` has been through SiLU already: once for all blocks."""
        hidden = self.conv1(F.silu(self.norm1(x_BCHW)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(time_BE)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class Downsample2D(nn.Module):
    """Halves height and width by a strided convolution (rounding up, or down where it pads on one side only)."""

    def __init__(self, channels: int, pad_after: bool = False) -> None:
        super().__init__()
        self.pad_after = pad_after
        """Pad below and to the right only, as the autoencoder was trained with."""
        self.conv = Conv3x3(channels, channels, stride=2, padding=0 if pad_after else 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """BCHW -> BC(H/2)(W/2)."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)) if self.pad_after else x_BCHW)


class Upsample2D(nn.Module):
    """Repeats each cell, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x_BCHW: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """To ``size`` (height, width), or twice the input's."""
        height, width = size or (2 * x_BCHW.shape[2], 2 * x_BCHW.shape[3])
        return self.conv(F.interpolate(x_BCHW, size=(height, width), mode="nearest"))


def to_cells(x_BCHW: Tensor) -> Tensor:
    """A map as a row of its cells, BCHW -> B(H·W)C in memory order: a view of a channels-last map, a copy of a plain one."""
    return x_BCHW.flatten(2).transpose(1, 2).contiguous()


def to_map(cells_BLC: Tensor, like_BCHW: Tensor) -> Tensor:
    """Cells as a map again, with the height, width and memory layout of ``like_BCHW``: what follows keeps its layout."""
    map_BCHW = cells_BLC.transpose(1, 2).unflatten(2, like_BCHW.shape[2:])
    if like_BCHW.is_contiguous(memory_format=torch.channels_last):
        return map_BCHW
    return map_BCHW.contiguous()
