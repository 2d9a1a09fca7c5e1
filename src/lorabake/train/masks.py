"""Masked loss: which places of a latent count in its loss, and how much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorabake.base.streams import random_stream
from lorabake.dataset.masks import Mask, MaskConfig
from lorabake.train.asked import Asked
from lorabake.train.capture import Inputs


class MaskInputs:
    """Gives a batch ``mask_B1HW``: what its errors are multiplied by before their mean over the whole latent is taken.

    Normalisation is in it: divided by its own mean, a mask makes of the mean over the latent the mean over what it shows.

    Args:
        masks: ``mask_HW`` of each sample; None counts whole.
        mirrored: whether each view of each sample is mirrored.
        cells: height and width of each sample's latents.
        config: what black counts, and how the mean is taken.
        seed: the run's.
        outside: weight of the base's own answer where the mask is black; 0 asks for none.
    """

    def __init__(
        self,
        masks: Sequence[Mask | None],
        mirrored: Sequence[Sequence[bool]],
        cells: Sequence[Sequence[int]],
        config: MaskConfig,
        seed: int,
        outside: float = 0.0,
    ) -> None:
        self._whole = [torch.ones(1, *of_sample) for of_sample in cells]
        self._inside = [
            [whole if mask is None else weights(mask, config, mirrored=flip) for flip in flips]
            for mask, whole, flips in zip(masks, self._whole, mirrored, strict=True)
        ]
        self._outside = [
            [0 * whole if mask is None else outside * outside_weights(mask, config, mirrored=flip) for flip in flips]
            for mask, whole, flips in zip(masks, self._whole, mirrored, strict=True)
        ] if outside else None  # fmt: skip
        self._chance, self._seed = config.unmasked_probability, seed

    def __call__(self, asked: Asked) -> Inputs:
        """The masks of a batch's rows."""
        whole = [self._counts_whole(asked, slot) for slot in range(len(asked.views))]
        rows = list(zip(asked.views, whole, strict=True))
        inside = [self._whole[index] if all_ else self._inside[index][view] for (index, view), all_ in rows]
        inputs = {"mask_B1HW": torch.stack(inside)}
        if self._outside is not None:
            around = [0 * self._whole[index] if all_ else self._outside[index][view] for (index, view), all_ in rows]
            inputs["outside_B1HW"] = torch.stack(around)
        return inputs

    def _counts_whole(self, asked: Asked, slot: int) -> bool:
        """Whether a row's mask is left aside in this step."""
        return (
            self._chance > 0
            and random_stream(self._seed, "masks", asked.step, asked.micro, slot).random() < self._chance
        )


def weights(mask_HW: Mask, config: MaskConfig, *, mirrored: bool) -> Tensor:
    """What errors are multiplied by, ``1HW``. With ``normalise = "area"`` its mean is 1."""
    weights_1HW = torch.from_numpy(mask_HW)[None].clamp(min=config.unmasked_weight)
    if config.normalise == "area":
        weights_1HW = weights_1HW / weights_1HW.mean()
    return weights_1HW.flip(2) if mirrored else weights_1HW


def outside_weights(mask_HW: Mask, config: MaskConfig, *, mirrored: bool) -> Tensor:
    """The same for what the mask leaves, ``1HW``; all 0 where it leaves nothing."""
    rest_1HW = 1 - torch.from_numpy(mask_HW)[None].clamp(min=config.unmasked_weight)
    if config.normalise == "area":
        rest_1HW = rest_1HW / rest_1HW.mean().clamp(min=1e-6)
    return rest_1HW.flip(2) if mirrored else rest_1HW
