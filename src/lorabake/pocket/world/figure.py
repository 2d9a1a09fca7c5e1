"""Where a figure's parts are: the geometry and colours every drawing function reads."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lorabake.pocket.world.canvas import Point
from lorabake.pocket.world.palette import CLOTH, EYES, HAIR, SKIN, Rgb, jitter
from lorabake.pocket.world.spec import Spec

CENTRE_X = 50.0
SEATED_DROP = 9.0
"""How much lower everything is when the figure sits."""
HEAD_RX, HEAD_RY = 17.5, 16.5


@dataclass(frozen=True)
class Figure:
    """Positions in units (100 across, y down, the figure faces left in side view) and colours."""

    spec: Spec
    hair: Rgb
    eyes: Rgb
    skin: Rgb
    cloth: Rgb
    """Colour of the dress, shirt or robe."""
    bottom: Rgb
    """Colour of the skirt or the pants."""
    scarf: Rgb
    headgear: Rgb
    drop: float
    """How far the whole figure is moved down (sitting)."""
    head: Point
    """Centre of the head; its half axes are `HEAD_RX`, `HEAD_RY`."""
    torso_half: float
    """Half of the torso's width at the shoulders."""
    hand_holding: Point
    hand_free: Point
    shoulder_holding: Point
    shoulder_free: Point

    @property
    def side(self) -> bool:
        """Seen from the side."""
        return self.spec.view == "from side"

    @property
    def behind(self) -> bool:
        """Seen from behind."""
        return self.spec.view == "from behind"

    @property
    def seated(self) -> bool:
        """Sits on the ground."""
        return self.spec.pose == "sitting"

    @classmethod
    def of(cls, spec: Spec, rng: random.Random) -> Figure:
        """The figure of `spec`, with colours a little different each time."""
        drop = SEATED_DROP if spec.pose == "sitting" else 0.0
        side = spec.view == "from side"
        half = 6.8 if side else 8.5
        hands = _hands(spec, side, drop)
        shoulder_y = 51.0 + drop
        reach = 0.0 if side else half - 1.2
        return cls(
            spec=spec,
            hair=jitter(HAIR[spec.hair_color], rng),
            eyes=EYES[spec.eye_color],
            skin=SKIN[spec.skin],
            cloth=jitter(CLOTH[spec.outfit_color], rng),
            bottom=jitter(CLOTH[spec.bottom_color], rng),
            scarf=jitter(CLOTH[spec.scarf_color], rng),
            headgear=jitter(CLOTH[spec.headgear_color], rng),
            drop=drop,
            head=(CENTRE_X - (1.5 if side else 0.0), 32.0 + drop),
            torso_half=half,
            hand_holding=hands[0],
            hand_free=hands[1],
            shoulder_holding=(CENTRE_X + reach, shoulder_y),
            shoulder_free=(CENTRE_X - reach, shoulder_y),
        )


def _hands(spec: Spec, side: bool, drop: float) -> tuple[Point, Point]:
    """Where the holding and the free hand are."""
    holding_up = spec.pose == "arms up"
    free_up = spec.pose in ("arms up", "waving")
    holds = spec.object != "none"
    if side:
        lowered = (CENTRE_X - 18.5, 56.5 + drop) if holds else (CENTRE_X - 9.5, 63.0 + drop)
        holding = (CENTRE_X - 22.0, 44.0 + drop) if holding_up else lowered
        free = (CENTRE_X - 23.5, 33.0 + drop) if free_up else (CENTRE_X - 6.0, 64.5 + drop)
        return holding, free
    lowered = (CENTRE_X + 16.5, 60.0 + drop) if holds else (CENTRE_X + 14.5, 64.5 + drop)
    holding = (CENTRE_X + 23.0, 38.0 + drop) if holding_up else lowered
    free = (CENTRE_X - 23.0, 38.0 + drop) if free_up else (CENTRE_X - 14.5, 64.5 + drop)
    return holding, free
