"""What the text encoders see of captions, told before a run and without weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems
from lorabake.base.places import POCKET_MODEL
from lorabake.dataset.caption import CaptionConfig
from lorabake.protocols.family import Part, Reading
from lorabake.recipe import Checked, check, check_values
from lorabake.recipe.seen import SeenCaption, token_warnings
from lorabake.recipe.toml import to_toml

Look = Callable[..., Checked]


@pytest.fixture
def look(dataset: Path) -> Look:
    """Checks a recipe about four pictures whose captions have so many tokens; settings by section."""

    def check(*tokens: int, **sections: dict[str, Any]) -> Checked:
        for path, count in zip(sorted(dataset.rglob("*.txt")), tokens, strict=False):
            path.write_text(("hair, " * (count // 2) + "hair " * (count % 2)).strip())
        data = {"folder": str(dataset), **sections.pop("data", {})}
        return check_values({"data": data, **sections})

    return check


def warnings_of(checked: Checked) -> list[str]:
    return [warning for warning in checked.warnings if "tokens" in warning]


def test_captions_that_fit_are_not_mentioned(look: Look) -> None:
    checked = look(75, 1, 30, 74)
    assert warnings_of(checked) == []
    assert [caption.tokens for caption in checked.captions] == [75, 1, 30, 74]
    assert [caption.picture for caption in checked.captions] == [sample.name for sample in checked.dataset.samples]
    assert not any(caption.is_cut for caption in checked.captions)


def test_cut_captions_are_told_once_with_their_number_and_what_to_do(look: Look) -> None:
    (told,) = warnings_of(look(76, 10, 140, 75))
    assert told == (
        "data.captions: 2 of 4 captions have more than the 75 tokens that the text encoder reads; what comes after is cut off. "
        "The longest has 140 (2_mira/002.png). model.max_tokens = 150 takes them all. "
        "`lorabake validate RECIPE --captions` shows what is cut."
    )


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "expected"),
    [
        ((80, 1, 1, 1), 75, "1 of 4 captions has more than the 75 tokens"),
        ((80, 1, 1, 1), 75, "model.max_tokens = 150 takes it."),
        ((80, 200, 1, 1), 75, "model.max_tokens = 225 takes them all."),
        ((80, 200, 1, 1), 150, "1 of 4 captions has more than the 150 tokens"),
        ((80, 300, 226, 1), 75, "model.max_tokens goes up to 225, which cuts 2: shorten them."),
        ((80, 300, 1, 1), 225, "model.max_tokens goes up to 225, which cuts 1: shorten it."),
        (
            (80, 20, 1, 1),
            225,
            "225 is more than any caption needs: the longest has 80 tokens (2_mira/000.png). 150 does",
        ),
        ((75, 20, 1, 1), 150, "model.max_tokens: 150 is more than any caption needs"),
    ],
)
def test_what_is_said(look: Look, tokens: tuple[int, ...], max_tokens: int, expected: str) -> None:
    (told,) = warnings_of(look(*tokens, model={"max_tokens": max_tokens}))
    assert expected in told


def test_room_that_is_needed_is_not_mentioned(look: Look) -> None:
    assert warnings_of(look(150, 20, 1, 1, model={"max_tokens": 150})) == []
    assert warnings_of(look(151, 20, 1, 1, model={"max_tokens": 225})) == []


def test_shuffled_captions_lose_other_tags_each_time(look: Look) -> None:
    (told,) = warnings_of(look(80, 1, 1, 1, data={"captions": {"shuffle": True}}))
    assert "other tags at every step" in told


def test_the_text_is_the_one_that_training_shows(look: Look, dataset: Path) -> None:
    first = sorted(dataset.rglob("*.txt"))[0]
    first.write_text("smile||| blue hair ,, hat ||| night")
    captions = {"prefix": "zorbi,", "suffix": "beach", "shuffle": True}
    (seen, *_) = look(data={"captions": captions}).captions
    assert seen.text == "zorbi, smile, blue hair, hat, night beach"
    assert seen.readings["text_encoder"].kept == seen.text


def test_what_is_kept_and_lost(look: Look) -> None:
    seen = look(153, 1, 1, 1, model={"max_tokens": 150}).captions[0]
    reading = seen.readings["text_encoder"]
    assert (reading.tokens, reading.room, reading.windows) == (153, 150, 2)
    assert reading.lost == "hair, hair" and reading.kept == ("hair, " * 75).strip()


def test_of_wildcards_the_longest_caption_counts(look: Look, dataset: Path) -> None:
    first = sorted(dataset.rglob("*.txt"))[0]
    first.write_text(f"a hat\nred {{hat|{', '.join(['hair'] * 50)}}}\n")
    (seen, *_) = (checked := look(data={"captions": {"wildcards": True}})).captions
    assert (seen.tokens, seen.variants, seen.is_cut) == (1 + 99, 3, True)
    assert seen.text.startswith("red hair, hair")
    assert "The longest has 100" in warnings_of(checked)[0]
    (seen, *_) = look().captions
    assert (seen.text, seen.variants) == ("a hat", 1)


def test_idle_and_unfit_caption_settings_are_told(look: Look) -> None:
    captions = {
        "wildcards": True,
        "secondary_separator": ";;;",
        "token_warmup_min": 2,
        "caption_dropout_every_n_epochs": 99,
    }
    told = [text for text in look(1, data={"captions": captions}).warnings if text.startswith("data.captions")]
    assert [text.split("does nothing")[0].split(":")[-1].split(".")[-1].split()[0] for text in told] == [
        "token_warmup_min", "wildcards", "secondary_separator", "caption_dropout_every_n_epochs"
    ]  # fmt: skip


@pytest.mark.parametrize("given", ["abc", 2, 0, "0 steps", "0 epochs", True])
def test_a_wrong_warm_up_is_one_problem(look: Look, given: Any) -> None:
    with pytest.raises(Problems) as caught:
        look(1, data={"captions": {"token_warmup": given}})
    assert [problem.where for problem in caught.value.problems] == ["data.captions.token_warmup"]


@pytest.mark.parametrize("given", ["2 epochs", "1 step", 0.25, "25 %", 1])
def test_the_warm_up_survives_the_frozen_recipe(look: Look, given: Any, tmp_path: Path) -> None:
    checked = look(1, data={"captions": {"token_warmup": given, "secondary_separator": ";;;"}})
    frozen = tmp_path / "frozen.toml"
    frozen.write_text(to_toml(checked.recipe), encoding="utf-8")
    assert check(frozen).recipe == checked.recipe


def test_without_any_captions_nothing_is_cut(look: Look) -> None:
    checked = look(80, data={"captions": {"caption_dropout": 1.0}})
    assert {caption.text for caption in checked.captions} == {""} and warnings_of(checked) == []


def test_a_model_whose_tokenizer_is_broken_is_refused_before_anything_starts(look: Look, tmp_path: Path) -> None:
    shutil.copytree(POCKET_MODEL, tmp_path / "base")
    (tmp_path / "base" / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(Problems) as caught:
        look(1, model={"base": str(tmp_path / "base")})
    assert [problem.where for problem in caught.value.problems] == ["model.base"]
    assert "vocab.json" in str(caught.value)


def test_no_weights_are_read(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", None)
    assert look(76).captions[0].is_cut


@pytest.mark.parametrize("value", [0, 77, 100, 300, "75", True])
def test_other_lengths_are_refused(look: Look, value: Any) -> None:
    with pytest.raises(Problems) as caught:
        look(1, model={"max_tokens": value})
    assert {problem.where for problem in caught.value.problems} == {"model.max_tokens"}


# ---- several text encoders, and models that have no such setting


def seen(**tokens: tuple[int, int]) -> SeenCaption:
    parts: list[Part] = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    readings: dict[Part, Reading] = {
        part: Reading(tokens[part][0], tokens[part][1], 1, "kept", "") for part in parts if part in tokens
    }
    return SeenCaption("a.png", "kept", readings)


def test_the_text_encoder_that_sees_least_counts() -> None:
    caption = seen(text_encoder=(80, 75), text_encoder_2=(90, 512))
    assert caption.tokens == 90 and caption.is_cut
    (told,) = token_warnings([caption], {}, CaptionConfig())
    assert "more than the 75 tokens" in told and "Shorten it." in told and "max_tokens" not in told


def test_models_without_the_setting_are_not_told_to_lower_it() -> None:
    assert list(token_warnings([seen(text_encoder=(8, 512))], {}, CaptionConfig())) == []
    assert list(token_warnings([], {"max_tokens": 225}, CaptionConfig())) == []


@pytest.mark.parametrize(
    ("readings", "t5_tokens", "remedy"),
    [
        ({"text_encoder_2": (300, 255)}, 256, "model.t5_tokens = 301 takes it."),
        ({"text_encoder_2": (511, 255)}, 256, "model.t5_tokens = 512 takes it."),
        ({"text_encoder_2": (512, 255)}, 256, "Shorten it."),
        ({"text_encoder": (80, 75), "text_encoder_2": (300, 255)}, 256, "Shorten it."),
        ({"text_encoder": (80, 75), "text_encoder_3": (90, 255)}, 256, "T5 reads it whole; only CLIP does not."),
    ],
)
def test_t5s_room_is_raised_where_that_helps(readings: dict, t5_tokens: int, remedy: str) -> None:
    (told,) = token_warnings([seen(**readings)], {"t5_tokens": t5_tokens}, CaptionConfig())
    assert f" {remedy} `lorabake validate" in told


def test_models_without_t5_are_not_told_how_much_it_reads(look: Look) -> None:
    with pytest.raises(Problems) as caught:
        look(1, model={"t5_tokens": 100})
    (problem,) = caught.value.problems
    assert problem.where == "model.t5_tokens"
    assert "has no T5 text encoder (its family is 'sd')" in problem.what


@pytest.mark.parametrize("value", [0, 513, "many", True])
def test_lengths_that_t5_cannot_read_are_refused(look: Look, value: Any) -> None:
    with pytest.raises(Problems) as caught:
        look(1, model={"t5_tokens": value})
    assert {problem.where for problem in caught.value.problems} == {"model.t5_tokens"}
