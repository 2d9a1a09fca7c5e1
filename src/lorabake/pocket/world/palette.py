"""Colours of the pocket world: named tables and the three operations drawings need.

All colours are `(red, green, blue)` integers in 0..255. The names of a table are the words used in tags. The
values are far enough apart to be told from each other at 64 px in every style that shows colour.
"""

from __future__ import annotations

import random

Rgb = tuple[int, int, int]

HAIR: dict[str, Rgb] = {
    "black": (48, 45, 56),
    "brown": (128, 80, 46),
    "blonde": (243, 212, 102),
    "red": (206, 44, 46),
    "pink": (250, 152, 200),
    "blue": (62, 105, 222),
    "green": (72, 176, 84),
    "purple": (140, 76, 196),
    "white": (236, 237, 246),
    "orange": (246, 138, 34),
}
EYES: dict[str, Rgb] = {
    "red": (218, 32, 46),
    "blue": (44, 112, 238),
    "green": (34, 166, 78),
    "yellow": (242, 196, 36),
    "purple": (156, 64, 214),
    "brown": (128, 78, 38),
}
CLOTH: dict[str, Rgb] = {
    "red": (212, 46, 52),
    "blue": (56, 98, 214),
    "green": (56, 154, 78),
    "yellow": (248, 208, 66),
    "purple": (136, 72, 186),
    "pink": (250, 158, 196),
    "black": (52, 50, 60),
    "white": (242, 242, 247),
}
SKIN: dict[str, Rgb] = {"light": (255, 224, 200), "dark": (170, 112, 76)}

INK: Rgb = (30, 28, 36)
STEEL: Rgb = (172, 180, 194)
GOLD: Rgb = (246, 200, 60)
WOOD: Rgb = (120, 74, 42)
PAPER: Rgb = (252, 250, 238)
WHITE: Rgb = (255, 255, 255)


def shade(colour: Rgb, factor: float) -> Rgb:
    """`colour` made darker (`factor` < 1) or brighter (> 1), clipped to 0..255."""
    red, green, blue = colour
    return min(255, int(red * factor)), min(255, int(green * factor)), min(255, int(blue * factor))


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """The straight line from `first` (`share` 0) to `second` (`share` 1)."""
    return (
        round(first[0] + (second[0] - first[0]) * share),
        round(first[1] + (second[1] - first[1]) * share),
        round(first[2] + (second[2] - first[2]) * share),
    )


def jitter(colour: Rgb, rng: random.Random, amount: float = 6.0) -> Rgb:
    """`colour` with up to `amount` added to or taken from each channel."""
    red, green, blue = (max(0, min(255, round(value + rng.uniform(-amount, amount)))) for value in colour)
    return red, green, blue
