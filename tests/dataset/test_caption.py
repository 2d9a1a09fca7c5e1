"""Captions of a step: the order of the pipeline, and the traps that must stay shut."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorabake.base.units import Duration, Epochs, Stretch
from lorabake.dataset.caption import (
    CaptionConfig,
    Moment,
    caption_for_step,
    count_captions,
    full_caption,
    full_captions,
    idle_settings,
    is_static,
    replaced,
    unfit_captions,
    unfit_lengths,
    warmup_steps,
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


# --- lines, choices, warm-up, secondary separators ---

every_option = st.builds(
    CaptionConfig,
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 3),
    secondary_separator=st.sampled_from([None, ";;", ";"]),
    wildcards=st.booleans(),
    token_warmup=st.sampled_from([None, Duration(7, "steps")]),
    token_warmup_min=st.integers(0, 3),
    tag_dropout=st.sampled_from([0.0, 0.5]),
    prefix=st.sampled_from(["", "p,", "{p|q},"]),
    suffix=st.sampled_from(["", ", s", "|||s"]),
)
moments = st.builds(lambda step: Moment(step, 1 + step // 3, 7), st.integers(0, 20))
tag_lists = st.lists(st.sampled_from(["a", "b c", "d", "e;;f", "g;h", "{i|j}", "k"]), max_size=7)
captions = st.builds(
    lambda groups: "|||".join(", ".join(tags) for tags in groups), st.lists(tag_lists, min_size=1, max_size=4)
)


@given(text=captions, config=every_option, moment=moments, seed=st.integers(0, 2**32))
def test_no_separator_is_left_and_every_tag_comes_from_the_caption(
    text: str, config: CaptionConfig, moment: Moment, seed: int
) -> None:
    shown = caption_for_step(text, config, random.Random(seed), moment)
    assert "|||" not in shown
    assert config.secondary_separator is None or config.secondary_separator not in shown
    known = Counter(tag.strip() for one in full_captions(text, config) for tag in one.split(","))
    assert set(filter(None, map(str.strip, shown.split(",")))) <= set(known)


@given(tags=st.permutations(list("abcdefg")), config=every_option, moment=moments, seed=st.integers(0, 2**32))
def test_fixed_tags_never_move(tags: list[str], config: CaptionConfig, moment: Moment, seed: int) -> None:
    config = config.model_copy(update={"prefix": "", "suffix": ""})
    shown = caption_for_step(", ".join(tags), config, random.Random(seed), moment)
    assert shown.split(", ")[: config.keep_tokens] == tags[: config.keep_tokens] or not config.keep_tokens
    parted = f"{tags[0]}, {tags[1]} ||| {', '.join(tags[2:5])} ||| {tags[5]} ||| {tags[6]}"
    shown = caption_for_step(parted, config, random.Random(seed), moment)
    assert shown.split(", ")[:2] == tags[:2] and shown.split(", ")[-2:] == tags[5:]


@given(text=captions, config=every_option, moment=moments, seed=st.integers(0, 2**32))
def test_each_option_draws_from_its_own_stream(text: str, config: CaptionConfig, moment: Moment, seed: int) -> None:
    """Turning an option off gives the same caption, only without what the option does."""

    def tags(**changes: object) -> list[str]:
        changed = config.model_copy(update={"secondary_separator": None, **changes})
        shown = caption_for_step(text, changed, random.Random(seed), moment)
        return [tag.strip() for tag in shown.split(",") if tag.strip()]

    on = tags(shuffle=True, tag_dropout=0.5, token_warmup=Duration(7, "steps"))
    assert Counter(on) == Counter(tags(shuffle=False, tag_dropout=0.5, token_warmup=Duration(7, "steps")))
    for fewer in ({"tag_dropout": 0.0}, {"token_warmup": None}):
        more = iter(tags(**{"shuffle": True, "tag_dropout": 0.5, "token_warmup": Duration(7, "steps"), **fewer}))
        assert all(tag in more for tag in on)  # a subsequence: nothing else moved


@given(config=every_option, epoch=st.integers(1, 30), every=st.integers(2, 9), seed=st.integers(0, 99))
def test_every_nth_epoch_is_without_captions(config: CaptionConfig, epoch: int, every: int, seed: int) -> None:
    dropping = config.model_copy(update={"caption_dropout_every_n_epochs": every})
    shown = caption_for_step(TEXT, dropping, random.Random(seed), Moment(99, epoch, 7))
    expected = caption_for_step(TEXT, config, random.Random(seed), Moment(99, epoch, 7))
    assert shown == ("" if epoch % every == 0 else expected)


def test_tags_come_in_one_after_the_other() -> None:
    config = CaptionConfig(token_warmup=Duration(8, "steps"), token_warmup_min=1, keep_tokens=1)
    shown = [caption_for_step(TEXT, config, random.Random(0), Moment(step, 1, 8)) for step in range(10)]
    # kohya: floor(step * (flexible - min) / N) + min of the four flexible tags
    assert [len(text.split(", ")) - 1 for text in shown] == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert all(TEXT.startswith(text) for text in shown)
    assert caption_for_step(TEXT, config, random.Random(0)) == TEXT


def test_a_warm_up_of_more_tags_than_there_are() -> None:
    config = CaptionConfig(token_warmup=Duration(8, "steps"), token_warmup_min=50)
    assert caption_for_step(TEXT, config, random.Random(0), Moment(0, 1, 8)) == TEXT


@pytest.mark.parametrize(
    ("given_", "steps"),
    [(None, 0), ("500 steps", 500), ("2 epochs", 24), (0.1, 100), (1, 1000), ("1 step", 1), ("10 %", 100)],
)
def test_the_warm_up_in_steps(given_: object, steps: int) -> None:
    config = CaptionConfig.model_validate({"token_warmup": given_})
    assert warmup_steps(config, steps_per_epoch=12, total_steps=1000) == steps


def test_tags_of_a_secondary_separator_stay_together() -> None:
    config = CaptionConfig(shuffle=True, secondary_separator=";;;", keep_tokens=1)
    results = {step("suzu, red;;;hat ;;; ribbon, smile", config, seed) for seed in range(50)}
    assert results == {"suzu, red, hat, ribbon, smile", "suzu, smile, red, hat, ribbon"}
    assert step("a b;;;c ,d", CaptionConfig(secondary_separator=";;;")) == "a b, c, d"
    dropped = {step("red;;;hat", CaptionConfig(tag_dropout=0.5, secondary_separator=";;;"), seed) for seed in range(50)}
    assert dropped == {"", "red, hat"}


def test_one_line_is_drawn_and_prefix_and_suffix_stand_around_it() -> None:
    config = CaptionConfig(wildcards=True, prefix="suzu,", suffix=", best")
    counts = Counter(step("a cat\n\na {red|blue} dog", config, seed) for seed in range(2000))
    assert set(counts) == {"suzu, a cat , best", "suzu, a red dog , best", "suzu, a blue dog , best"}
    assert 900 < counts["suzu, a cat , best"] < 1100


def test_without_wildcards_braces_are_letters() -> None:
    assert step("{red|blue} {{hat}}", CaptionConfig()) == "{red|blue} {{hat}}"


def test_full_captions_of_wildcards() -> None:
    config = CaptionConfig(wildcards=True, shuffle=True, prefix="p,")
    assert full_captions("{a|b b}\nc", config) == ["p, b b", "p, a", "p, c"]
    assert count_captions("{a|b b}\nc", config) == 3
    many = ", ".join(["{a|b|c d}"] * 9)
    assert full_caption(many, config) == ", ".join(["p", *["c d"] * 9])
    assert len(full_captions(many, config)) == 64 and count_captions(many, config) == 3**9


@given(text=captions, config=every_option, seed=st.integers(0, 99))
def test_static_means_that_captions_do_not_change(text: str, config: CaptionConfig, seed: int) -> None:
    if is_static(config):
        assert step(text, config, seed) == step(text, config, seed + 1) == full_caption(text, config)
    assert is_static(config) == (config.model_copy(update={"keep_tokens": 0}) == config.model_copy(
        update={"keep_tokens": 0, "shuffle": False, "tag_dropout": 0.0, "wildcards": False, "token_warmup": None}
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("given_", "what"),
    [
        ({"secondary_separator": "|;"}, "must not share a character"),
        ({"secondary_separator": " "}, "only space"),
        ({"secondary_separator": "{{", "wildcards": True}, "holds braces"),
        ({"caption_dropout_every_n_epochs": 1}, "Say caption_dropout = 1"),
        ({"caption_dropout_every_n_epochs": -1}, "greater than or equal"),
        ({"token_warmup": 0}, "is no length"),
        ({"token_warmup": 1.5}, "is not a share of the run: it must be from 0 to 1"),
        ({"token_warmup": True}, "no part of a run.*or a number of epochs"),
        ({"token_warmup": "0 steps"}, "is no length"),
        ({"token_warmup": "0 epochs"}, "at least 1"),
        ({"token_warmup_min": -1}, "greater than or equal"),
    ],
)
def test_what_cannot_be_is_refused(given_: dict, what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        CaptionConfig(**given_)


def test_more_idle_settings() -> None:
    (told,) = idle_settings(CaptionConfig(token_warmup_min=3))
    assert told == "token_warmup_min = 3 does nothing without token_warmup."
    assert not idle_settings(CaptionConfig(keep_tokens=1, token_warmup=Duration(3, "steps"), token_warmup_min=3))
    told = idle_settings(CaptionConfig(caption_dropout=1, shuffle=True, prefix="a"))
    assert [text.split()[0] for text in told] == ["shuffle", "prefix"]


@pytest.mark.parametrize(
    ("texts", "config", "expected"),
    [
        (["a", "b"], CaptionConfig(wildcards=True), "wildcards does nothing"),
        (["a\nb", "b"], CaptionConfig(wildcards=True), None),
        (["a"], CaptionConfig(wildcards=True, prefix="{a|b}"), None),
        (["{a|b", "{a|b}"], CaptionConfig(wildcards=True), "wildcards: 1 of 2 captions have braces that are no pair"),
        (
            ["{a|b}", "c"],
            CaptionConfig(),
            "1 of 2 captions have choices such as {red|blue}, and are trained as written",
        ),
        (["a ^_^ {c}"], CaptionConfig(), None),
        (["a;b"], CaptionConfig(secondary_separator=";;;"), "secondary_separator does nothing: no caption holds ';;;'"),
        (["a;;;b"], CaptionConfig(secondary_separator=";;;"), None),
        (["{a|b}"], CaptionConfig(caption_dropout=1), None),
    ],
)
def test_what_does_not_go_with_the_captions(texts: list[str], config: CaptionConfig, expected: str | None) -> None:
    told = list(unfit_captions(texts, config))
    assert len(told) == (expected is not None)
    assert all(text.startswith(expected or "") for text in told)


def test_what_does_not_go_with_the_length() -> None:
    told = list(unfit_lengths(CaptionConfig(caption_dropout_every_n_epochs=5, token_warmup=Epochs(3)), 10, 30))
    assert told == [
        "caption_dropout_every_n_epochs = 5 does nothing: the run has 3 epochs.",
        "token_warmup lasts 30 steps and the run 30: it ends before all tags are shown.",
    ]
    assert not list(unfit_lengths(CaptionConfig(caption_dropout_every_n_epochs=3, token_warmup=Stretch(0.5)), 10, 30))


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
