"""Captions that leave something to chance: of several lines one is drawn, and of ``{red|blue}`` one choice.

``{{`` and ``}}`` are braces that stay, as in Python's own format strings. Choices hold no braces: they cannot be nested.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator

_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def lines_of(text: str) -> list[str]:
    """The lines of a caption, at least one; blank ones say nothing and are left out."""
    return [line for line in map(str.strip, text.split("\n")) if line] or [""]


def choose(text: str, rng: random.Random) -> str:
    """``text`` with one choice of every ``{a|b}``, each as likely as the others."""
    return "".join(rng.choice(choices) for choices in _pieces(text))


def variants(text: str) -> Iterator[str]:
    """Everything that `choose` may give, from about the longest on: the choices with most words come first."""
    pieces = [sorted(dict.fromkeys(choices), key=_words, reverse=True) for choices in _pieces(text)]
    return map("".join, itertools.product(*pieces))


def count_variants(text: str) -> int:
    """How many `variants` there are."""
    return math.prod(len(set(choices)) for choices in _pieces(text))


def stray_braces(text: str) -> bool:
    """Whether there are braces that belong to no choice and are not doubled: what is in them is trained as it is written."""
    return any(mark in _BRACES.sub("", text) for mark in "{}")


def has_choices(text: str) -> bool:
    """Whether there is any ``{a|b}`` in it."""
    return any(len(choices) > 1 for choices in _pieces(text))


def _pieces(text: str) -> Iterator[list[str]]:
    """The text in order, cut into what it may be at each place: one thing, or several to choose from."""
    position = 0
    for found in _BRACES.finditer(text):
        yield [text[position : found.start()]]
        yield [choice.strip() for choice in found[1].split("|")] if found[1] else [found[0][0]]
        position = found.end()
    yield [text[position:]]


def _words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))
