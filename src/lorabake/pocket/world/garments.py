"""Outfits, legs and arms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorabake.pocket.world.canvas import Canvas, Part, Point
from lorabake.pocket.world.figure import CENTRE_X, Figure
from lorabake.pocket.world.palette import GOLD, STEEL, WOOD, Rgb, shade
from lorabake.pocket.world.spec import allow, axes

SHOE: Rgb = (96, 62, 50)
SHOULDER_Y, WAIST_Y, HIP_Y = 47.0, 62.0, 68.0


@dataclass(frozen=True)
class Outfit:
    """A garment or set of garments.

    `paint(canvas, figure)` draws it from neck to hem, giving the pieces that tell it from other outfits
    `Part.OUTFIT_TELL`. Tags: `"<outfit colour> <garment>"`, `"<bottom colour> <bottom>"` and, if it is not the same
    word, `name`.
    """

    name: str
    paint: Callable[[Canvas, Figure], None]
    garment: str
    bottom: str | None = None
    coloured: bool = True
    legs: str = "skin"
    """What the legs wear: "skin", "bottom" (the colour of the pants) or "steel"."""
    sleeve_width: float = 5.8
    sleeve_share: float = 0.62
    """How far down the arm the sleeve reaches, 0..1."""


def cloth_strip(
    canvas: Canvas, edges: tuple[float, float, float, float], colour: Rgb, part: int, line: bool = True
) -> None:
    """A trapezoid around the figure's axis; `edges` are (top y, bottom y, half width at the top, at the bottom)."""
    top, bottom, half_top, half_bottom = edges
    corners: list[Point] = [
        (CENTRE_X - half_top, top),
        (CENTRE_X + half_top, top),
        (CENTRE_X + half_bottom, bottom),
        (CENTRE_X - half_bottom, bottom),
    ]
    canvas.polygon(corners, colour, part, line)


def _dress(hem_y: float, spread: float, sitting_lift: float) -> Callable[[Canvas, Figure], None]:
    def paint(canvas: Canvas, figure: Figure) -> None:
        top, half = SHOULDER_Y + figure.drop, figure.torso_half
        hem = hem_y + 5.0 * figure.spec.dress_length + figure.drop - (sitting_lift if figure.seated else 0.0)
        bottom = half + spread
        cloth_strip(canvas, (top, hem, half - 0.8, bottom), figure.cloth, Part.TOP)
        trim_half = half - 0.8 + (bottom - half + 0.8) * (hem - 3.2 - top) / (hem - top)
        trim = shade(figure.cloth, 0.72) if sum(figure.cloth) > 250 else (120, 118, 130)
        cloth_strip(canvas, (hem - 3.2, hem, trim_half, bottom), trim, Part.OUTFIT_TELL, line=False)
        belt_y, belt_half = WAIST_Y + figure.drop, half + 0.1 * spread + 0.6
        canvas.limb([(CENTRE_X - belt_half, belt_y), (CENTRE_X + belt_half, belt_y)], trim, Part.TOP, 1.8, line=False)

    return paint


def _robe(canvas: Canvas, figure: Figure) -> None:
    top, half = SHOULDER_Y + figure.drop, figure.torso_half
    hem = 87.5 + figure.drop - (6.0 if figure.seated else 0.0)
    cloth_strip(canvas, (top, hem, half, half + 7.5), figure.cloth, Part.TOP)
    if not figure.behind:
        panel = CENTRE_X - (4.0 if figure.side else 0.0)
        corners = [(panel - 2.4, top), (panel + 2.4, top), (panel + 3.4, hem), (panel - 3.4, hem)]
        canvas.polygon(corners, (248, 226, 158), Part.OUTFIT_TELL, line=False)
    belt_y, belt_half = WAIST_Y + 1.0 + figure.drop, half + 2.6
    canvas.limb([(CENTRE_X - belt_half, belt_y), (CENTRE_X + belt_half, belt_y)], WOOD, Part.OUTFIT_TELL, 3.2)


def _armor(canvas: Canvas, figure: Figure) -> None:
    top, half, drop = SHOULDER_Y + figure.drop, figure.torso_half, figure.drop
    cloth_strip(canvas, (top, 69.0 + drop, half, half + 1.2), STEEL, Part.OUTFIT_TELL)
    dark = shade(STEEL, 0.68)
    canvas.limb(
        [(CENTRE_X - half, 58.5 + drop), (CENTRE_X + half, 58.5 + drop)], dark, Part.OUTFIT_TELL, 1.5, line=False
    )
    canvas.limb([(CENTRE_X, top + 2), (CENTRE_X, 67.0 + drop)], dark, Part.OUTFIT_TELL, 1.5, line=False)
    cloth_strip(canvas, (65.5 + drop, 73.0 + drop, half + 1.4, half + 3.4), shade(STEEL, 0.76), Part.OUTFIT_TELL)
    canvas.limb(
        [(CENTRE_X - half - 1, 66.0 + drop), (CENTRE_X + half + 1, 66.0 + drop)],
        GOLD,
        Part.OUTFIT_TELL,
        1.8,
        line=False,
    )


def _shirt_and_skirt(canvas: Canvas, figure: Figure) -> None:
    top, half, drop = SHOULDER_Y + figure.drop, figure.torso_half, figure.drop
    cloth_strip(canvas, (top, 66.0 + drop, half - 0.6, half), figure.cloth, Part.TOP)
    cloth_strip(canvas, (62.5 + drop, 76.0 + drop, half + 0.4, half + 8.0), figure.bottom, Part.BOTTOM)
    fold = shade(figure.bottom, 0.74)
    for x in (-0.5, 0.5):
        ends: list[Point] = [(CENTRE_X + x * half, 66.0 + drop), (CENTRE_X + x * (half + 8.0), 75.0 + drop)]
        canvas.limb(ends, fold, Part.OUTFIT_TELL, 1.1, line=False)


