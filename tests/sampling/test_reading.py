"""Prompts are read as captions were in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabake.base.errors import UserError
from lorabake.families import inspect_model
from lorabake.protocols.family import ModelFacts
from lorabake.recipe.prompts import Prompt
from lorabake.sampling import reading
from lorabake.sampling.reading import cut_prompts, text_options

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return inspect_model("pocket")


@pytest.fixture
def lora(tmp_path: Path) -> Write:
    """Writes a LoRA file with such metadata."""

    def write(name: str, **metadata: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata)
        return path

    return write


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {}),
        ({"ss_clip_skip": "None", "ss_max_token_length": "None"}, {}),
        ({"ss_clip_skip": "2", "ss_max_token_length": "None"}, {"clip_skip": 2}),
        ({"ss_clip_skip": "1", "ss_max_token_length": "225"}, {"clip_skip": 1, "max_tokens": 225}),
        ({"ss_clip_skip": "two", "ss_max_token_length": "-75"}, {}),
        ({"ss_clip_skip": "9" * 5000, "ss_max_token_length": "٢"}, {}),
    ],
)
def test_what_files_say(facts: ModelFacts, lora: Write, metadata: dict[str, str], expected: dict[str, int]) -> None:
    assert text_options(facts, [lora("a", **metadata)], {}) == expected


def test_what_is_asked_for_comes_first(facts: ModelFacts, lora: Write) -> None:
    files = [lora("a", ss_clip_skip="2", ss_max_token_length="150")]
    assert text_options(facts, files, {"clip_skip": 1, "max_tokens": None}) == {"clip_skip": 1, "max_tokens": 150}
    assert text_options(facts, [], {"clip_skip": None, "max_tokens": 75}) == {"max_tokens": 75}


def test_files_that_differ(facts: ModelFacts, lora: Write, tmp_path: Path) -> None:
    files = [lora("a", ss_clip_skip="2"), lora("b"), lora("c", ss_clip_skip="1"), tmp_path]
    with pytest.raises(UserError, match=r"different clip_skip: a\.safetensors with 2, c\.safetensors with 1"):
        text_options(facts, files, {})
    assert text_options(facts, files, {"clip_skip": 2}) == {"clip_skip": 2}
    assert text_options(facts, files[:2], {}) == {"clip_skip": 2}


def test_families_without_the_option(facts: ModelFacts, lora: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """kohya writes a clip skip into LoRAs of models that have none."""
    card = dataclasses.replace(reading.family_card(facts), text_options=frozenset({"max_tokens"}))
    monkeypatch.setattr(reading, "family_card", lambda facts: card)
    assert text_options(facts, [lora("a", ss_clip_skip="2", ss_max_token_length="150")], {}) == {"max_tokens": 150}
    with pytest.raises(UserError, match="'sd' have no clip_skip"):
        text_options(facts, [], {"clip_skip": 2})


def test_families_with_t5(facts: ModelFacts, lora: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'sd' have no t5_tokens"):
        text_options(facts, [], {"t5_tokens": 100})
    card = dataclasses.replace(reading.family_card(facts), text_options=frozenset({"t5_tokens"}))
    monkeypatch.setattr(reading, "family_card", lambda facts: card)
    files = [lora("a", ss_t5xxl_max_token_length="200", ss_max_token_length="150")]
    assert text_options(facts, files, {}) == {"t5_tokens": 200}
    assert text_options(facts, files, {"t5_tokens": 100}) == {"t5_tokens": 100}
    for wrong in (0, -3, 513):
        with pytest.raises(UserError, match=f"{wrong} tokens for T5 are not allowed. Give 1 to 512"):
            text_options(facts, [], {"t5_tokens": wrong})


def test_prompts_that_are_cut_are_told_once(facts: ModelFacts) -> None:
    long = "hair " * 75 + "beach"
    prompts = [Prompt("smile", negative=long, seed=seed) for seed in range(3)] + [Prompt(long), Prompt("hair " * 75)]
    (told,) = cut_prompts(facts, prompts, {})
    assert "has 76 tokens; 75 are read, the rest is not seen: 'beach'" in told
    assert list(cut_prompts(facts, prompts, {"max_tokens": 150})) == []
