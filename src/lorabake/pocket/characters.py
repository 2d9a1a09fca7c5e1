"""Characters, an outfit, an object and a style the base model has never seen; and the parts to invent more.

A character is data: values that are fixed, and extras, each a feature's name and a tiny drawing function.

    zorbi = Character("zorbi", {"hair_color": "pink"}, (split_hair("green"), star_antenna()))
    drawing = draw(zorbi.spec(random.Random(3), framing="portrait"), rng_seed=3)
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lorabake.pocket.world.accessories import add_object, heart_points, star_points
from lorabake.pocket.world.canvas import Canvas, Ink, Part, Point
from lorabake.pocket.world.figure import CENTRE_X, Figure
from lorabake.pocket.world.garments import Outfit, add_outfit, cloth_strip
from lorabake.pocket.world.palette import CLOTH, HAIR, INK, WHITE, Rgb, shade
from lorabake.pocket.world.spec import Extra, Spec, sample
from lorabake.pocket.world.styles import Style, add_style, duotone
from lorabake.pocket.world.tags import tags_of

_Coordinates = npt.NDArray[np.float32]
_ALL_HAIR = (Part.HAIR, Part.HAIR_TELL)


@dataclass(frozen=True)
class Character:
    """Somebody who always looks the same: `fixes` are values by axis, `extras` what no axis can express."""

    name: str
    fixes: Mapping[str, Any] = field(default_factory=dict)
    extras: tuple[Extra, ...] = ()

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the extras."""
        return tuple(extra.feature for extra in self.extras)

    def spec(self, rng: random.Random, hold_out: Mapping[str, Collection[str]] | None = None, **fixed: Any) -> Spec:
        """A random picture content that shows this character; `fixed` fields win over the character's own."""
        free = {axis: values for axis, values in (hold_out or {}).items() if axis not in self.fixes}
        return sample(rng, free, **{"extras": self.extras, **self.fixes, **fixed})

    def own_tags(self) -> frozenset[str]:
        """Tags that say what the character always is, which captions for training leave to its name (pruning)."""
        spec = Spec(**self.fixes)
        told = {*self.fixes, "garment"} if "outfit" in self.fixes else set(self.fixes)
        colourless = {axis for axis in told if not axis.endswith("_color")}
        whatever_the_character = set(tags_of(spec, ()))
        named = {*tags_of(spec, told), *tags_of(spec, colourless)} - whatever_the_character
        return frozenset(named) | frozenset(self.features)


def split_hair(colour: str) -> Extra:
    """Hair of two colours, parted in the middle; the figure's left half is `colour`."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        middle = figure.head[0]
        canvas.retouch(_ALL_HAIR, lambda x, y: x > middle, (figure.hair, HAIR[colour]), part)

    return Extra("split hair", "hair", paint, pixels=30)


def dipped_hair(colour: str) -> Extra:
    """Hair whose lower ends have another colour."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        edge = figure.head[1] + 8.0
        canvas.retouch(_ALL_HAIR, lambda x, y: y > edge, (figure.hair, HAIR[colour]), part)

    return Extra("dipped hair", "hair", paint, pixels=40)


def star_antenna(colour: Rgb = (255, 224, 60)) -> Extra:
    """A big star on a short stalk on top of the head."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        x, y = figure.head[0], figure.head[1] - 16.0
        canvas.limb([(x, y + 1), (x + 1, y - 6)], (60, 60, 72), part, 2.2)
        canvas.polygon(star_points(x + 1, y - 8, 8.4, 4.0), colour, part)

    return Extra("star antenna", "top", paint, pixels=20, headroom=11.0)


def horns(colour: Rgb = (214, 190, 150)) -> Extra:
    """Two curved horns at the sides of the head."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        x, y = figure.head
        for side in (-1, 1):
            curve: list[Point] = [(12.5, -13), (19.5, -17), (22.5, -27), (15.5, -21), (7, -16.5)]
            canvas.polygon([(x + side * dx, y + dy) for dx, dy in curve], colour, part)

    return Extra("horns", "top", paint, pixels=18, headroom=3.0)


def leaf_sprout(colour: Rgb = (96, 190, 60)) -> Extra:
    """A sprout with two big leaves on top of the head."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        x, y = figure.head[0], figure.head[1] - 16.0
        canvas.limb([(x, y), (x, y - 7)], shade(colour, 0.8), part, 2.2)
        for side in (-1, 1):
            leaf: list[Point] = [(0, -6), (6, -13), (14, -13), (11, -6), (5, -4)]
            canvas.polygon([(x + side * dx, y + dy) for dx, dy in leaf], colour, part)

    return Extra("leaf sprout", "top", paint, pixels=20, headroom=4.0)


def stripes(colour: Rgb) -> Extra:
    """Bold horizontal stripes on the dress, shirt or robe."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        start = 50.5 + figure.drop

        def striped(x: _Coordinates, y: _Coordinates) -> npt.NDArray[np.bool_]:
            return (y - start) % 12.0 < 6.0

        canvas.retouch(Part.TOP, striped, (figure.cloth, colour), part)

    return Extra("stripes", "outfit", paint, pixels=24)


def dots(colour: Rgb) -> Extra:
    """Big dots all over the dress, shirt or robe."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        left, top = CENTRE_X, 52.0 + figure.drop

        def dotted(x: _Coordinates, y: _Coordinates) -> npt.NDArray[np.bool_]:
            row = np.floor((y - top) / 7.6)
            column = (x - left + 3.8 * (row % 2)) % 7.6 - 3.8
            return column**2 + ((y - top) % 7.6 - 3.8) ** 2 < 2.7**2

        canvas.retouch(Part.TOP, dotted, (figure.cloth, colour), part)

    return Extra("dots", "outfit", paint, pixels=20)


def heart_emblem(colour: Rgb = (238, 44, 74)) -> Extra:
    """A big heart with a white rim on the chest; not seen from behind."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        if figure.behind:
            return
        x, y = CENTRE_X - (2.0 if figure.side else 0.0), 56.5 + figure.drop
        canvas.polygon(heart_points(x, y, 7.6), WHITE, part)
        canvas.polygon(heart_points(x, y, 5.9), colour, part, line=False)

    return Extra("heart emblem", "outfit", paint, pixels=20)


