"""Our tokenizer against transformers' CLIPTokenizer, on any text."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families.networks.tokenizer import ClipTokenizer

FOLDER = POCKET_MODEL / "tokenizer"
HARD = [
    "",
    "   ",
    "1girl, Solo,\tLOOKING at\n\nviewer",
    "café CAFÉ cafe\u0301 naïve Ångström İstanbul ẞ",
    "猫耳の少女、ピンク髪 한국어 中文字符",
    "👩‍👩‍👧‍👦 🏳️‍🌈 emoji🙂inside",
    "it's she'll we've I'd they're he'S",
    "a+++ (masterpiece:1.3), <lora:x:1> 3.14159 1990s ½ ²",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic\ufeffbom",
    "before <|endoftext|> after <|startoftext|>",
    "<|ENDOFTEXT|> !!! !",
    "\x00control\x1f\x7f",
    "word " * 90,
]
TEXT = st.text(max_size=60) | st.text(alphabet="aAzZ éÉ漢🙂'’0९!.,()<|>\n\t\u0301\u200d\u00a0", max_size=60)


@functools.cache
def ours() -> ClipTokenizer:
    return ClipTokenizer.from_folder(FOLDER)


@functools.cache
def reference() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(FOLDER)


def expected(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, padding="max_length", max_length=77, truncation=True)["input_ids"]


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_equal_transformers(text: str) -> None:
    assert ours().encode([text]) == [expected(reference(), text)]


@settings(max_examples=400)
@given(TEXT)
def test_any_text_equals_transformers(text: str) -> None:
    assert ours().encode([text]) == [expected(reference(), text)]


@settings(max_examples=100)
@given(st.lists(TEXT, max_size=4), st.integers(3, 90))
def test_rows_are_start_caption_end_padding(texts: list[str], length: int) -> None:
    tokenizer = ours()
    rows = tokenizer.encode(texts, length)
    assert len(rows) == len(texts)
    for text, row in zip(texts, rows, strict=True):
        pieces = tokenizer.pieces(text)[: length - 2]
        padding = [tokenizer.pad_id] * (length - 2 - len(pieces))
        assert row == [tokenizer.start_id, *pieces, tokenizer.end_id, *padding]


def test_count_and_cut() -> None:
    tokenizer = ours()
    text = "  Red  dress, " + "blue hair, " * 40
    cut = tokenizer.cut(text)
    assert cut.tokens == tokenizer.count(text) > 75
    assert tokenizer.pieces(cut.kept) == tokenizer.pieces(text)[:75]
    assert tokenizer.pieces(cut.lost) == tokenizer.pieces(text)[75:]
    assert text.startswith(cut.kept) and text.rstrip().endswith(cut.lost)
    assert tokenizer.cut("blue hair").lost == ""


def test_exactly_full_is_not_cut() -> None:
    tokenizer = ours()
    assert tokenizer.count("!, " * 37 + "!") == 75
    assert tokenizer.cut("!, " * 37 + "!").lost == ""
    assert tokenizer.cut("!, " * 38).tokens == 76
    assert tokenizer.cut("!, " * 38).lost == ","


def test_tokenizer_json_alone_gives_the_same(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    CLIPTokenizer.from_pretrained(FOLDER).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").is_file()
    alone = ClipTokenizer.from_folder(tmp_path)
    assert alone.encode(HARD) == ours().encode(HARD)
    assert (alone.start_id, alone.end_id, alone.pad_id) == (ours().start_id, ours().end_id, ours().pad_id)


@pytest.mark.parametrize("padding", ["!", {"content": "!", "__type": "AddedToken"}])
def test_sd2_pads_with_another_token(tmp_path: Path, padding: Any) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": padding}))
    vocabulary = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    tokenizer = ClipTokenizer.from_folder(tmp_path)
    assert tokenizer.pad_id == vocabulary["!"] != tokenizer.end_id
    assert tokenizer.encode(["hair"])[0][-1] == vocabulary["!"]
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(tmp_path, pad_token="!")
    for text in ("hair", "wow! such hair!!"):
        assert tokenizer.encode([text])[0] == expected(theirs, text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "looked for vocab.json"),
        ({"vocab.json": "{", "merges.txt": ""}, "not valid JSON"),
        ({"vocab.json": "[]", "merges.txt": ""}, "not a vocabulary"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "not a vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "x y\n"}, "do not belong together"),
        ({"vocab.json": '{"a": -1}', "merges.txt": ""}, "do not belong together|not a vocabulary"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "has no token"),
        ({"tokenizer.json": "{}"}, "not a tokenizer file"),
        ({"tokenizer.json": "[" * 100_000}, "not a tokenizer file"),
    ],
)
def test_what_is_no_tokenizer(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        ClipTokenizer.from_folder(tmp_path)
