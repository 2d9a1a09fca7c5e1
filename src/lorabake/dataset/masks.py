"""Masks: how much each place of a picture counts in the loss. White counts, black does not, greys count in between.

A mask goes the way of its picture: the same resize, the same crop. Then it is averaged over the latent's cells, because that is
where the loss is. It is never sharpened on the way, so that nothing outside of it begins to count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from lorabake.base.cards import Settings
from lorabake.base.errors import Problem
from lorabake.base.machine import cores
from lorabake.dataset.buckets import Placement
from lorabake.dataset.folder import Sample
from lorabake.dataset.image import UnreadableImage, read_mask, read_opacity
from lorabake.dataset.scan import named

Mask = NDArray[np.float32]
"""``mask_HW``, 0 to 1, in latent cells."""

_ENOUGH = 1e-3
"""Share of the picture's area: a mask with less in it is taken for black, and one with less white in it for grey."""
_WHITE = 0.9
"""A cell at least so bright is white."""
_SHAPE = 2.0
"""Pixels of the picture by which a mask's shape may differ: masks are made at other sizes, and sides are rounded."""


class MaskConfig(Settings):
    """Which places of the pictures are trained."""

    source: Literal["none", "files", "alpha"] = "none"
    """Where masks are from: "files" (001-masklabel.png beside 001.png, or 001.png in a folder masks), "alpha" (the pictures' own transparency), or
    "none", which trains all of every picture. White is trained, black is not, grey counts less. Pictures without a mask count whole.
    Masks are cropped and mirrored as their pictures are; of a random crop that holds black alone nothing is trained."""

    unmasked_weight: float = Field(default=0.0, ge=0, lt=1)
    """How much the black of a mask counts, against 1 for white. Default 0: black is left out, as its maker meant. 0.1 keeps backgrounds
    steadier where subjects fill the picture; around a subject of a twentieth of it, 0.1 would make the background two thirds of the loss."""

    unmasked_probability: float = Field(default=0.0, ge=0, lt=1)
    """Chance, per picture and step, that the mask is left aside and the whole picture counts. Default 0; 0.1 lets the subject be learnt as
    a part of its surroundings, which then are learnt a little too."""

    normalise: Literal["area", "none"] = "area"
    """"area" takes the mean over what the mask shows, so that a small subject is learnt as fast as a large one; "none" takes it over the
    whole picture, as kohya's scripts do, so that a subject of a twentieth of it has a twentieth of the gradient."""


def idle_settings(config: MaskConfig) -> tuple[str, ...]:
    """Settings that were given and do nothing, each with the reason."""
    if config.source != "none":
        return ()
    return tuple(
        f"{name} = {value} does nothing: data.masks.source is 'none'." for name, value in config.changed().items()
    )


@dataclass(frozen=True, slots=True)
class Masks:
    """What was found of the masks of some pictures."""

    of_samples: tuple[Mask | None, ...]
    """As they are in their bucket; None counts whole. Empty where masks are not asked for."""
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def read_masks(
    samples: Sequence[Sample], placements: Sequence[Placement], config: MaskConfig, cell: int, where: str = "pictures"
) -> Masks:
    """Read every mask and look at it.

    A mask that cannot be read or has another shape than its picture is a problem. One that is black or has no white in it is told and left
    aside: its picture counts whole.

    Args:
        samples: the pictures, each once for every size that it is seen at.
        placements: bucket and crop of each.
        config: which masks are asked for.
        cell: pixels of a latent cell along a side.
        where: what messages call the pictures.
    """
    if config.source == "none":
        return Masks((), notes=tuple(_unused(samples, where)))

    def look(pair: tuple[Sample, Placement]) -> Mask | Problem | str | None:
        sample, place = pair
        try:
            image = _read(sample, config)
        except UnreadableImage as error:
            return Problem(sample.name, f"its mask cannot be used: {error.reason}. Make it anew, or take it out.")
        if image is None:
            return None
        if _other_shape(image.size, sample.size):
            given, expected = ("x".join(map(str, size)) for size in (image.size, sample.size))
            return Problem(sample.name, f"its mask is {given}, the picture {expected}. Make the mask anew for it.")
        mask_HW = latent_mask(image, place, cell)
        return _flaw(mask_HW) or mask_HW

    with ThreadPoolExecutor(max_workers=min(8, cores())) as pool:
        found = list(pool.map(look, zip(samples, placements, strict=True)))
    problems = tuple(dict.fromkeys(item for item in found if isinstance(item, Problem)))
    masks = tuple(item if isinstance(item, np.ndarray) else None for item in found)
    flawed = [(sample.name, item) for sample, item in zip(samples, found, strict=True) if isinstance(item, str)]
    return Masks(masks, problems, tuple(_notes(samples, masks, flawed, where)) if not problems else ())


