"""Which axes can be told from a picture, decided by what was drawn and is still visible in the frame.

Areas are in pixels of a 64 x 64 picture (see `Canvas.seen`). An axis that cannot be told gets neither tag nor label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorabake.pocket.world.accessories import HEADGEAR
from lorabake.pocket.world.canvas import Part
from lorabake.pocket.world.garments import OUTFITS
from lorabake.pocket.world.styles import STYLES

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lorabake.pocket.world.spec import Spec

_COLOURS: dict[str, tuple[tuple[Part, ...], float]] = {
    "hair_color": ((Part.HAIR, Part.HAIR_TELL), 24),
    "eye_color": ((Part.IRIS,), 8),
    "skin": ((Part.SKIN, Part.LEG, Part.HAND_FREE, Part.HAND_HOLDING), 14),
}
"""Axes told by colour alone: the parts that show it and the area they need."""

_HAIR_TELL = {"long hair": 30.0, "twintails": 20.0, "ponytail": 20.0, "hair bun": 16.0, "spiky hair": 45.0}
_OUTFIT_TELL = {"short dress": 5.0, "long dress": 5.0, "robe": 14.0, "armor": 40.0, "skirt": 2.0, "pants": 2.0}
_HEADGEAR = {"witch hat": 60.0, "cap": 50.0, "crown": 24.0, "hair bow": 22.0, "cat ears": 18.0, "rabbit ears": 26.0}
_OBJECT = {"sword": 16.0, "book": 30.0, "umbrella": 40.0, "ball": 40.0}
_HAND = 5.0
_FACE = 14.0
_MOUTH, _MOUTH_BESIDE = 5.0, 8.0
_BACKGROUND = 500.0


def tellable(spec: Spec, seen: npt.NDArray[np.float64], colourful: float) -> frozenset[str]:
    """Axes of `spec` that a person could tell from the picture; also "garment", which is what tags call the outfit.

    Args:
        spec: what was asked for.
        seen: visible area of every part id.
        colourful: area of the finished picture that is not grey.
    """
    style = STYLES[spec.style]
    needed = _Areas(seen)
    told = {"view", "framing"}
    if colourful >= 40 or not style.shows_colour:
        told.add("style")
    if style.shows_colour:
        told |= {axis for axis, (parts, area) in _COLOURS.items() if needed(area, *parts)}
    told |= _told_about_head(spec, needed)
    told |= _told_about_clothes(spec, needed, style.shows_colour)
    told |= _told_about_pose(spec, needed)
    if seen[Part.BACKGROUND] >= _BACKGROUND:
        told.add("background")
    return frozenset(told)


class _Areas:
    """Asks whether the visible area of some parts is enough."""

    def __init__(self, seen: npt.NDArray[np.float64]) -> None:
        self._seen = seen

    def __call__(self, area: float, *parts: Part) -> bool:
        return sum(self._seen[part] for part in parts) >= area


def _told_about_head(spec: Spec, needed: _Areas) -> set[str]:
    told: set[str] = set()
    tell = _HAIR_TELL.get(spec.hair_style)
    if needed(24, Part.HAIR, Part.HAIR_TELL) and (tell is None or needed(tell, Part.HAIR_TELL)):
        told.add("hair_style")
    if spec.headgear == "none" or needed(_HEADGEAR.get(spec.headgear, 20.0), Part.HEADGEAR):
        told.add("headgear")
        if HEADGEAR[spec.headgear].coloured and STYLES[spec.style].shows_colour:
            told.add("headgear_color")
    face = needed(_FACE, Part.EYE, Part.IRIS, Part.EXPRESSION)
    if spec.view != "from behind" and face:
        if needed(_MOUTH_BESIDE if spec.view == "from side" else _MOUTH, Part.EXPRESSION):
            told.add("expression")
        if spec.glasses == "none" or needed(9, Part.GLASSES):
            told.add("glasses")
    return told


def _told_about_clothes(spec: Spec, needed: _Areas, shows_colour: bool) -> set[str]:
    told: set[str] = set()
    outfit = OUTFITS[spec.outfit]
    if spec.scarf == "none":
        if needed(7, Part.COLLAR):
            told.add("scarf")
    elif needed(18, Part.SCARF):
        told.add("scarf")
        if shows_colour:
            told.add("scarf_color")
    if needed(_OUTFIT_TELL.get(spec.outfit, 20.0), Part.OUTFIT_TELL):
        told.add("outfit")
    if needed(60, Part.TOP, Part.OUTFIT_TELL) and ("outfit" in told or outfit.name in ("short dress", "long dress")):
        told.add("garment")
        if shows_colour and outfit.coloured and needed(30, Part.TOP):
            told.add("outfit_color")
    else:
        told.discard("outfit")
    if "outfit" in told and outfit.bottom and needed(24, Part.BOTTOM) and shows_colour:
        told.add("bottom_color")
    return told


def _told_about_pose(spec: Spec, needed: _Areas) -> set[str]:
    told: set[str] = set()
    holding, free = needed(_HAND, Part.HAND_HOLDING), needed(_HAND, Part.HAND_FREE)
    if spec.object == "none":
        if holding:
            told.add("object")
    elif needed(_OBJECT.get(spec.object, 20.0), Part.OBJECT):
        told.add("object")
    shoes = needed(8, Part.SHOE)
    if spec.pose == "arms up":
        pose = holding and free
    elif spec.pose == "waving":
        pose = free and holding
    else:
        pose = shoes and holding
    if pose:
        told.add("pose")
    return told
