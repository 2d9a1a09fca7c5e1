"""Caption files: tolerant of what editors write, clear about everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabake.dataset.caption_file import UnreadableCaption, read_caption


@pytest.mark.parametrize(
    ("data", "text", "unused"),
    [
        (b"a, b", "a, b", 0),
        (b"", "", 0),
        (b" \n\t\n", "", 0),
        (b"\n  a, b  \n\nsecond\nthird\n", "a, b", 2),
        (b"one\r\ntwo", "one", 1),
        (b"one\rtwo", "one", 1),
        ("\ufeffa é".encode(), "a é", 0),
        ("猫、\U0001f431 'x'".encode(), "猫、\U0001f431 'x'", 0),
        ("a é".encode("utf-16"), "a é", 0),
        (b"\xfe\xff" + "a é".encode("utf-16-be"), "a é", 0),
        ("one\u2028still one\x0cand so on".encode(), "one\u2028still one\x0cand so on", 0),
    ],
)
def test_what_is_read(tmp_path: Path, data: bytes, text: str, unused: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    caption = read_caption(path)
    assert (caption.text, caption.unused_lines) == (text, unused)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("café".encode("latin-1"), r"not UTF-8 text \(byte 0xe9 at position 3\)"),
        ("猫".encode("shift-jis"), "not UTF-8"),
        ("abc".encode("utf-16-le"), "zero bytes"),
        ("abc".encode("utf-32"), "zero bytes"),
        (b"\xff\xfea", "not UTF-8"),
        (b"\x89PNG\r\n", "not UTF-8"),
        (b"a" * 1_000_001, "longer than 1000 kB"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(UnreadableCaption, match=reason) as caught:
        read_caption(path)
    assert str(path) in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UnreadableCaption, match="No such file"):
        read_caption(tmp_path / "a.txt")


@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    try:
        text = read_caption(path).text
    except UnreadableCaption:
        return
    assert "\n" not in text
    assert "\r" not in text
    assert "\0" not in text
