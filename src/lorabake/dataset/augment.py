"""How a picture is looked at when nothing about that is fixed: where it is cropped, and what its colours are.

Look number n of a picture is a function of the picture's bytes and n alone, whatever the run: so looks can be kept, and a run that
continues sees the same ones. Each option draws from a stream of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from lorabake.base.cards import Settings
from lorabake.base.streams import random_stream
from lorabake.dataset.buckets import Placement, Size

_LUMA = np.array([0.299, 0.587, 0.114])
"""How much red, green and blue add to brightness (ITU-R BT.601)."""

Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels of the upright picture."""


class AugmentConfig(Settings):
    """What may differ each time a picture is shown, beside mirroring it."""

    random_crop: bool = False
    """Cut what does not fit into a picture's bucket off at random, and not half on each side. Matters where pictures and buckets
    differ in shape. Default false."""

    face_crop: tuple[float, float] | None = None
    """Crop around a face: the shorter side of the crop is so many face heights at least and at most, [2, 4] for instance. Pictures
    are never enlarged for it, and those in which no face is found are cropped as ever. Needs lorabake[faces]. Absent: no."""

    brightness: float = Field(default=0.0, ge=0, le=0.5)
    """Share. Colours are up to so much brighter or darker. Default 0, unchanged; 0.05 is usual, above 0.2 looks wrong."""

    contrast: float = Field(default=0.0, ge=0, le=0.5)
    """Share. Colours have up to so much more or less contrast. Default 0, unchanged; 0.05 is usual, above 0.2 looks wrong."""

    saturation: float = Field(default=0.0, ge=0, le=0.5)
    """Share. Colours are up to so much stronger or paler. Default 0, unchanged; 0.05 is usual."""

    hue: float = Field(default=0.0, ge=0, le=90)
    """Degrees on the colour wheel that colours turn by at most. Default 0, unchanged; 3 is usual, at 30 red hair is orange or pink."""

    views: Annotated[int, Field(ge=1, le=10_000)] | Literal["fresh"] | None = None
    """How many random looks at each picture are encoded ahead and kept on disk, from which each step draws. "fresh" encodes a new one
    at every step instead: nothing is kept, and steps are slower by the time that reading and encoding pictures takes. Absent: 8."""

    @field_validator("face_crop")
    @classmethod
    def _is_a_range(cls, given: tuple[float, float] | None) -> tuple[float, float] | None:
        if given is not None and not 1 <= given[0] <= given[1] <= 100:
            raise ValueError(f"[{given[0]:g}, {given[1]:g}] is not a range of 1 to 100 face heights, such as [2, 4]")
        return given

    @property
    def tints(self) -> bool:
        """Whether colours change."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def varies(self) -> bool:
        """Whether two looks at a picture may differ."""
        return self.random_crop or self.face_crop is not None or self.tints

    @property
    def fresh(self) -> bool:
        """Whether pictures are encoded at every step, and none is kept."""
        return self.varies and self.views == "fresh"


USUAL_VIEWS = 8
"""Looks at each picture where nobody says how many."""


def idle_settings(config: AugmentConfig, sizes: Sequence[Size], placements: Sequence[Placement]) -> tuple[str, ...]:
    """Settings that were given and do nothing, each with the reason.

    Args:
        config: the settings.
        sizes: of the pictures.
        placements: of the same pictures.
    """
    if not config.varies and config.views is not None:
        given = json.dumps(config.views)
        return (f"views = {given} does nothing: neither random_crop nor face_crop nor a change of colours is on.",)
    if (
        config.random_crop
        and config.face_crop is None
        and all(place.resized_wh == place.bucket_wh for place in placements)
    ):
        return ("random_crop does nothing: every picture fits its bucket as it is, so that nothing is cut off.",)
    if config.face_crop is not None and all(
        max(size) <= max(place.resized_wh) for size, place in zip(sizes, placements, strict=True)
    ):
        told = (
            "no picture is larger than its bucket, so that it can only be moved towards a face and not brought closer"
        )
        return (f"face_crop does little: {told}.",)
    return ()


@dataclass(frozen=True, slots=True)
class Tint:
    """A change of colours: how much brighter, richer in contrast and in colour (1 changes nothing), and degrees of hue."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


