"""Masked loss: which places of a latent count in its loss, and how much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabake.base.streams import random_stream
from lorabake.dataset.masks import Mask, MaskConfig
from lorabake.train.capture import Inputs
from lorabake.train.loop import Asked


class MaskInputs:
    """Gives a batch ``mask_B1HW``: what its errors are multiplied by before their mean over the whole latent is taken.

    Normalisation is in it: divided by its own mean, a mask makes of the mean over the latent the mean over what it shows.

    Args:
        masks: ``mask_HW`` of each sample; None counts whole.
        mirrored: whether each view of each sample is mirrored.
        cells: height and width of each sample's latents.
        config: what black counts, and how the mean is taken.
        seed: the run's.
    """

    def __init__(
        self,
        masks: Sequence[Mask | None],
        mirrored: Sequence[Sequence[bool]],
        cells: Sequence[Sequence[int]],
        config: MaskConfig,
        seed: int,
    ) -> None:
        self._whole = [torch.ones(1, *of_sample) for of_sample in cells]
        self._weights = [
            [whole if mask is None else weights(mask, config, mirrored=flip) for flip in flips]
            for mask, whole, flips in zip(masks, self._whole, mirrored, strict=True)
        ]
        self._chance, self._seed = config.unmasked_probability, seed

    def __call__(self, asked: Asked) -> Inputs:
        """The masks of a batch's rows."""
        rows = [self._of(index, view, asked, slot) for slot, (index, view) in enumerate(asked.views)]
        return {"mask_B1HW": torch.stack(rows)}

    def _of(self, index: int, view: int, asked: Asked, slot: int) -> Tensor:
        if self._chance and random_stream(self._seed, "masks", asked.step, asked.micro, slot).random() < self._chance:
            return self._whole[index]
        return self._weights[index][view]


def weights(mask_HW: Mask, config: MaskConfig, *, mirrored: bool) -> Tensor:
    """What errors are multiplied by, ``1HW``. With ``normalise = "area"`` its mean is 1."""
    weights_1HW = torch.from_numpy(mask_HW)[None].clamp(min=config.unmasked_weight)
    if config.normalise == "area":
        weights_1HW = weights_1HW / weights_1HW.mean()
    return weights_1HW.flip(2) if mirrored else weights_1HW
