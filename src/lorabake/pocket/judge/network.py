"""The judge's network: a small convolutional trunk with one linear head per question.

Shapes: B pictures, C channels, H height, W width. Pictures are 64 x 64 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lorabake.base.errors import UserError

PICTURE = 64
EARLY_CHANNELS = 64
_EARLY = ((12, 40, 1), (40, 64, 2), (64, EARLY_CHANNELS, 1))
_LATE = ((EARLY_CHANNELS, 128, 2), (128, 128, 1), (128, 128, 1))
"""(channels in, channels out, stride) of the 3 x 3 convolutions up to and after the 16 x 16 map."""
_GRID = 8
_LOOKS = 3
"""How many places of the picture a question may look at."""


class Convolution(nn.Module):
    """3 x 3 convolution, batch norm, ReLU; with a shortcut where the shape stays the same."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self._shortcut = channels_in == channels_out and stride == 1

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """[B, channels in, H, W] to [B, channels out, H / stride, W / stride]."""
        answer_BCHW = self.norm(self.convolution(maps_BCHW)).relu()
        return maps_BCHW + answer_BCHW if self._shortcut else answer_BCHW


def _convolutions(plan: Sequence[tuple[int, int, int]]) -> nn.Sequential:
    return nn.Sequential(*(Convolution(*row) for row in plan))


class LookingHead(nn.Module):
    """Answers questions about a map: each looks at a few places it chooses (softmax attention) and reads them.

    The same eyes or mouth are thus recognised wherever they are and however near the camera is.
    """

    def __init__(self, channels: int, choices: Sequence[int], grid: int) -> None:
        """Questions with `choices` answers each, about maps of `channels` x `grid` x `grid`."""
        super().__init__()
        self.choices = list(choices)
        self.look = nn.Conv2d(channels, len(choices) * _LOOKS, 1)
        self.place = nn.Parameter(torch.zeros(len(choices) * _LOOKS, grid * grid))
        self.read = nn.ModuleList(nn.Linear(channels * _LOOKS, count) for count in choices)

    def forward(self, maps_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits per question: a tuple of [B, answers]."""
        places_BLN = (self.look(maps_BCHW).flatten(2) + self.place).softmax(-1)
        seen_BLC = places_BLN @ maps_BCHW.flatten(2).transpose(1, 2)
        each = seen_BLC.split(_LOOKS, dim=1)
        return tuple(read(part.flatten(1)) for read, part in zip(self.read, each, strict=True))


class AttributeNet(nn.Module):
    """Answers every axis at once: pictures [B, 3, 64, 64] in -1..1 to one row of logits per axis."""

    def __init__(self, choices: Sequence[int]) -> None:
        """A network for axes with `choices` values each."""
        super().__init__()
        self.early = nn.Sequential(nn.PixelUnshuffle(2), *_convolutions(_EARLY))
        self.late = _convolutions(_LATE)
        self.head = LookingHead(128, choices, _GRID)

    def forward(self, pictures_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits per axis: a tuple of [B, values of the axis]."""
        return self.head(self.late(self.early(pictures_BCHW)))


class FeatureNet(nn.Module):
    """Yes-or-no answers about invented features, on top of a frozen copy of an `AttributeNet`'s early layers."""

    def __init__(self, features: int) -> None:
        """A network for `features` questions."""
        super().__init__()
        self.early = nn.Sequential(nn.PixelUnshuffle(2), *_convolutions(_EARLY)).requires_grad_(False)
        self.late = _convolutions(((EARLY_CHANNELS, 64, 2), (64, 64, 1)))
        self.head = LookingHead(64, [1] * features, _GRID)

    def train(self, mode: bool = True) -> FeatureNet:
        """Switch between training and answering; the early layers always answer."""
        super().train(mode)
        self.early.eval()
        return self

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] in -1..1 to one logit per feature: [B, features]."""
        return torch.cat(self.head(self.late(self.early(pictures_BCHW))), dim=-1)


def to_input(pictures_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """Pictures uint8 [B, 64, 64, 3] as network input, float32 [B, 3, 64, 64] in -1..1.

    Larger pictures are averaged down if their side is a multiple of 64.

    Raises:
        UserError: other shapes or types.
    """
    pictures = np.asarray(pictures_BHWC)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise UserError(f"The judge looks at uint8 [N, H, W, 3] pictures, not {pictures.dtype} {list(pictures.shape)}.")
    height, width = pictures.shape[1:3]
    if height != width or height % PICTURE:
        raise UserError(
            f"The judge looks at square pictures of a multiple of {PICTURE} pixels, not {width} x {height}."
        )
    pictures_BCHW = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    if height != PICTURE:
        pictures_BCHW = nn.functional.avg_pool2d(pictures_BCHW, height // PICTURE)
    return pictures_BCHW / 127.5 - 1
