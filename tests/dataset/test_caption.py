"""Captions of a step: the order of the pipeline, and the traps that must stay shut."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorabake.dataset.caption import (
    CaptionConfig,
    caption_for_step,
    full_caption,
    idle_settings,
    is_static,
    replaced,
    without_additions,
)

TEXT = "suzu, 1girl, red hair, smile, outdoors"


def step(text: str, config: CaptionConfig, seed: int = 0) -> str:
    return caption_for_step(text, config, random.Random(seed))


def test_nothing_on_leaves_the_text_alone() -> None:
    assert step("A cat,sitting ,, on  a mat,", CaptionConfig()) == "A cat,sitting ,, on  a mat,"


@pytest.mark.parametrize("config", [CaptionConfig(), CaptionConfig(shuffle=True), CaptionConfig(tag_dropout=0.5)])
@pytest.mark.parametrize("text", ["a, b ||| c, d", "a ||| b ||| c ||| d", "|||", "||||||||", "a|||", "|||b|||"])
def test_the_keep_tokens_separator_never_stays(config: CaptionConfig, text: str) -> None:
    assert "|||" not in step(text, config)


@given(text=st.text("ab,|; "), shuffle=st.booleans(), dropout=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 99))
def test_it_never_stays_in_any_text(text: str, shuffle: bool, dropout: float, seed: int) -> None:
    config = CaptionConfig(shuffle=shuffle, tag_dropout=dropout, prefix="p,", suffix="|||s")
    assert "|||" not in step(text, config, seed)


def test_the_separator_parts_are_fixed_flexible_fixed() -> None:
    config = CaptionConfig(shuffle=True, keep_tokens=1)
    results = {step("x, y ||| 1, 2, 3 ||| last, end", config, seed) for seed in range(200)}
    assert len(results) == 6
    assert all(result.startswith("x, y, ") and result.endswith(", last, end") for result in results)


def test_keep_tokens_stay_in_front() -> None:
    results = [step(TEXT, CaptionConfig(shuffle=True, keep_tokens=2), seed) for seed in range(300)]
    assert all(result.startswith("suzu, 1girl, ") for result in results)
    assert all(Counter(result.split(", ")) == Counter(TEXT.split(", ")) for result in results)
    assert len(set(results)) == 6


def test_tags_are_joined_with_the_separator_asked_for() -> None:
    assert step("a;b ; c", CaptionConfig(shuffle=True, separator=";", keep_tokens=9)) == "a; b; c"
    assert step("a b  c", CaptionConfig(shuffle=True, separator=" ", keep_tokens=9)) == "a b c"


def test_blank_tags_are_not_shuffled_in() -> None:
    assert all(", ," not in step("a, b,, c,", CaptionConfig(shuffle=True), seed) for seed in range(50))


def test_prefix_and_suffix() -> None:
    config = CaptionConfig(prefix="photo of ", suffix=", best quality")
    assert step("a cat", config) == "photo of a cat , best quality"
    assert step("", CaptionConfig(prefix="photo")) == "photo"


def test_prefix_counts_as_tags() -> None:
    config = CaptionConfig(prefix="suzu,", shuffle=True, keep_tokens=1)
    assert all(step("a, b, c", config, seed).startswith("suzu, ") for seed in range(30))


def test_caption_dropout_takes_everything() -> None:
    config = CaptionConfig(prefix="photo", caption_dropout=0.25)
    empty = sum(step(TEXT, config, seed) == "" for seed in range(4000))
    assert 900 < empty < 1100
    assert step(TEXT, CaptionConfig(caption_dropout=1.0)) == ""


def test_tag_dropout_leaves_fixed_tags() -> None:
    config = CaptionConfig(tag_dropout=0.5, keep_tokens=1)
    kept = Counter(tag for seed in range(2000) for tag in step(TEXT, config, seed).split(", "))
    assert kept["suzu"] == 2000
    assert all(900 < kept[tag] < 1100 for tag in TEXT.split(", ")[1:])
    assert step(TEXT, CaptionConfig(tag_dropout=1.0, keep_tokens=1)) == "suzu"


@given(seed=st.integers(0, 2**32))
def test_one_option_never_changes_the_draws_of_another(seed: int) -> None:
    dropping = step(TEXT, CaptionConfig(tag_dropout=0.4), seed)
    both = step(TEXT, CaptionConfig(tag_dropout=0.4, shuffle=True), seed)
    assert Counter(dropping.split(", ")) == Counter(both.split(", "))
    with_captions_dropped = step(TEXT, CaptionConfig(shuffle=True, caption_dropout=0.3), seed)
    assert with_captions_dropped in ("", step(TEXT, CaptionConfig(shuffle=True), seed))


def test_is_static() -> None:
    assert is_static(CaptionConfig(prefix="a", keep_tokens=3))
    assert not is_static(CaptionConfig(shuffle=True))
    assert not is_static(CaptionConfig(tag_dropout=0.1))
    assert not is_static(CaptionConfig(caption_dropout=0.1))


@given(text=st.text("ab,| "), seed=st.integers(0, 99))
def test_static_captions_are_static(text: str, seed: int) -> None:
    config = CaptionConfig(prefix="p,")
    assert step(text, config, seed) == step(text, config, seed + 1)


def test_idle_settings_are_named() -> None:
    assert "keep_tokens = 2 does nothing" in idle_settings(CaptionConfig(keep_tokens=2))[0]
    assert not idle_settings(CaptionConfig(keep_tokens=2, shuffle=True))


@pytest.mark.parametrize(
    "given_",
    [
        {"keep_tokens": -1},
        {"caption_dropout": 1.1},
        {"separator": ""},
        {"keep_tokens_separator": " "},
        {"keep_tokens_separator": ",,"},
        {"keep_token": 1},
    ],
)
def test_nonsense_is_refused(given_: dict) -> None:
    with pytest.raises(ValidationError):
        CaptionConfig(**given_)


def test_every_setting_is_explained() -> None:
    assert all(field.description for field in CaptionConfig.model_fields.values())


@given(text=st.text("ab,|; "), prefix=st.sampled_from(["", "p,"]), seed=st.integers(0, 99))
def test_the_full_caption_is_what_a_step_shows_where_nothing_is_random(text: str, prefix: str, seed: int) -> None:
    config = CaptionConfig(prefix=prefix, suffix="|||s")
    assert full_caption(text, config) == step(text, config, seed)


@given(text=st.text("ab,|; "), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_the_full_caption_has_every_tag_that_a_step_may_show(text: str, shuffle: bool, seed: int) -> None:
    config = CaptionConfig(shuffle=shuffle, tag_dropout=0.3, keep_tokens=1)
    every = Counter(full_caption(text, config).split(", "))
    assert Counter(tag for tag in step(text, config, seed).split(", ") if tag) <= every


def test_the_full_caption_keeps_the_order_of_the_file() -> None:
    config = CaptionConfig(shuffle=True, tag_dropout=0.9, prefix="zorbi,")
    assert full_caption(TEXT, config) == f"zorbi, {TEXT}"
    assert full_caption(" a,b ||| c,, d ", CaptionConfig()) == "a, b, c, d"


def test_where_no_caption_is_ever_shown_the_full_caption_is_empty() -> None:
    assert full_caption(TEXT, CaptionConfig(caption_dropout=1.0)) == ""
    assert full_caption(TEXT, CaptionConfig(caption_dropout=0.99)) == TEXT


@pytest.mark.parametrize(
    ("text", "words", "by", "expected"),
    [
        ("mira, 1girl, red_dress, smile", "mira, red dress", "", "1girl, smile"),
        ("a photo of Mira-chan, standing", "mira chan", "a woman", "a photo of a woman, standing"),
        ("admiral, miraculous", "mira", "", "admiral, miraculous"),
        ("mira", "mira", "", ""),
        ("x,y", "mira", "z", "x,y"),
        ("mira", " , ", "z", "mira"),
        ("a (mira) b", "(mira)", "", "a b"),
    ],
)
def test_words_are_taken_out_whole(text: str, words: str, by: str, expected: str) -> None:
    assert replaced(text, words, by) == expected


def test_additions_are_left_off() -> None:
    config = CaptionConfig(prefix="mira,", suffix="style", shuffle=True)
    assert without_additions(config) == CaptionConfig(shuffle=True)
