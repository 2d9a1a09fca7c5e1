"""The vocabulary that comes with lorabake against transformers' CLIPTokenizer, read from equal files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabake.families.networks.clip_vocabulary import OPEN_CLIP_PAD, SD1_PAD, clip_tokenizer, clip_tokenizer_files
from lorabake.families.networks.tokenizer import ClipTokenizer

HARD = [
    "",
    "1girl, Solo,\tLOOKING at\n\nviewer",
    "café CAFÉ cafe\u0301 naïve İstanbul ẞ",
    "猫耳の少女、ピンク髪 한국어",
    "👩‍👩‍👧‍👦 emoji🙂inside",
    "it's she'll we've I'd they're he'S",
    "a+++ (masterpiece:1.3), <lora:x:1> 3.14159 1990s ½",
    "wow! such hair!! ?!",
    "\x00control\x1f\x7f",
    "word " * 90,
]
PADS = [SD1_PAD, OPEN_CLIP_PAD]


@functools.cache
def ours(pad: str) -> ClipTokenizer:
    return clip_tokenizer(pad)


@pytest.fixture(scope="module", params=PADS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipTokenizer, Any]:
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in clip_tokenizer_files(request.param).items():
        (folder / name).write_text(text, encoding="utf-8")
    return ours(request.param), CLIPTokenizer.from_pretrained(folder)


def test_known_ids() -> None:
    assert ours(SD1_PAD).encode(["a photo of a cat"])[0][:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert ours(OPEN_CLIP_PAD).encode(["a photo of a cat"])[0][:8] == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert ours(SD1_PAD).size == ours(OPEN_CLIP_PAD).size == 49408


def test_tokens_at_the_seams_of_the_vocabulary() -> None:
    vocabulary = json.loads(clip_tokenizer_files()["vocab.json"])
    expected = {
        "!": 0,
        "~": 93,
        "¡": 94,
        "ÿ": 187,
        "Ā": 188,
        "Ń": 255,
        "!</w>": 256,
        "in": 512,
        "th": 513,
        "jekyll</w>": 49405,
    }
    assert {token: vocabulary[token] for token in expected} == expected
    assert sorted(vocabulary.values()) == list(range(49408))


def test_hard_texts_equal_transformers(pair: tuple[ClipTokenizer, Any]) -> None:
    given, reference = pair
    assert given.encode(HARD) == reference(HARD, padding="max_length", max_length=77, truncation=True)["input_ids"]


@settings(max_examples=200)
@given(text=st.text(max_size=60) | st.text(alphabet="aAzZ éÉ漢🙂'’0९!.,()<|>\n\t\u0301\u200d\u00a0", max_size=60))
def test_any_text_equals_transformers(pair: tuple[ClipTokenizer, Any], text: str) -> None:
    given, reference = pair
    assert given.encode([text])[0] == reference(text, padding="max_length", max_length=77, truncation=True)["input_ids"]


def test_a_written_folder_reads_the_same(tmp_path: Path) -> None:
    for name, text in clip_tokenizer_files(OPEN_CLIP_PAD).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert ClipTokenizer.from_folder(tmp_path).encode(HARD) == ours(OPEN_CLIP_PAD).encode(HARD)