def latent_mask(mask: Image.Image, place: Placement, cell: int) -> Mask:
    """``mask`` (mode "L") resized and cropped as its picture is, then averaged over cells of ``cell`` × ``cell`` pixels."""
    width, height = place.resized_wh
    if mask.size != place.resized_wh:
        shrinks = mask.width >= width and mask.height >= height  # neither filter goes beyond what it reads
        mask = mask.resize(place.resized_wh, Image.Resampling.HAMMING if shrinks else Image.Resampling.BILINEAR)
    pixels_HW = np.asarray(mask.crop(place.crop_ltrb), dtype=np.int64)
    rows, columns = pixels_HW.shape[0] // cell, pixels_HW.shape[1] // cell
    sums_HW = pixels_HW.reshape(rows, cell, columns, cell).sum((1, 3))
    return (sums_HW / (255 * cell * cell)).astype(np.float32)


def mask_of(sample: Sample, place: Placement, config: MaskConfig, cell: int) -> Mask | None:
    """The mask of one picture for one way to crop it, read now; None if it has none by now.

    Raises:
        UnreadableImage: it cannot be read.
    """
    image = _read(sample, config)
    return None if image is None else latent_mask(image, place, cell)


def _read(sample: Sample, config: MaskConfig) -> Image.Image | None:
    return _from_file(sample) if config.source == "files" else _from_alpha(sample)


def _from_file(sample: Sample) -> Image.Image | None:
    return read_mask(sample.mask) if sample.mask else None


def _from_alpha(sample: Sample) -> Image.Image | None:
    alpha = read_opacity(sample.path)
    return None if alpha is None or alpha.getextrema() == (255, 255) else alpha


def _other_shape(mask: tuple[int, int], picture: tuple[int, int]) -> bool:
    """Whether a mask of this size cannot be this picture's: the long side of one, at the scale of the other, is off."""
    scale = max(picture) / max(mask)
    return any(abs(side * scale - own) > max(_SHAPE, _SHAPE * scale) for side, own in zip(mask, picture, strict=True))


def shows_something(mask_HW: Mask) -> bool:
    """Whether a mask is more than black."""
    return float(mask_HW.mean()) >= _ENOUGH


def _flaw(mask_HW: Mask) -> str | None:
    """What makes a mask useless, if anything."""
    if not shows_something(mask_HW):
        return "black where the picture is trained"
    if float((mask_HW >= _WHITE).mean()) < _ENOUGH:
        return "grey all over, with nothing white in it"
    return None


def _unused(samples: Sequence[Sample], where: str) -> Iterator[str]:
    count = len({sample.name for sample in samples if sample.mask is not None})
    if count:
        which = "has a mask, which is" if count == 1 else "have masks, which are"
        yield f'data.masks: {count} of the {where} {which} not used. For masked training: source = "files".'


def _notes(
    samples: Sequence[Sample], masks: Sequence[Mask | None], flawed: Sequence[tuple[str, str]], where: str
) -> Iterator[str]:
    every, bad = {sample.name for sample in samples}, {name for name, _ in flawed}
    for reason in dict.fromkeys(reason for _, reason in flawed):
        names = list(dict.fromkeys(name for name, said in flawed if said == reason))
        yield f"data.masks: {len(names)} of {len(every)} {where} have a mask that is {reason}. It is left aside, and they count whole: {named(names)}."
    without = [sample.name for sample, mask in zip(samples, masks, strict=True) if mask is None]
    whole = [name for name in dict.fromkeys(without) if name not in bad]
    if 0 < len(whole) < len(every):
        yield f"data.masks: {len(whole)} of {len(every)} {where} have no mask and count whole: {named(whole)}."
