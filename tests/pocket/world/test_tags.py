"""Tags: one word list, read back to the same values."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabake.base.errors import UserError
from lorabake.pocket.world import Spec, axes, caption, draw, invented_name, parse, read_tags, sample, vocabulary
from lorabake.pocket.world.tags import tags_of


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_every_tag_is_in_the_vocabulary(seed: int) -> None:
    assert set(draw(sample(random.Random(seed)), seed).tags) <= set(vocabulary())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.none() | st.integers(0, 99))
def test_parsing_a_full_caption_gives_the_picture_back(seed: int, rest: int | None) -> None:
    spec = sample(random.Random(seed))
    told = {*axes, "garment"}
    again = parse(caption(tags_of(spec, told), random.Random(seed)), seed=rest)
    assert tags_of(again, told) == tags_of(spec, told)


def test_parse_leaves_the_rest_to_the_seed() -> None:
    first, second = (parse("1girl, red hair, beach", seed=seed) for seed in (1, 2))
    assert first.hair_color == second.hair_color == "red" and first.background == "beach"
    assert first != second
    assert (first.headgear, first.object, first.view) == ("none", "none", "front")


def test_parse_without_a_seed_uses_defaults() -> None:
    assert parse("1girl, Long_Hair,  beach ,") == Spec(hair_style="long hair", background="beach")


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_a_garment_alone_finds_an_outfit(seed: int | None) -> None:
    spec = parse("1girl, green shirt", seed=seed)
    assert spec.outfit in ("skirt", "pants") and spec.outfit_color == "green"
    assert parse("blue dress, long dress", seed=seed).outfit == "long dress"


def test_unknown_tags_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"does not know the tag 'twintial'\. Did you mean 'twintails'"):
        parse("1girl, twintial")
    with pytest.raises(UserError, match="Use tags such as"):
        parse("1girl, quantum flux")
    assert parse("zorbi, sky", ignore={"zorbi"}).background == "sky"


def test_contradictions_are_refused() -> None:
    with pytest.raises(UserError, match="'sky' and 'beach'"):
        read_tags("sky, beach")


def test_captions_shuffle_drop_and_name() -> None:
    tags = [f"tag {number}" for number in range(200)]
    assert caption(tags, random.Random(0), shuffle=False) == ", ".join(tags)
    assert sorted(caption(tags, random.Random(0)).split(", ")) == sorted(tags)
    assert 120 < len(caption(tags, random.Random(0), drop=0.25).split(", ")) < 180
    assert caption(tags, random.Random(0), shuffle=False, drop=1.0, name="zorbi") == "zorbi"


def test_invented_names_are_words_the_world_does_not_know() -> None:
    names = {invented_name(random.Random(seed)) for seed in range(100)}
    assert len(names) > 90
    assert all(name.isalpha() and 4 <= len(name) <= 9 for name in names)
    assert not names & {word for tag in vocabulary() for word in tag.split(" ")}
