"""A unit canvas on supersampled pixels that remembers which part of the picture each pixel belongs to.

Pictures are drawn on an RGBA image whose alpha channel is not opacity but the **part id** of what was drawn there
last. One call therefore writes colour and ownership together, occlusion comes for free, and counting ids afterwards
says how much of every part can be seen (`Canvas.seen`). Pillow draws on RGBA images without blending, which makes
this exact.

Coordinates are units: 100 across the figure's plane, x to the right, y down, whatever the size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from lorabake.pocket.world.palette import Rgb, shade

Point = tuple[float, float]
UNITS = 100.0
"""Width and height of the figure's plane."""
LEAST_CONTRAST = 48
"""Colours that differ less than this in every channel look alike."""
PIXELS_OF_REFERENCE = 64 * 64
"""Visible areas are reported in pixels of a 64 x 64 picture, whatever is drawn."""


class Part(IntEnum):
    """What a pixel belongs to. Ids from `EXTRA` on are handed out to the extras of a figure, in order."""

    NONE = 0
    BACKGROUND = 1
    SKIN = 2
    HAIR = 3
    HAIR_TELL = 4
    """The piece of hair that tells the hair style: tails, bun, spikes, the lower part of long hair."""
    EYE = 5
    IRIS = 6
    EXPRESSION = 7
    GLASSES = 8
    COLLAR = 9
    SCARF = 10
    TOP = 11
    BOTTOM = 12
    OUTFIT_TELL = 13
    """The piece that tells one outfit from another: hem, belt, plates."""
    LEG = 14
    SHOE = 15
    HEADGEAR = 16
    OBJECT = 17
    HAND_HOLDING = 18
    HAND_FREE = 19
    EXTRA = 32


@dataclass(frozen=True)
class Ink:
    """How shapes are lined: width in units of the picture and the colour (None: a darker shade of the fill)."""

    width: float
    colour: Rgb | None = None


