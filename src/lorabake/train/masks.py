"""Masked loss: which places of a latent count in its loss, and how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorabake.base.streams import random_stream
from lorabake.dataset.buckets import Placement
from lorabake.dataset.folder import Sample
from lorabake.dataset.masks import Mask, MaskConfig, mask_of, shows_something
from lorabake.recipe.pictures import Pictures
from lorabake.train.asked import Asked
from lorabake.train.capture import Inputs
from lorabake.train.latents import View
from lorabake.train.views import Lazy, each_of


def masks_of(
    pictures: Pictures, views: Sequence[Sequence[View]], config: MaskConfig, cell: int
) -> list[Sequence[Mask | None]]:
    """The mask of each view of each picture, before it is mirrored: read again where views are cropped in other ways, and then at the
    step where they are made afresh.

    Args:
        pictures: with their masks as they are when nothing is random.
        views: of each.
        config: which masks are asked for.
        cell: pixels of a latent cell along a side.
    """

    def of(sample: Sample, place: Placement, mask: Mask | None, own: Sequence[View]) -> Sequence[Mask | None]:
        if mask is None:
            return each_of(own, lambda at: None)
        known: dict[Placement, Mask | None] = {place: mask}

        def cropped(at: int) -> Mask | None:
            placement = own[at].placement
            found = known[placement] if placement in known else mask_of(sample, placement, config, cell)
            if not isinstance(own, Lazy):
                known[placement] = found
            return found

        return each_of(own, cropped)

    masks = pictures.masks or [None] * len(pictures.samples)
    return [of(*each) for each in zip(pictures.samples, pictures.placements, masks, views, strict=True)]


class MaskInputs:
    """Gives a batch ``mask_B1HW``: what its errors are multiplied by before their mean over the whole latent is taken.

    Normalisation is in it: divided by its own mean, a mask makes of the mean over the latent the mean over what it shows.

    Args:
        masks: ``mask_HW`` of each view of each sample as it is before it is mirrored; None counts whole.
        mirrored: whether each view of each sample is mirrored.
        cells: height and width of each sample's latents.
        config: what black counts, and how the mean is taken.
        seed: the run's.
        outside: weight of the base's own answer where the mask is black; 0 asks for none.
    """

    def __init__(
        self,
        masks: Sequence[Sequence[Mask | None]],
        mirrored: Sequence[Sequence[bool]],
        cells: Sequence[Sequence[int]],
        config: MaskConfig,
        seed: int,
        outside: float = 0.0,
    ) -> None:
        def each(make: Callable[[Mask, bool], Tensor], unmasked: Sequence[Tensor]) -> list[Sequence[Tensor]]:
            def of(mask: Mask | None, flip: bool, whole: Tensor) -> Tensor:
                return whole if mask is None else make(mask, flip)

            return [
                each_of(own, lambda at, own=own, flips=flips, whole=whole: of(own[at], flips[at], whole))
                for own, flips, whole in zip(masks, mirrored, unmasked, strict=True)
            ]

        self._whole = [torch.ones(1, *of_sample) for of_sample in cells]
        self._inside = each(lambda mask, flip: weights(mask, config, mirrored=flip), self._whole)
        self._outside = each(
            lambda mask, flip: outside * outside_weights(mask, config, mirrored=flip), [0 * whole for whole in self._whole]
        ) if outside else None  # fmt: skip
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
    """What errors are multiplied by, ``1HW``. With ``normalise = "area"`` its mean is 1, unless a crop left nothing of what it shows: there is
    no mean over that, and the black around it does not take its place."""
    weights_1HW = torch.from_numpy(mask_HW)[None].clamp(min=config.unmasked_weight)
    if config.normalise == "area" and shows_something(mask_HW):
        weights_1HW = weights_1HW / weights_1HW.mean()
    return weights_1HW.flip(2) if mirrored else weights_1HW


def outside_weights(mask_HW: Mask, config: MaskConfig, *, mirrored: bool) -> Tensor:
    """The same for what the mask leaves, ``1HW``; all 0 where it leaves nothing."""
    rest_1HW = 1 - torch.from_numpy(mask_HW)[None].clamp(min=config.unmasked_weight)
    if config.normalise == "area":
        rest_1HW = rest_1HW / rest_1HW.mean().clamp(min=1e-6)
    return rest_1HW.flip(2) if mirrored else rest_1HW
