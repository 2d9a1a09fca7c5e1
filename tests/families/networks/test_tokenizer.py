"""Our tokenizer against transformers' CLIPTokenizer, on any text."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families.networks.tokenizer import ClipTokenizer, windows_for

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
@given(st.lists(TEXT, max_size=4), st.integers(1, 4))
def test_rows_are_windows_of_start_caption_end_padding(texts: list[str], windows: int) -> None:
    tokenizer = ours()
    rows = tokenizer.encode(texts, windows)
    assert len(rows) == len(texts)
    for text, row in zip(texts, rows, strict=True):
        assert len(row) == 77 * windows
        for number in range(windows):
            pieces = tokenizer.pieces(text)[75 * number : 75 * number + 75]
            padding = [tokenizer.pad_id] * (75 - len(pieces))
            assert row[77 * number :][:77] == [tokenizer.start_id, *pieces, tokenizer.end_id, *padding]


LONG = st.builds(" ".join, st.lists(st.sampled_from(["1girl,", "hair", "zorbi", "a+b", "猫", "!", "🙂"]), max_size=240))
PADDINGS = ["<|endoftext|>", "!"]


@pytest.mark.parametrize("max_tokens", [75, 150, 225])
@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("count", [0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 226, 400])
def test_windows_equal_kohyas_where_captions_end(max_tokens: int, pad: str, count: int) -> None:
    text = "hair " * count
    assert padded(pad).encode([text], max_tokens // 75) == [kohyas_windows(pad, text, max_tokens)]


@settings(max_examples=60)
@given(LONG, st.sampled_from([75, 150, 225]), st.sampled_from(PADDINGS))
def test_windows_of_any_text_equal_kohyas(text: str, max_tokens: int, pad: str) -> None:
    pieces, padding = padded(pad).pieces(text)[:max_tokens], padded(pad).pad_id
    assume(padding not in (*pieces[::75], *pieces[74::75]))
    assert padded(pad).encode([text], max_tokens // 75) == [kohyas_windows(pad, text, max_tokens)]


def test_a_sign_that_is_also_padding_stays_what_it_is() -> None:
    """SD2 and SDXL pad with ``!``. kohya takes one in the text for padding where a window begins; here it stays text."""
    tokenizer = padded("!")
    text = "hair " * 75 + "! hair"
    assert tokenizer.pieces(text)[75] == tokenizer.pad_id
    row = tokenizer.encode([text], 2)[0]
    theirs = kohyas_windows("!", text, 150)
    assert row[78] == tokenizer.pad_id and theirs[78] == tokenizer.end_id
    assert row[:78] == theirs[:78] and row[79:] == theirs[79:]


@functools.cache
def padded(pad: str) -> ClipTokenizer:
    """Ours as SD1 (pads with the end) or SD2 (pads with ``!``) have it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(FOLDER / name, folder)
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
        return ClipTokenizer.from_folder(Path(folder))


@functools.cache
def reference_padded(pad: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(FOLDER, pad_token=pad)


def kohyas_windows(pad: str, text: str, max_tokens: int) -> list[int]:
    """sd-scripts' rule: pad and cut as a whole to ``max_tokens`` + 2, slice what is inside, mend each slice's start and end."""
    tokenizer = reference_padded(pad)
    whole = tokenizer(text, padding="max_length", max_length=max_tokens + 2, truncation=True)["input_ids"]
    if max_tokens == 75:
        return whole
    padding, end, rows = tokenizer.pad_token_id, tokenizer.eos_token_id, []
    for place in range(1, max_tokens + 1, 75):
        row = [whole[0], *whole[place : place + 75], whole[-1]]
        if padding != end:
            if row[-2] not in (end, padding):
                row[-1] = end
            if row[1] == padding:
                row[1] = end
        rows += row
    return rows


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_what_is_read_of_a_long_caption(windows: int) -> None:
    tokenizer = ours()
    text = "  Red  dress, " + "blue hair, " * 80
    (reading,) = tokenizer.read([text], windows)
    assert reading.tokens == tokenizer.count(text) > 225
    assert (reading.room, reading.windows) == (75 * windows, windows)
    assert tokenizer.pieces(reading.kept) == tokenizer.pieces(text)[: 75 * windows]
    assert tokenizer.pieces(reading.lost) == tokenizer.pieces(text)[75 * windows :]
    assert text.startswith(reading.kept) and text.rstrip().endswith(reading.lost)


@settings(max_examples=100)
@given(st.lists(TEXT | LONG, max_size=3), st.integers(1, 3))
def test_what_is_read_is_all_that_fits(texts: list[str], windows: int) -> None:
    tokenizer = ours()
    for text, reading in zip(texts, tokenizer.read(texts, windows), strict=True):
        assert reading.tokens == len(tokenizer.pieces(text))
        assert bool(reading.lost) == (reading.tokens > reading.room == 75 * windows)
        assert 1 <= reading.windows <= windows and (reading.windows - 1) * 75 < max(1, reading.tokens)
        assert reading.lost or reading.kept == text


def test_exactly_full_is_not_cut() -> None:
    tokenizer = ours()
    full, over = tokenizer.read(["!, " * 37 + "!", "!, " * 38])
    assert (full.tokens, full.lost) == (75, "")
    assert (over.tokens, over.lost) == (76, ",")
    assert [reading.windows for reading in tokenizer.read(["", "!, " * 37 + "!", "!, " * 38], 3)] == [1, 1, 2]


@pytest.mark.parametrize("max_tokens", [0, 1, 77, 100, -75])
def test_only_whole_windows(max_tokens: int) -> None:
    with pytest.raises(UserError, match="75, 150 or 225"):
        windows_for(max_tokens)


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
