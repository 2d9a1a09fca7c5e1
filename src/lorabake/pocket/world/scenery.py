"""Backgrounds. They fill the picture whatever the framing."""

from __future__ import annotations

import random
from collections.abc import Callable

from lorabake.pocket.world.canvas import Canvas, Part
from lorabake.pocket.world.palette import WHITE, WOOD, Rgb, jitter

GROUND = Part.BACKGROUND


def _rectangle(canvas: Canvas, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    canvas.polygon(corners, colour, GROUND, line=False)


def _fill(canvas: Canvas, colour: Rgb) -> None:
    _rectangle(canvas, -1, -1, 101, 101, colour)


def _white(canvas: Canvas, rng: random.Random) -> None:
    _fill(canvas, WHITE)


def _sky(canvas: Canvas, rng: random.Random) -> None:
    _fill(canvas, jitter((112, 184, 246), rng))
    for _ in range(rng.randint(4, 6)):
        x, y = rng.uniform(0, 100), rng.uniform(5, 92)
        for shift, radius in ((-9, 6), (0, 9), (9, 6)):
            canvas.ellipse(x + shift, y, radius + 2, radius * 0.7, (252, 253, 255), GROUND, line=False)


def _forest(canvas: Canvas, rng: random.Random) -> None:
    _fill(canvas, jitter((168, 214, 156), rng))
    _rectangle(canvas, -1, 74, 101, 101, jitter((104, 164, 84), rng))
    for index in range(6):
        x, height = index * 19 + rng.uniform(-2, 10), rng.uniform(24, 46)
        _rectangle(canvas, x - 2.5, 50, x + 2.5, 80, (110, 78, 52))
        canvas.polygon(
            [(x - 14, 62), (x + 14, 62), (x, 60 - height)], jitter((46, 122, 62), rng, 14), GROUND, line=False
        )


def _indoors(canvas: Canvas, rng: random.Random) -> None:
    _fill(canvas, jitter((238, 218, 188), rng))
    _rectangle(canvas, -1, 76, 101, 101, jitter((172, 118, 78), rng))
    frame: Rgb = (140, 95, 62)
    x = rng.choice((4, 68))
    _rectangle(canvas, x - 2, 10, x + 30, 44, frame)
    _rectangle(canvas, x, 12, x + 28, 42, (172, 222, 246))
    _rectangle(canvas, x + 13, 12, x + 15, 42, frame)
    _rectangle(canvas, x, 26, x + 28, 28, frame)
    shelf = 72 if x < 50 else 4
    _rectangle(canvas, shelf, 46, shelf + 24, 76, (150, 92, 60))
    for top in (50, 63):
        _rectangle(canvas, shelf + 2, top, shelf + 22, top + 10, WOOD)


def _night(canvas: Canvas, rng: random.Random) -> None:
    dark = jitter((26, 30, 76), rng, 5)
    _fill(canvas, dark)
    for _ in range(26):
        canvas.ellipse(rng.uniform(0, 100), rng.uniform(0, 80), 1.0, 1.0, (255, 255, 230), GROUND, line=False)
    x, y = rng.choice((14, 86)), rng.uniform(12, 22)
    canvas.ellipse(x, y, 9, 9, (250, 240, 190), GROUND, line=False)
    canvas.ellipse(x + 4, y - 2, 7, 7, dark, GROUND, line=False)
    _rectangle(canvas, -1, 80, 101, 101, (18, 20, 46))


def _beach(canvas: Canvas, rng: random.Random) -> None:
    _fill(canvas, jitter((176, 226, 250), rng))
    y = rng.uniform(44, 54)
    _rectangle(canvas, -1, y, 101, 101, jitter((44, 138, 212), rng))
    _rectangle(canvas, -1, y + 20, 101, 101, jitter((242, 220, 156), rng))
    canvas.ellipse(rng.choice((12, 88)), 14, 8, 8, (255, 224, 84), GROUND, line=False)


BACKGROUNDS: dict[str, Callable[[Canvas, random.Random], None]] = {
    "white background": _white,
    "sky": _sky,
    "forest": _forest,
    "indoors": _indoors,
    "night": _night,
    "beach": _beach,
}


def draw_background(canvas: Canvas, name: str, rng: random.Random) -> None:
    """Fill the canvas; to be called before the camera is aimed at a figure."""
    BACKGROUNDS[name](canvas, rng)