class Canvas:
    """Draws shapes given in units; every shape says which part it belongs to."""

    def __init__(self, pixels: int, ink: Ink) -> None:
        """An empty square canvas of `pixels` x `pixels` with lines as `ink` says."""
        self.pixels = pixels
        self.image = Image.new("RGBA", (pixels, pixels))
        self._draw = ImageDraw.Draw(self.image)
        self._ink = ink
        self._line = max(1, round(ink.width * pixels / UNITS))
        self._flip = False
        self._scale = pixels / UNITS
        self._left = 0.0
        self._top = 0.0

    def aim(self, scale: float, centre: Point, at: Point, flip: bool) -> None:
        """Show unit point `centre` at unit point `at` of the picture, `scale` times as large, mirrored if `flip`."""
        unit = self.pixels / UNITS
        self._scale = unit * scale
        self._left = at[0] * unit - centre[0] * self._scale
        self._top = at[1] * unit - centre[1] * self._scale
        self._flip = flip

    def polygon(self, points: Sequence[Point], colour: Rgb, part: int, line: bool = True) -> None:
        """A filled polygon."""
        spots = [self._spot(x, y) for x, y in points]
        self._draw.polygon(spots, fill=(*colour, part))
        if line:
            self._draw.line([*spots, *spots[:2]], fill=self._line_fill(colour, part), width=self._line, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb, part: int, line: bool = True) -> None:
        """A filled ellipse around `(x, y)` with half axes `rx` and `ry`."""
        x, y = self._spot(x, y)
        rx, ry = rx * self._scale, ry * self._scale
        if line:
            half = self._line / 2
            box = (x - rx - half, y - ry - half, x + rx + half, y + ry + half)
            self._draw.ellipse(box, fill=self._line_fill(colour, part))
            rx, ry = rx - half, ry - half
        if rx > 0 and ry > 0:
            self._draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=(*colour, part))

    def chord(
        self,
        x: float,
        y: float,
        radii: Point,
        angles: Point,
        colour: Rgb,
        part: int,
        line: bool = True,
    ) -> None:
        """A filled piece of an ellipse cut off between two angles (degrees, clockwise from east), lined on its arc."""
        box, (start, end) = self._arc_box(x, y, radii, angles)
        self._draw.chord(box, start, end, fill=(*colour, part))
        if line:
            self._draw.arc(box, start, end, fill=self._line_fill(colour, part), width=self._line)

    def arc(self, x: float, y: float, radii: Point, angles: Point, colour: Rgb, part: int, width: float) -> None:
        """A stroke of `width` units along an ellipse between two angles (degrees, clockwise from east)."""
        box, (start, end) = self._arc_box(x, y, radii, angles)
        self._draw.arc(box, start, end, fill=(*colour, part), width=max(1, round(width * self._scale)))

    def limb(self, points: Sequence[Point], colour: Rgb, part: int, width: float, line: bool = True) -> None:
        """A thick stroke of `width` units with round ends."""
        spots = [self._spot(x, y) for x, y in points]
        thick = width * self._scale
        if line:
            self._stroke(spots, self._line_fill(colour, part), thick + self._line)
            thick -= self._line
        self._stroke(spots, (*colour, part), max(1.0, thick))

    def crease(self, points: Sequence[Point], colour: Rgb, part: int) -> None:
        """A thin line as the style draws lines on something of that `colour`."""
        spots = [self._spot(x, y) for x, y in points]
        self._draw.line(spots, fill=self._line_fill(colour, part), width=self._line, joint="curve")

    def retouch(
        self,
        part: int | tuple[int, ...],
        where: Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32]], npt.NDArray[np.bool_]],
        change: tuple[Rgb, Rgb],
        new_part: int,
    ) -> None:
        """Dye what is already drawn: pixels of `part` at unit positions chosen by `where(x, y)` become `new_part`.

        `change` is (old colour, new colour); shades of the old one become the same shades of the new one. Two
        colours nobody could tell apart change nothing, so that nothing is claimed to be there.
        """
        if max(abs(old - new) for old, new in zip(*change, strict=True)) < LEAST_CONTRAST:
            return
        owners = part if isinstance(part, tuple) else (part,)
        pixels = np.array(self.image)
        rows, columns = np.nonzero(np.isin(pixels[..., 3], owners))
        x = (columns - self._left) / self._scale
        if self._flip:
            x = (self.pixels - columns - self._left) / self._scale
        chosen = where(x.astype(np.float32), ((rows - self._top) / self._scale).astype(np.float32))
        rows, columns = rows[chosen], columns[chosen]
        old, new = (np.array(colour, np.float32) for colour in change)
        shades = pixels[rows, columns, :3].sum(-1, keepdims=True) / old.sum()
        pixels[rows, columns, :3] = np.clip(new * shades, 0, 255)
        pixels[rows, columns, 3] = new_part
        self.image = Image.fromarray(pixels)
        self._draw = ImageDraw.Draw(self.image)

    def seen(self) -> npt.NDArray[np.float64]:
        """Visible area of every part id, in pixels of a 64 x 64 picture: float64 [256]."""
        ids = np.asarray(self.image)[::2, ::2, 3]
        return np.bincount(ids.ravel(), minlength=256).astype(np.float64) * (PIXELS_OF_REFERENCE / ids.size)

    def _spot(self, x: float, y: float) -> Point:
        column = x * self._scale + self._left
        return (self.pixels - column if self._flip else column), y * self._scale + self._top

    def _arc_box(self, x: float, y: float, radii: Point, angles: Point) -> tuple[tuple[float, ...], Point]:
        x, y = self._spot(x, y)
        rx, ry = radii[0] * self._scale, radii[1] * self._scale
        start, end = (180 - angles[1], 180 - angles[0]) if self._flip else angles
        return (x - rx, y - ry, x + rx, y + ry), (start, end)

    def _line_fill(self, colour: Rgb, part: int) -> tuple[int, int, int, int]:
        if self._ink.colour is None:
            return (*shade(colour, 0.74), part)
        return (*self._ink.colour, Part.NONE)

    def _stroke(self, spots: list[Point], fill: tuple[int, int, int, int], thick: float) -> None:
        self._draw.line(spots, fill=fill, width=max(1, round(thick)), joint="curve")
        for x, y in (spots[0], spots[-1]):
            self._draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=fill)