@dataclass(frozen=True, slots=True)
class Look:
    """One way to look at a picture."""

    placement: Placement
    tint: Tint | None = None
    """None leaves the colours as they are."""


def look_at(
    size: Size, placement: Placement, sha256: str, number: int, config: AugmentConfig, faces: Sequence[Box] = ()
) -> Look:
    """Look ``number`` at a picture.

    Args:
        size: of the picture.
        placement: how it gets into its bucket when nothing is random.
        sha256: of its file.
        number: which look, from 0.
        config: what may differ.
        faces: found in the picture, the largest first.
    """
    identity = int(sha256[:16], 16)
    if config.face_crop is not None and faces:
        placement = _around(faces[0], size, placement, config, identity, number)
    elif config.random_crop:
        rng = random_stream(0, "random_crop", identity, number)
        (width, height), bucket = placement.resized_wh, placement.bucket_wh
        left, top = rng.randint(0, width - bucket[0]), rng.randint(0, height - bucket[1])
        placement = _cut(placement, left, top)
    return Look(placement, _tint(config, identity, number) if config.tints else None)


def tinted(image: Image.Image, tint: Tint) -> Image.Image:
    """``image`` (RGB) with other colours: one affine map of red, green and blue for the whole picture.

    Contrast is about the picture's mean grey, saturation about each pixel's own, hue a turn about the grey axis in YIQ.
    """
    pixels_HWC = np.asarray(image, dtype=np.float64)
    grey = float((pixels_HWC.mean(axis=(0, 1)) * _LUMA).sum())
    saturate = tint.saturation * np.eye(3) + (1 - tint.saturation) * np.tile(_LUMA, (3, 1))
    matrix = tint.brightness * tint.contrast * _turn(tint.hue) @ saturate
    offset = tint.brightness * (1 - tint.contrast) * grey
    changed_HWC = np.einsum("hwc,dc->hwd", pixels_HWC, matrix) + offset
    return Image.fromarray(np.clip(np.rint(changed_HWC), 0, 255).astype(np.uint8))


def _turn(degrees: float) -> np.ndarray:
    """RGB to RGB with hues turned, brightness kept."""
    to_yiq = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.linalg.inv(to_yiq) @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ to_yiq


def _tint(config: AugmentConfig, identity: int, number: int) -> Tint:
    def around(centre: float, name: str, reach: float) -> float:
        return centre + reach * random_stream(0, name, identity, number).uniform(-1, 1)

    return Tint(
        around(1, "brightness", config.brightness),
        around(1, "contrast", config.contrast),
        around(1, "saturation", config.saturation),
        around(0, "hue", config.hue),
    )


def _around(
    face: Box, size: Size, placement: Placement, config: AugmentConfig, identity: int, number: int
) -> Placement:
    """A crop of the bucket's size in which the face has the size asked for, as far as the picture allows: it is neither enlarged
    beyond what fills the bucket nor left smaller than that."""
    assert config.face_crop is not None
    rng = random_stream(0, "face_crop", identity, number)
    heights = rng.uniform(*config.face_crop)
    bucket, face_side = placement.bucket_wh, max(face[2:])
    cover = max(bucket[0] / size[0], bucket[1] / size[1])
    scale = max(cover, min(1.0, min(bucket) / (face_side * heights)))
    resized = (max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5)))
    corner = []
    for axis in (0, 1):
        start, length = face[axis] * scale, face[axis + 2] * scale
        centred = round(start + length / 2 - bucket[axis] / 2)
        slack = max(0, int(bucket[axis] - length) // 2) if config.random_crop else 0
        moved = centred + rng.randint(-slack, slack)  # the face stays inside
        corner.append(min(max(0, moved), resized[axis] - bucket[axis]))
    return _cut(replace(placement, resized_wh=resized), *corner)


def _cut(placement: Placement, left: int, top: int) -> Placement:
    bucket = placement.bucket_wh
    return replace(placement, crop_ltrb=(left, top, left + bucket[0], top + bucket[1]))
