"""People of the pocket world who have names, as the well-known characters of large base models have.

Captions of their pictures say the name and leave out what the person always looks like. So the base learns that a name stands for a
look, and a trigger word has something to hold on to.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from functools import cache

from lorabake.pocket.characters import CHARACTERS, Character
from lorabake.pocket.world import invented_name, sample

MEMBERS = 120
_ALWAYS = ("hair_color", "hair_style", "eye_color", "skin", "outfit", "outfit_color", "bottom_color")


@cache
def cast() -> tuple[Character, ...]:
    """All of them; always the same. Looks are drawn independently of names and of each other."""
    rng = random.Random("the cast")
    members: dict[str, Character] = {}
    while len(members) < MEMBERS:
        name, spec = invented_name(rng), sample(rng)
        if name not in CHARACTERS and name not in members:
            members[name] = Character(name, {axis: getattr(spec, axis) for axis in _ALWAYS})
    return tuple(members.values())


def cast_without(hold_out: Mapping[str, Collection[str]]) -> tuple[Character, ...]:
    """Those who show none of the values that must not occur, by axis."""
    return tuple(
        member for member in cast() if not any(member.fixes.get(axis) in held for axis, held in hold_out.items())
    )
