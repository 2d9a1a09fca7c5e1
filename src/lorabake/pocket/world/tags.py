"""Tags: what a picture is called, and what a prompt asks for."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from typing import Any

from lorabake.base.errors import UserError, nearest
from lorabake.pocket.world.accessories import HEADGEAR, OBJECTS
from lorabake.pocket.world.garments import OUTFITS
from lorabake.pocket.world.spec import Spec, axes, sample
from lorabake.pocket.world.styles import STYLES

SUBJECT = "1girl"
_DRESSES = ("short dress", "long dress")


def tags_of(spec: Spec, told: Collection[str], features: Sequence[str] = ()) -> list[str]:
    """The tags of a picture in a fixed order: one for everything in `told` that is worth a word.

    What is usual and merely absent (no hat, no glasses, empty hands, light skin, seen from the front) gets no tag.
    `features` are the names of the visible extras.
    """
    named = [SUBJECT]
    if "hair_color" in told:
        named.append(f"{spec.hair_color} hair")
    if "hair_style" in told:
        named.append(spec.hair_style)
    if "eye_color" in told:
        named.append(f"{spec.eye_color} eyes")
    if "skin" in told and spec.skin == "dark":
        named.append("dark skin")
    for axis in ("expression", "glasses"):
        if axis in told and getattr(spec, axis) != "none":
            named.append(getattr(spec, axis))
    named += _clothes(spec, told)
    if "object" in told and spec.object != "none":
        named.append(f"holding {spec.object}")
    if "pose" in told:
        named.append(spec.pose)
    if spec.view != "front":
        named.append(spec.view)
    named.append(spec.framing)
    named += [getattr(spec, axis) for axis in ("background", "style") if axis in told]
    return named + list(features)


def _clothes(spec: Spec, told: Collection[str]) -> list[str]:
    named: list[str] = []
    outfit = OUTFITS[spec.outfit]
    if "garment" in told:
        coloured = outfit.coloured and "outfit_color" in told
        named.append(_coloured(outfit.garment, spec.outfit_color if coloured else None))
    if "outfit" in told and spec.outfit in _DRESSES:
        named.append(spec.outfit)
    if "outfit" in told and outfit.bottom:
        named.append(_coloured(outfit.bottom, spec.bottom_color if "bottom_color" in told else None))
    if "scarf" in told and spec.scarf != "none":
        named.append(_coloured("scarf", spec.scarf_color if "scarf_color" in told else None))
    if "headgear" in told and spec.headgear != "none":
        coloured = HEADGEAR[spec.headgear].coloured and "headgear_color" in told
        named.append(_coloured(spec.headgear, spec.headgear_color if coloured else None))
    return named


def _coloured(thing: str, colour: str | None) -> str:
    return f"{colour} {thing}" if colour else thing


def _meanings() -> dict[str, dict[str, str]]:
    """Every tag of the world with the values it states, by axis."""
    known: dict[str, dict[str, str]] = {SUBJECT: {}, "dress": {}, "shirt": {}, "dark skin": {"skin": "dark"}}
    for axis in ("hair_style", "expression", "pose", "framing", "background", "style"):
        known.update({value: {axis: value} for value in axes[axis]})
    known.update({view: {"view": view} for view in axes["view"] if view != "front"})
    known.update({f"{colour} hair": {"hair_color": colour} for colour in axes["hair_color"]})
    known.update({f"{colour} eyes": {"eye_color": colour} for colour in axes["eye_color"]})
    known.update({name: {"style": name} for name in STYLES})
    known["glasses"] = {"glasses": "glasses"}
    known["scarf"] = {"scarf": "scarf"}
    known.update({f"holding {thing}": {"object": thing} for thing in OBJECTS})
    known.update({hat: {"headgear": hat} for hat in axes["headgear"] if hat != "none"})
    for outfit in OUTFITS.values():
        if outfit.garment not in ("dress", "shirt"):
            known[outfit.garment] = {"outfit": outfit.name}
        if outfit.bottom:
            known[outfit.bottom] = {"outfit": outfit.name}
    known.update({dress: {"outfit": dress} for dress in _DRESSES})
    return known | _coloured_meanings(known)


def _coloured_meanings(plain: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    known: dict[str, dict[str, str]] = {}
    garments = {outfit.garment for outfit in OUTFITS.values() if outfit.coloured}
    bottoms = {outfit.bottom for outfit in OUTFITS.values() if outfit.bottom}
    for colour in axes["outfit_color"]:
        known.update({f"{colour} {word}": {**plain[word], "outfit_color": colour} for word in garments})
        known.update({f"{colour} {word}": {**plain[word], "bottom_color": colour} for word in bottoms})
        known[f"{colour} scarf"] = {"scarf": "scarf", "scarf_color": colour}
        for hat in (name for name, headgear in HEADGEAR.items() if headgear.coloured):
            known[f"{colour} {hat}"] = {"headgear": hat, "headgear_color": colour}
    return known


def vocabulary() -> tuple[str, ...]:
    """Every tag the world can write or read."""
    return tuple(_meanings())


def read_tags(prompt: str, ignore: Collection[str] = ()) -> dict[str, str]:
    """The values a prompt states, by axis; only what is said, nothing assumed.

    Args:
        prompt: tags separated by commas.
        ignore: words that may occur and mean nothing here, such as the trigger of a trained character.

    Raises:
        UserError: a tag is not known to the world (the message names the nearest one), or two tags contradict.
    """
    stated: dict[str, str] = {}
    meanings = _meanings()
    for tag in (re.sub(r"\s+", " ", piece).strip().lower().replace("_", " ") for piece in prompt.split(",")):
        if not tag or tag in ignore:
            continue
        if tag not in meanings:
            raise UserError(f"The pocket world does not know the tag '{tag}'. {nearest_tag(tag)}")
        for axis, value in meanings[tag].items():
            if stated.get(axis, value) != value:
                raise UserError(f"'{prompt}' asks for both '{stated[axis]}' and '{value}'; keep one of the two tags.")
            stated[axis] = value
    return stated


def nearest_tag(tag: str) -> str:
    """Advice for an unknown tag: the closest known one, or what kinds of tags exist."""
    advice = nearest(tag, vocabulary())
    if advice.startswith("Allowed"):
        return f"Use tags such as: {', '.join(tags_of(Spec(), axes))}."
    return advice


def parse(prompt: str, seed: int | None = None, ignore: Collection[str] = ()) -> Spec:
    """The picture a prompt asks for. What the prompt leaves open is the default, or drawn at random from `seed`.

    Things nobody asked for (hats, glasses, scarves, objects) stay away, unless a `seed` draws the rest; even then
    only unnamed colours, garments, poses and the like vary.

    Raises:
        UserError: see `read_tags`.
    """
    stated: dict[str, Any] = dict(read_tags(prompt, ignore))
    words = [piece.strip().lower() for piece in prompt.split(",")]
    garments = {outfit.garment: outfit.name for outfit in OUTFITS.values()}
    if "outfit" not in stated:
        for word in words:
            garment = garments.get(word.split(" ")[-1])
            if garment:
                stated["outfit"] = _pick_outfit(word.split(" ")[-1], seed)
    if seed is None:
        return Spec(**stated)
    absent = dict.fromkeys(("headgear", "glasses", "scarf", "object"), "none")
    # A style drawn at random might hide stated colours.
    usual = {"view": "front", "skin": "light", "style": "flat color"}
    return sample(random.Random(seed), **{**absent, **usual, **stated})


def _pick_outfit(garment: str, seed: int | None) -> str:
    """An outfit that contains `garment`: the first one, or a random one."""
    names = [name for name in axes["outfit"] if OUTFITS[name].garment == garment]
    return names[0] if seed is None else random.Random(seed).choice(names)


def caption(
    tags: Sequence[str], rng: random.Random, shuffle: bool = True, drop: float = 0.0, name: str | None = None
) -> str:
    """One caption: tags joined by commas, each left out with probability `drop`, `name` (if given) always kept."""
    kept = [tag for tag in tags if rng.random() >= drop]
    if shuffle:
        rng.shuffle(kept)
    if name is not None:
        kept.insert(rng.randint(0, len(kept)) if shuffle else 0, name)
    return ", ".join(kept)


def invented_name(rng: random.Random) -> str:
    """A pronounceable word that means nothing, like a new character's trigger."""
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "s", "x", "k"))
        for _ in range(rng.randint(2, 3))
    )
