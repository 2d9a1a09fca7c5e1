"""Rendering styles: how lines are drawn, and what is done to the finished picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lorabake.pocket.world.canvas import Ink
from lorabake.pocket.world.palette import INK, WHITE, Rgb
from lorabake.pocket.world.spec import allow, axes

HARD_INK = Ink(1.5, INK)
SOFT_INK = Ink(0.8)
_SEPIA: tuple[Rgb, Rgb, Rgb] = ((52, 30, 14), (176, 126, 74), (255, 240, 206))
"""Dark, middle and bright."""


@dataclass(frozen=True)
class Style:
    """`finish(image, size)` makes the final RGB picture of `size` x `size` from the supersampled one."""

    name: str
    ink: Ink
    finish: Callable[[Image.Image, int], Image.Image]
    shows_colour: bool = True


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Average the supersampled picture down to `size` x `size`."""
    return image.reduce(image.width // size)


def _monochrome(image: Image.Image, size: int) -> Image.Image:
    return shrink(image, size).convert("L").convert("RGB")


def _pastel(image: Image.Image, size: int) -> Image.Image:
    small = shrink(image, size)
    return Image.blend(small, Image.new("RGB", small.size, WHITE), 0.38)


def duotone(dark: Rgb, middle: Rgb, bright: Rgb, share: float) -> Callable[[Image.Image, int], Image.Image]:
    """A finish that pulls every pixel, by its brightness, towards a gradient of three colours."""
    ramp = np.stack(
        [np.interp(np.arange(256), (0, 128, 255), channel) for channel in zip(dark, middle, bright, strict=True)], -1
    )

    def finish(image: Image.Image, size: int) -> Image.Image:
        small = shrink(image, size)
        toned = Image.fromarray(ramp.astype(np.uint8)[np.asarray(small.convert("L"))])
        return Image.blend(small, toned, share)

    return finish


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("flat color", SOFT_INK, shrink),
        Style("outline", HARD_INK, shrink),
        Style("sepia", HARD_INK, duotone(*_SEPIA, share=1.0), shows_colour=False),
        Style("monochrome", HARD_INK, _monochrome, shows_colour=False),
        Style("pastel color", SOFT_INK, _pastel),
    )
}


def add_style(style: Style) -> None:
    """Make a style drawable by name; it stays out of `sample` and of the judged axes."""
    if style.name not in axes["style"]:
        allow("style", style.name)
    STYLES[style.name] = style
