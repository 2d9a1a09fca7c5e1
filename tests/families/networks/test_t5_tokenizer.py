"""Our T5 tokenizer against transformers' own, from either kind of file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import UserError
from lorabake.families.networks.t5_tokenizer import T5Tokenizer

WORDS = [
    "▁a",
    "▁girl",
    "▁red",
    "▁hair",
    "▁beach",
    "▁1",
    "s",
    "gi",
    "rl",
    "re",
    "d",
    ",",
    "h",
    "air",
    "▁",
    "r",
    "e",
    "a",
    "fi",
]
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.5 - 0.25 * i) for i, word in enumerate(WORDS))]
EQUAL = {"ﬁ": "fi", "Ａ": "a", "　": " ", "\n": " "}
"""What the table of equal characters makes of some."""
TEXTS = [
    "a girl, red hair, beach",
    "1girls  reds\ta",
    "",
    "  girl ",
    "zzz girl ☃ Ａ ﬁre",
    "red　hair\nbeach",
    "a </s> girl <pad> <extra_id_0> <extra_id_99>",
]


def charsmap() -> bytes:
    """A table of equal characters as SentencePiece stores it: a double-array trie over UTF-8, then the replacements."""
    strings, offsets = b"", {}
    for text, equal in EQUAL.items():
        offsets[text.encode()] = len(strings)
        strings += equal.encode() + b"\0"
    prefixes = [b"", *sorted({key[:end] for key in offsets for end in range(1, len(key) + 1)}, key=len)]
    base = {
        prefix: 256 * (index + 1) for index, prefix in enumerate(prefixes)
    }  # children at base + label, the value at base
    units = [0] * (256 * (len(prefixes) + 1))
    for prefix in prefixes:
        place = base[prefix[:-1]] + prefix[-1] if prefix else 0
        label = prefix[-1] if prefix else 0
        units[place] = (place ^ base[prefix]) << 10 | (prefix in offsets) << 8 | label
        if prefix in offsets:
            units[base[prefix]] = 1 << 31 | offsets[prefix]
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + strings


def varint(value: int) -> bytes:
    more = b""
    while value > 127:
        more, value = more + bytes([value & 127 | 128]), value >> 7
    return more + bytes([value])


def field(number: int, value: int | bytes | float) -> bytes:
    """A field of a protocol-buffer message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def spiece(algorithm: int = 1) -> bytes:
    """The vocabulary as SentencePiece stores it, with settings around it that no reader needs."""
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    data = b""
    for text, score in PIECES:
        piece = field(1, text.encode()) + field(2, score) + (field(3, kinds[text]) if text in kinds else b"")
        data += field(1, piece)
    data += field(2, field(1, b"corpus.txt") + field(3, algorithm) + field(4, len(PIECES)) + field(10, 0.9995))
    return data + field(3, field(1, b"nmt_nfkc") + field(2, charsmap()) + field(3, 1))


def theirs() -> Any:
    from transformers import T5Tokenizer as Reference

    blanks = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(100))]
    return Reference(vocab=PIECES + blanks, _spm_precompiled_charsmap=charsmap())


@pytest.fixture(scope="module")
def reference() -> Any:
    return theirs()


@pytest.fixture(params=["tokenizer.json", "spiece.model"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, reference: Any) -> Path:
    if request.param == "spiece.model":
        (tmp_path / "spiece.model").write_bytes(spiece())
    else:
        reference.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
    return tmp_path


def test_ids_equal_transformers(folder: Path, reference: Any) -> None:
    ours = T5Tokenizer.from_path(folder)
    for length in (12, 5):
        expected = reference(TEXTS, padding="max_length", max_length=length, truncation=True).input_ids
        assert ours.encode(TEXTS, length) == expected
    assert ours.size == len(reference) == len(PIECES) + 100


def test_spaces_at_the_ends_are_no_tokens_whatever_the_file_says(folder: Path) -> None:
    if (file := folder / "tokenizer.json").is_file():
        content = json.loads(file.read_text())
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        file.write_text(json.dumps(content))
    assert T5Tokenizer.from_path(folder).encode([" a  girl "], 4) == [[3, 4, 1, 0]]


def test_pieces_worked_out_by_hand(folder: Path) -> None:
    ours = T5Tokenizer.from_path(folder)
    ids = {text: index for index, (text, _) in enumerate(PIECES)}
    expected = ["▁red", "▁", "fi", "re", "▁a", "</s>", "<pad>"]
    assert ours.encode(["red　ﬁre Ａ"], 7) == [[ids[piece] for piece in expected]]
    assert ours.encode(["red ☃"], 5) == [[ids[piece] for piece in ("▁red", "▁", "<unk>", "</s>", "<pad>")]]


def test_what_does_not_fit_is_told(folder: Path) -> None:
    ours = T5Tokenizer.from_path(folder)
    fits, cut = ours.read(["a girl", "a girl, red hair, beach"], 5)
    assert (fits.tokens, fits.room, fits.windows, fits.kept, fits.lost) == (2, 4, 1, "a girl", "")
    assert (cut.tokens, cut.kept, cut.lost) == (7, "a girl, red", "hair, beach")


def test_a_file_may_be_named_itself(folder: Path) -> None:
    (file,) = (folder / name for name in ("tokenizer.json", "spiece.model") if (folder / name).is_file())
    assert T5Tokenizer.from_path(file).encode(["a girl"], 3) == [[3, 4, 1]]


def damaged(name: str, data: bytes, tmp_path: Path) -> str:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        T5Tokenizer.from_path(tmp_path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("spiece.model", b"", "no pieces"),
        ("spiece.model", spiece()[:50], "cut short"),
        ("spiece.model", spiece(algorithm=2), "Unigram"),
        ("spiece.model", field(1, field(1, b"a") + field(2, -1.0)), "<unk>"),
        ("spiece.model", b"\x0b\x00", "damaged"),
        ("spiece.model", b"\xff" * 20, "damaged"),
        ("tokenizer.json", b"{", "not a tokenizer file"),
        ("tokenizer.json", json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}).encode(), "BPE"),
    ],
)
def test_what_is_wrong_is_said(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    assert words in damaged(name, data, tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"tokenizer\.json and for spiece\.model"):
            T5Tokenizer.from_path(path)
