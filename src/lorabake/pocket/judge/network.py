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
_EARLY = ((12, 40, 1), (40, 64, 2), (64, 64, 1))
_LATE = ((64, 96, 2), (96, 96, 1), (96, 128, 2), (128, 128, 1))
"""(channels in, channels out, stride) of the 3 x 3 convolutions up to and after the 16 x 16 map."""


def _convolutions(plan: Sequence[tuple[int, int, int]]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels_in, channels_out, stride in plan:
        layers += [
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class AttributeNet(nn.Module):
    """Answers every axis at once: pictures [B, 3, 64, 64] in -1..1 to one row of logits per axis."""

    def __init__(self, choices: Sequence[int]) -> None:
        """A network for axes with `choices` values each."""
        super().__init__()
        self.choices = list(choices)
        self.early = nn.Sequential(nn.PixelUnshuffle(2), *_convolutions(_EARLY))
        self.late = _convolutions(_LATE)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(128 * 4 * 4, 256), nn.ReLU())
        self.heads = nn.Linear(256, sum(choices))

    def forward(self, pictures_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Logits per axis: a tuple of [B, values of the axis]."""
        return self.heads(self.hidden(self.late(self.early(pictures_BCHW)))).split(self.choices, -1)


class FeatureNet(nn.Module):
    """Yes-or-no answers about invented features, from the early 16 x 16 map of an `AttributeNet`."""

    def __init__(self, features: int) -> None:
        """A network for `features` questions."""
        super().__init__()
        self.late = _convolutions(((64, 48, 2), (48, 64, 2)))
        self.heads = nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 96), nn.ReLU(), nn.Linear(96, features))

    def forward(self, early_BCHW: Tensor) -> Tensor:
        """One logit per feature: [B, features]."""
        return self.heads(self.late(early_BCHW))


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
