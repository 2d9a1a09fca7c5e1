"""Buckets: the few sizes pictures are resized and cropped to, so that pictures of many shapes can share batches.

The arithmetic is the one kohya's sd-scripts made the custom of the field, so that a dataset lands in the same buckets
here. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from PIL import Image
from pydantic import Field

from lorabake.base.cards import Settings
from lorabake.base.errors import Problem, Problems, UserError

Size = tuple[int, int]
"""(width, height) in pixels."""

_USUAL_SMALLEST = 256

_LEAST_SHOWN = 1 / 16
"""A picture of which less than this would be left after the crop is refused: it teaches nothing, and resizing a line of
1x10000 pixels to cover a bucket would need gigabytes."""


class BucketConfig(Settings):
    """How pictures of different shapes are brought to sizes the model can train on."""

    resolution: int | tuple[int, int] = 512
    """Pixels. The side of a square, or (width, height); only its area matters when buckets are on. Default 512, which
    SD 1.x was made with; SDXL and newer families want 1024. Must be a multiple of `step`."""

    resolutions: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Pixels. Sides of several squares: every picture is trained on at each of these sizes that it is large enough for, and at the
    smallest in any case, so an epoch shows it once for each. Absent: at `resolution` alone, which else is the largest of them."""

    enabled: bool = True
    """Whether pictures keep about their own shape. Default true; false crops every picture to `resolution`."""

    min: int | None = Field(default=None, gt=0)
    """Pixels. Shortest side of a bucket, rounded down to a multiple of `step`. Default: 256, or half the shorter side
    of `resolution` where that is less. Does nothing without `upscale`."""

    max: int | None = Field(default=None, gt=0)
    """Pixels. Longest side of a bucket, rounded up to a multiple of `step`. Default: twice the longer side of
    `resolution`; the 1024 other trainers default to would keep SDXL from its own shapes, such as 832x1216. Does nothing
    without `upscale`."""

    step: int = Field(default=64, gt=0)
    """Pixels. Every side of a bucket is a multiple of this. Default 64; the model family says what it needs (SDXL works with 32)."""

    upscale: bool = True
    """Whether a picture smaller than its bucket is enlarged. Default true, so that every picture fills its bucket;
    false leaves small pictures at their size (their bucket is what is left after cropping to `step`)."""

    def each(self) -> tuple[BucketConfig, ...]:
        """The same for each of the resolutions alone, in ascending order; itself where there is one."""
        if not self.resolutions:
            return (self,)
        return tuple(
            self.model_copy(update={"resolution": side, "resolutions": ()}) for side in sorted(self.resolutions)
        )

    @property
    def resolution_wh(self) -> Size:
        """`resolution` as (width, height)."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def smallest(self) -> int:
        """Shortest side a bucket may have, in pixels, before rounding to `step`."""
        return self.min if self.min is not None else min(_USUAL_SMALLEST, max(self.step, min(self.resolution_wh) // 2))

    @property
    def largest(self) -> int:
        """Longest side a bucket may have, in pixels, before rounding to `step`."""
        return self.max if self.max is not None else 2 * max(self.resolution_wh)


@dataclass(frozen=True, slots=True)
class Placement:
    """How one picture gets into its bucket: it is resized to `resized_wh`, then `crop_ltrb` is cut out."""

    bucket_wh: Size
    resized_wh: Size
    crop_ltrb: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the resized picture; right and bottom are outside."""


def bucket_problems(config: BucketConfig) -> tuple[Problem, ...]:
    """Everything about ``config`` that cannot work."""
    if config.resolutions:
        return tuple(_several_problems(config))
    problems = []
    step, resolution = config.step, _shown(config.resolution_wh)
    if min(config.resolution_wh) < 1:
        return (Problem("resolution", f"{resolution} has no area. Give sides of at least {step}."),)
    if any(side % step for side in config.resolution_wh):
        near = tuple(max(step, round(side / step) * step) for side in config.resolution_wh)
        problems.append(
            Problem("resolution", f"{resolution} is not a multiple of step {step}. Nearest: {_shown(near)}.")
        )
    if config.enabled and config.upscale:
        problems += _limit_problems(config)
    return tuple(problems)


