"""Lines that fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorabake.sampling.lettering import ELLIPSIS, Style, fitted

STYLE = Style(17, "#000000")


@given(st.text(max_size=120), st.integers(30, 300), st.integers(1, 5))
def test_no_line_is_too_wide_and_none_too_many(text: str, width: int, lines: int) -> None:
    found = fitted(text, STYLE, width, lines)
    assert len(found) <= lines
    assert all(STYLE.font.getlength(line) <= width for line in found)


def test_short_texts_stay_as_they_are() -> None:
    assert fitted("epoch 2", STYLE, 200, 1) == ["epoch 2"]
    assert fitted(" ", STYLE, 200, 3) == []


def test_words_break_where_file_names_do() -> None:
    assert fitted("mira_character-000002", STYLE, 110, 3) == ["mira_", "character-", "000002"]


def test_what_does_not_fit_ends_in_an_ellipsis() -> None:
    found = fitted("one two three four five six seven", STYLE, 70, 2)
    assert len(found) == 2
    assert found[-1].endswith(ELLIPSIS)


def test_a_later_paragraph_is_not_crowded_out() -> None:
    assert fitted("one two three four five six seven eight\nseed 3", STYLE, 70, 3)[-1] == "seed 3"


def test_characters_without_a_glyph_have_a_stand_in() -> None:
    assert fitted("64 × 64 → Ł", STYLE, 200, 1) == ["64 x 64 > L"]
    assert fitted("漢", STYLE, 200, 1) == ["?"]
