"""Lines and choices of captions: what may come, how often, and what stays as it is written."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabake.dataset.wildcards import choose, count_variants, has_choices, lines_of, stray_braces, variants

texts = st.text("ab {}|,", max_size=24)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", {"plain"}),
        ("{red|blue} hat", {"red hat", "blue hat"}),
        ("{ red | blue } hat", {"red hat", "blue hat"}),
        ("{a|b} {c|d}", {"a c", "a d", "b c", "b d"}),
        ("{a|}x", {"ax", "x"}),
        ("{a}", {"a"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{}", {"{}"}),
        ("{a|b", {"{a|b"}),
        ("a} {b|c}", {"a} b", "a} c"}),
        ("{x|{y|z}}", {"{x|y}", "{x|z}"}),
    ],
)
def test_by_hand(text: str, expected: set[str]) -> None:
    assert {choose(text, random.Random(seed)) for seed in range(60)} == expected
    assert set(variants(text)) == expected
    assert count_variants(text) == len(expected)


def test_every_choice_is_as_likely() -> None:
    counts = Counter(choose("{a|b|c}", random.Random(seed)) for seed in range(3000))
    assert all(900 < count < 1100 for count in counts.values())


def test_the_longest_variant_comes_first() -> None:
    assert next(variants("{a|a very long one, really|b c} {x y|z}")) == "a very long one, really x y"


def test_braces_that_are_no_pair_are_found() -> None:
    assert [stray_braces(text) for text in ("{a|b", "a}", "{x|{y|z}}", "{a|b} {{c}}", "a")] == [True] * 3 + [False] * 2


def test_lines() -> None:
    assert lines_of("a\n\n b \n") == ["a", "b"]
    assert lines_of("") == lines_of(" \n ") == [""]


@given(text=texts, seed=st.integers(0, 2**32))
def test_what_is_drawn_is_one_of_the_variants(text: str, seed: int) -> None:
    found = list(variants(text))
    assert choose(text, random.Random(seed)) in found
    assert len(found) == count_variants(text)
    assert has_choices(text) or len(set(found)) == 1


@given(text=st.text("ab |,"), seed=st.integers(0, 99))
def test_without_braces_nothing_is_left_to_chance(text: str, seed: int) -> None:
    assert choose(text, random.Random(seed)) == text