def _several_problems(config: BucketConfig) -> Iterator[Problem]:
    listed = list(config.resolutions)
    if len(set(listed)) != len(listed):
        yield Problem("resolutions", f"{listed} names a size twice. Repeats are for that: name the folder 2_name.")
    if "resolution" in config.model_fields_set and config.resolution_wh != (max(listed), max(listed)):
        what = f"{listed}, and resolution is {_shown(config.resolution_wh)}. Leave resolution out, or list it as the largest."
        yield Problem("resolutions", what)
    for alone in config.each():
        for problem in bucket_problems(alone):
            where = "resolutions" if problem.where == "resolution" else problem.where
            yield Problem(where, problem.what)


def _limit_problems(config: BucketConfig) -> list[Problem]:
    problems = []
    smallest, largest = _rounded_limits(config)
    resolution = _shown(config.resolution_wh)
    if smallest < config.step:
        problems.append(Problem("min", f"{config.smallest} is below step {config.step}. Give at least {config.step}."))
    if min(config.resolution_wh) < smallest:
        what = f"{smallest} is above the shorter side of resolution {resolution}. Lower min or raise resolution."
        problems.append(Problem("min", what))
    if max(config.resolution_wh) > largest:
        what = f"{largest} is below the longer side of resolution {resolution}. Raise max or lower resolution."
        problems.append(Problem("max", what))
    return problems


def idle_settings(config: BucketConfig) -> tuple[str, ...]:
    """Settings that were given and do nothing, each with the reason."""
    if config.enabled and config.upscale:
        return ()
    reason = "buckets are off" if not config.enabled else "without upscale a picture's own size decides"
    given = [name for name, value in (("min", config.min), ("max", config.max)) if value is not None]
    return tuple(f"{name} does nothing: {reason}." for name in given)


@functools.lru_cache(maxsize=64)
def make_buckets(resolution: Size, smallest: int, largest: int, step: int) -> tuple[Size, ...]:
    """Every bucket with sides between ``smallest`` and ``largest``, in ascending order; none has more area than ``resolution``.

    For each width the height is the largest multiple of ``step`` that keeps the area; both ways round, plus the largest
    square.

    Args:
        resolution: (width, height) whose area is the limit.
        smallest: shortest side, a multiple of ``step``.
        largest: longest side, a multiple of ``step``.
        step: what every side is a multiple of.
    """
    area = resolution[0] * resolution[1]
    square = math.isqrt(area) // step * step
    buckets = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            buckets |= {(width, height), (height, width)}
    return tuple(sorted(buckets))


def placements(size: Size, config: BucketConfig) -> tuple[Placement, ...]:
    """Where a picture of ``size`` goes at each size that it is trained on, the smallest first; at least one.

    It is large enough for a resolution if it has as many pixels, so that nothing is enlarged but to fill a bucket of another shape.

    Raises:
        Problems, UserError: as for `place`.
    """
    if problems := bucket_problems(config):
        raise Problems("buckets", problems)
    smallest, *others = config.each()
    fitting = [other for other in others if size[0] * size[1] >= other.resolution_wh[0] * other.resolution_wh[1]]
    return tuple(dict.fromkeys(place(size, alone) for alone in (smallest, *fitting)))