def cape(colour: Rgb) -> Extra:
    """A wide cape hanging from the shoulders behind the body."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        y, half = 48.0 + figure.drop, figure.torso_half
        shift = 6.0 if figure.side else 0.0
        corners: list[Point] = [
            (CENTRE_X - half + shift, y),
            (CENTRE_X + half, y),
            (CENTRE_X + half + 15, y + 34),
            (CENTRE_X + half + 8, y + 30),
            (CENTRE_X + half + 3, y + 34),
            (CENTRE_X - half - 3 + 2 * shift, y + 34),
            (CENTRE_X - half - 8 + 2 * shift, y + 30),
            (CENTRE_X - half - 15 + 2.6 * shift, y + 34),
        ]
        canvas.polygon(corners, colour, part)

    return Extra("cape", "behind", paint, pixels=40)


def fox_tail(colour: Rgb = (236, 132, 48)) -> Extra:
    """A bushy tail with a white tip beside the body."""

    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        x, y = CENTRE_X, 70.0 + figure.drop
        canvas.limb([(x, y), (x + 17, y + 3), (x + 23, y - 12)], colour, part, 12.0)
        canvas.ellipse(x + 23.5, y - 15, 5.6, 6.0, WHITE, part)

    return Extra("fox tail", "behind", paint, pixels=30)


def _cheek_marks(colour: Rgb) -> Extra:
    def paint(canvas: Canvas, figure: Figure, part: int) -> None:
        x, y = figure.head
        for side in (-1,) if figure.side else (-1, 1):
            left = x - 2.0 if figure.side else x + side * 12.0
            canvas.polygon([(left - 4, y + 8), (left + 4, y + 8), (left, y + 15)], colour, part, line=False)

    return Extra("cheek marks", "face", paint, pixels=6)


def _poncho(canvas: Canvas, figure: Figure) -> None:
    top, bottom, half = 47.0 + figure.drop, 71.0 + figure.drop, figure.torso_half + 11.0
    cloth_strip(canvas, (64.0 + figure.drop, 72.0 + figure.drop, 8.0, 8.6), (92, 84, 110), Part.BOTTOM)
    cloth_strip(canvas, (top, bottom, 6.5, half), figure.cloth, Part.TOP)
    for share, colour in ((0.52, WHITE), (0.8, shade(figure.cloth, 0.6))):
        y = top + (bottom - top) * share
        width = 6.5 + (half - 6.5) * share - 1.6
        zigzag = [(CENTRE_X - width + width * step / 4, y + (1.8 if step % 2 else -1.8)) for step in range(9)]
        canvas.limb(zigzag, colour, Part.OUTFIT_TELL, 2.2, line=False)


def _lollipop(canvas: Canvas, figure: Figure) -> None:
    x, y = figure.hand_holding
    canvas.limb([(x, y + 5), (x, y - 10)], WHITE, Part.OBJECT, 2.4)
    canvas.ellipse(x, y - 17, 9.6, 9.6, (250, 120, 170), Part.OBJECT)
    for radius, colour in ((6.8, WHITE), (4.2, (250, 120, 170)), (1.8, WHITE)):
        canvas.ellipse(x, y - 17, radius, radius, colour, Part.OBJECT, line=False)


CHARACTERS: dict[str, Character] = {
    character.name: character
    for character in (
        Character(
            "zorbi",
            dict(
                hair_color="pink",
                hair_style="twintails",
                hair_length=0.6,
                eye_color="yellow",
                skin="light",
                outfit="long dress",
                dress_length=0.3,
                outfit_color="black",
                headgear="none",
                glasses="none",
                scarf="none",
            ),
            (split_hair("green"), star_antenna(), stripes((250, 205, 50)), heart_emblem()),
        ),
        Character(
            "mirvo",
            dict(
                hair_color="blue",
                hair_style="long hair",
                hair_length=0.5,
                eye_color="red",
                skin="dark",
                outfit="skirt",
                outfit_color="white",
                bottom_color="purple",
                headgear="none",
                glasses="none",
                scarf="none",
            ),
            (dipped_hair("orange"), horns(), cape(CLOTH["red"])),
        ),
        Character(
            "kelpa",
            dict(
                hair_color="green",
                hair_style="short hair",
                hair_length=0.4,
                eye_color="brown",
                skin="light",
                outfit="robe",
                outfit_color="yellow",
                headgear="none",
                glasses="none",
            ),
            (leaf_sprout(), fox_tail(), _cheek_marks((214, 60, 50))),
        ),
        Character(
            "dunvik",
            dict(
                hair_color="white",
                hair_style="spiky hair",
                eye_color="purple",
                skin="dark",
                outfit="pants",
                outfit_color="red",
                bottom_color="black",
                headgear="cat ears",
            ),
            (dots(WHITE), cape(CLOTH["green"])),
        ),
    )
}
"""Four characters whose features no tag of the world can name."""

add_outfit(Outfit("poncho", _poncho, garment="poncho", sleeve_width=5.0))
add_object("lollipop", _lollipop)
add_style(Style("dusk print", Ink(1.5, INK), duotone((40, 18, 70), (226, 96, 92), (255, 240, 200), share=0.72)))
