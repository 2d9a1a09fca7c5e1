"""Lengths say their unit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabake.base.cards import Settings
from lorabake.base.units import Duration, Epochs, Stretch


class Length(Settings):
    """A setting with a length."""

    length: Duration = Epochs(10)
    """How long."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 epochs", Epochs(8)),
        ("1 epoch", Epochs(1)),
        ("2400 steps", Duration(2400, "steps")),
        ("1 step", Duration(1, "steps")),
        ("  12steps ", Duration(12, "steps")),
        (Duration(3, "steps"), Duration(3, "steps")),
    ],
)
def test_parse(text: Any, expected: Duration) -> None:
    assert Duration.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["8", 8, 8.0, True, None, "epochs", "-1 steps", "1.5 epochs", "8 Epochs", "8 days", "8 steps 2", ""]
)
def test_what_has_no_unit_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="needs a number and a unit"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["0 steps", "0 epochs"])
def test_nothing_is_no_length(text: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Duration.parse(text)


@given(st.integers(1, 10**9), st.sampled_from(["steps", "epochs"]))
def test_written_and_read_back(count: int, unit: Any) -> None:
    length = Duration(count, unit)
    assert Duration.parse(str(length)) == length
    settings = Length(length=length)
    assert Length.model_validate(settings.model_dump(mode="json")) == settings


def test_in_steps() -> None:
    assert Epochs(3).steps(7) == 21
    assert Duration(3, "steps").steps(7) == 3


class Part(Settings):
    """A setting with a part of a run."""

    part: Stretch = Stretch()
    """Which part."""


@pytest.mark.parametrize(
    ("given_as", "expected", "written"),
    [
        (0.25, Stretch(0.25), 0.25),
        (0, Stretch(0.0), 0.0),
        ("100 %", Stretch(1.0), 1.0),
        ("5 %", Stretch(0.05), 0.05),
        ("12.5%", Stretch(0.125), 0.125),
        ("200 steps", Stretch(count=200), "200 steps"),
        (" 1 step", Stretch(count=1), "1 step"),
    ],
)
def test_parts_of_a_run(given_as: Any, expected: Stretch, written: Any) -> None:
    part = Part.model_validate({"part": given_as})
    assert part.part == expected and part.model_dump(mode="json") == {"part": written}
    assert Part.model_validate_json(part.model_dump_json(), strict=True) == part
    assert bool(expected) == (expected.steps(1000) > 0)


@pytest.mark.parametrize("wrong", [1.01, -0.1, "1", "5", "-5 %", "101 %", "2 epochs", True, None, "half", [0.1]])
def test_what_is_no_part_of_a_run(wrong: Any) -> None:
    with pytest.raises(ValueError):
        Part.model_validate({"part": wrong})


def test_steps_of_a_part() -> None:
    assert (Stretch(0.1).steps(95), Stretch(0.5).steps(1), Stretch(count=7).steps(3)) == (10, 0, 7)
    assert (str(Stretch(0.05)), str(Stretch(count=1)), str(Stretch(count=200))) == ("0.05", "1 step", "200 steps")