def place(size: Size, config: BucketConfig) -> Placement:
    """Where a picture of ``size`` goes at one resolution.

    Raises:
        Problems: ``config`` cannot work (see `bucket_problems`).
        UserError: the picture is too narrow or, without upscaling, too small for any bucket.
    """
    if problems := bucket_problems(config):
        raise Problems("buckets", problems)
    if not config.enabled:
        if not config.upscale and (size[0] < config.resolution_wh[0] or size[1] < config.resolution_wh[1]):
            what = f"A picture of {_shown(size)} is smaller than resolution {_shown(config.resolution_wh)}"
            raise UserError(f"{what}. Set upscale = true, turn buckets on, or take the picture out.")
        return _cover(size, config.resolution_wh)
    if config.upscale:
        return _cover(size, _closest(size, make_buckets(config.resolution_wh, *_rounded_limits(config), config.step)))
    return _without_upscaling(size, config.resolution_wh, config.step)


def _rounded_limits(config: BucketConfig) -> tuple[int, int]:
    step = config.step
    return config.smallest // step * step, -(-config.largest // step) * step


def _closest(size: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket of exactly this size, else the one with the closest width/height (linear, the first of equals)."""
    if size in buckets:
        return size
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def _cover(size: Size, bucket: Size) -> Placement:
    """Resize so that the picture just covers ``bucket``, then cut off what stands out, half on each side."""
    width, height = size
    wider = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if wider else bucket[0] / width
    shown = bucket[0] * bucket[1] / (width * scale * height * scale)
    if shown < _LEAST_SHOWN:
        what = f"A picture of {_shown(size)} is too narrow: {shown:.1%} of it would be left in bucket {_shown(bucket)}"
        raise UserError(f"{what}. Crop it or take it out.")
    return _centred(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)))


def _without_upscaling(size: Size, resolution: Size, step: int) -> Placement:
    """Shrink to the area of ``resolution`` where larger, then crop both sides down to multiples of ``step``."""
    resized = _shrunk(size, resolution[0] * resolution[1], step)
    bucket = (resized[0] // step * step, resized[1] // step * step)
    if 0 in bucket:
        what = f"A picture of {_shown(size)} has no bucket without upscaling: {_shown(resized)} is below step {step}"
        raise UserError(f"{what} on a side. Set upscale = true or take the picture out.")
    return _centred(bucket, resized)


def _shrunk(size: Size, area: int, step: int) -> Size:
    """``size`` scaled down to ``area`` so that one side is a multiple of ``step``: the side that bends the shape less."""
    width, height = size
    if width * height <= area:
        return size
    ratio = width / height
    ideal_width = math.sqrt(area * ratio)
    ideal_height = area / ideal_width
    by_width = _floored(ideal_width, step)
    by_height = _floored(ideal_height, step)
    width_bends = _bend(by_width, _floored(by_width / ratio, step), ratio)
    height_bends = _bend(_floored(by_height * ratio, step), by_height, ratio)
    if width_bends < height_bends:
        return by_width, int(by_width / ratio + 0.5)
    return int(by_height * ratio + 0.5), by_height


def _floored(length: float, step: int) -> int:
    """``length`` rounded to a pixel, then down to a multiple of ``step``."""
    return int(length + 0.5) // step * step


def _bend(width: int, height: int, ratio: float) -> float:
    return abs(width / height - ratio) if height else math.inf


def _centred(bucket: Size, resized: Size) -> Placement:
    left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
    return Placement(bucket, resized, (left, top, left + bucket[0], top + bucket[1]))


def fit(image: Image.Image, placement: Placement) -> Image.Image:
    """``image`` resized and cropped as ``placement`` says; its size is then ``placement.bucket_wh``.

    Shrinking uses Pillow's HAMMING, the closest of its filters to the area averaging (OpenCV's INTER_AREA) that kohya uses: 2 to 7 grey
    levels RMS on a zone plate, where BOX differs by up to 23 because it does not split a pixel between two neighbours. Enlarging uses
    LANCZOS, as kohya does.
    """
    if image.size != placement.resized_wh:
        shrinks = image.width >= placement.resized_wh[0] and image.height >= placement.resized_wh[1]
        image = image.resize(placement.resized_wh, Image.Resampling.HAMMING if shrinks else Image.Resampling.LANCZOS)
    return image.crop(placement.crop_ltrb)


def _shown(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
