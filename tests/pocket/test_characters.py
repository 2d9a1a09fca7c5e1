"""Held-out characters, garments, objects and styles: drawable, visible, and outside what is sampled."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from lorabake.pocket.characters import CHARACTERS, Character, horns, split_hair
from lorabake.pocket.world import Spec, axes, draw, sample
from lorabake.pocket.world.canvas import Canvas
from lorabake.pocket.world.figure import Figure


@pytest.mark.parametrize("name", sorted(CHARACTERS))
def test_every_feature_is_seen_often_and_changes_the_picture(name: str) -> None:
    character = CHARACTERS[name]
    rng = random.Random(4)
    seen = dict.fromkeys(character.features, 0)
    for seed in range(60):
        drawing = draw(character.spec(rng, view="front", style="flat color"), seed)
        for extra in character.extras:
            if not drawing.features[extra.feature]:
                assert extra.feature not in drawing.tags
                continue
            assert extra.feature in drawing.tags
            seen[extra.feature] += 1
            others = tuple(other for other in character.extras if other is not extra)
            without = draw(dataclasses.replace(drawing.spec, extras=others), seed)
            difference = np.asarray(drawing.image).astype(int) - np.asarray(without.image)
            assert (np.abs(difference).max(-1) > 20).sum() >= 3
    assert all(count >= 18 for count in seen.values()), seen


def _paint_nothing(canvas: Canvas, figure: Figure, part: int) -> None:
    pass


@pytest.mark.parametrize("framing", axes["framing"])
def test_the_star_is_never_cut_off(framing: str) -> None:
    """The star does not reach the uppermost row of the picture."""
    rng = random.Random(7)
    for seed in range(40):
        spec = CHARACTERS["zorbi"].spec(rng, framing=framing, style="flat color")
        drawing = draw(spec, seed)
        assert drawing.features["star antenna"]
        unseen = (
            dataclasses.replace(e, paint=_paint_nothing) if e.feature == "star antenna" else e for e in spec.extras
        )
        bare = draw(dataclasses.replace(spec, extras=tuple(unseen)), seed)
        np.testing.assert_array_equal(np.asarray(drawing.image)[0], np.asarray(bare.image)[0])


def test_a_character_keeps_what_is_fixed_and_varies_the_rest() -> None:
    rng = random.Random(0)
    specs = [CHARACTERS["zorbi"].spec(rng) for _ in range(60)]
    assert {spec.hair_color for spec in specs} == {"pink"}
    assert {spec.background for spec in specs} == set(axes["background"])
    assert CHARACTERS["zorbi"].spec(rng, hair_color="blue").hair_color == "blue"


def test_own_tags_are_what_pruning_takes_away() -> None:
    character = CHARACTERS["zorbi"]
    drawing = draw(character.spec(random.Random(0), view="front", framing="full body", style="flat color"), 0)
    own = character.own_tags()
    assert {"pink hair", "twintails", "long dress", "black dress", "split hair"} <= own
    left = [tag for tag in drawing.tags if tag not in own]
    assert "full body" in left and "1girl" in left
    assert not any("hair" in tag or "dress" in tag for tag in left)
    assert {"cat ears", "dark skin", "red shirt", "shirt", "black pants"} <= CHARACTERS["dunvik"].own_tags()


def test_a_dye_of_the_same_colour_is_no_feature() -> None:
    spec = Spec(hair_color="green", extras=(split_hair("green"),))
    assert draw(spec, 0).features == {"split hair": None}


def test_a_new_character_takes_a_few_lines() -> None:
    nobody = Character("nobody", {"hair_color": "white"}, (horns(),))
    assert draw(nobody.spec(random.Random(1), view="front", framing="portrait", headgear="none"), 1).features["horns"]


@pytest.mark.parametrize(
    ("axis", "value", "tag"),
    [
        ("outfit", "poncho", "red poncho"),
        ("object", "lollipop", "holding lollipop"),
        ("style", "dusk print", "dusk print"),
    ],
)
def test_held_out_values_are_drawn_on_request_only(axis: str, value: str, tag: str) -> None:
    rng = random.Random(2)
    assert value not in {getattr(sample(rng), axis) for _ in range(300)}
    drawing = draw(dataclasses.replace(Spec(), **{axis: value}), 0)
    assert drawing.labels[axis] is None
    if axis != "style":
        assert tag in drawing.tags
    assert (np.asarray(drawing.image) != np.asarray(draw(Spec(), 0).image)).any()