def _shirt_and_pants(canvas: Canvas, figure: Figure) -> None:
    top, half, drop = SHOULDER_Y + figure.drop, figure.torso_half, figure.drop
    cloth_strip(canvas, (top, 66.0 + drop, half - 0.6, half + 0.2), figure.cloth, Part.TOP)
    cloth_strip(canvas, (63.5 + drop, 71.0 + drop, half + 0.5, half + 0.8), figure.bottom, Part.BOTTOM)
    belt_half = half - 0.3
    canvas.limb(
        [(CENTRE_X - belt_half, 64.6 + drop), (CENTRE_X + belt_half, 64.6 + drop)],
        WOOD,
        Part.OUTFIT_TELL,
        1.8,
        line=False,
    )


OUTFITS: dict[str, Outfit] = {
    outfit.name: outfit
    for outfit in (
        Outfit("short dress", _dress(70.5, 6.5, 0.0), garment="dress"),
        Outfit("long dress", _dress(80.5, 9.5, 5.0), garment="dress"),
        Outfit("skirt", _shirt_and_skirt, garment="shirt", bottom="skirt"),
        Outfit("pants", _shirt_and_pants, garment="shirt", bottom="pants", legs="bottom"),
        Outfit("robe", _robe, garment="robe", sleeve_width=8.6, sleeve_share=0.8),
        Outfit("armor", _armor, garment="armor", coloured=False, legs="steel", sleeve_share=0.7),
    )
}


def add_outfit(outfit: Outfit) -> None:
    """Make an outfit drawable by name; it stays out of `sample` and of the judged axes."""
    if outfit.name not in axes["outfit"]:
        allow("outfit", outfit.name)
    OUTFITS[outfit.name] = outfit


def draw_legs(canvas: Canvas, figure: Figure) -> None:
    """Legs and shoes; drawn before the outfit, which covers what it covers."""
    wears = OUTFITS[figure.spec.outfit].legs
    colour, part = figure.skin, Part.LEG
    if wears == "bottom":
        colour, part = figure.bottom, Part.BOTTOM
    elif wears == "steel":
        colour = shade(STEEL, 0.88)
    if figure.seated:
        _draw_seated_legs(canvas, figure, colour, part)
        return
    toe = 1.8 if figure.side else 0.0
    for x in (CENTRE_X - 4.6 + toe, CENTRE_X + 4.6 - toe):
        canvas.limb([(x, 66.0), (x, 86.0)], colour, part, 6.6)
        canvas.ellipse(x - toe, 88.5, 4.9, 3.3, SHOE, Part.SHOE)


def _draw_seated_legs(canvas: Canvas, figure: Figure, colour: Rgb, part: Part) -> None:
    drop = figure.drop
    if figure.side:
        knee: Point = (CENTRE_X - 16.0, 68.0 + drop)
        canvas.limb([(CENTRE_X, 68.0 + drop), knee, (CENTRE_X - 16.5, 79.0 + drop)], colour, part, 7.0)
        canvas.ellipse(CENTRE_X - 18.5, 81.0 + drop, 5.2, 3.3, SHOE, Part.SHOE)
        return
    for side in (-1, 1):
        canvas.limb([(CENTRE_X + side * 4, 69.0 + drop), (CENTRE_X + side * 16, 75.5 + drop)], colour, part, 7.6)
        canvas.ellipse(CENTRE_X + side * 19.5, 77.0 + drop, 4.6, 5.4, SHOE, Part.SHOE)


def draw_outfit(canvas: Canvas, figure: Figure) -> None:
    """The garments without sleeves, and the collar (the place where a scarf would be)."""
    outfit = OUTFITS[figure.spec.outfit]
    outfit.paint(canvas, figure)
    colour = figure.cloth if outfit.coloured else STEEL
    y, half = SHOULDER_Y + figure.drop, figure.torso_half
    cloth_strip(canvas, (y, y + 3.6, half - 1.6, half - 2.2), shade(colour, 0.86), Part.COLLAR, line=False)


def draw_arm(canvas: Canvas, figure: Figure, holding: bool) -> None:
    """One arm with its sleeve, and its hand unless that holds something (then the hand is drawn over the object)."""
    outfit = OUTFITS[figure.spec.outfit]
    start = figure.shoulder_holding if holding else figure.shoulder_free
    hand = figure.hand_holding if holding else figure.hand_free
    cuff: Point = (
        start[0] + (hand[0] - start[0]) * outfit.sleeve_share,
        start[1] + (hand[1] - start[1]) * outfit.sleeve_share,
    )
    canvas.limb([start, hand], figure.skin, Part.SKIN, 4.8)
    sleeve = figure.cloth if outfit.coloured else shade(STEEL, 0.9)
    canvas.limb([start, cuff], sleeve, Part.TOP if outfit.coloured else Part.OUTFIT_TELL, outfit.sleeve_width)
    if not outfit.coloured:
        canvas.ellipse(*start, 4.6, 4.4, shade(STEEL, 1.1), Part.OUTFIT_TELL)
    draw_hand(canvas, figure, holding)


def draw_hand(canvas: Canvas, figure: Figure, holding: bool) -> None:
    """A round hand."""
    x, y = figure.hand_holding if holding else figure.hand_free
    canvas.ellipse(x, y, 3.3, 3.3, figure.skin, Part.HAND_HOLDING if holding else Part.HAND_FREE)
