"""Short texts for the axes of a grid."""

from __future__ import annotations

import pytest

from lorabake.base.errors import UserError
from lorabake.sampling.axes import MOST_VALUES, seeds, weights


def test_weights_and_seeds_are_read() -> None:
    assert weights("0.4, 0.6,1,-.5") == (0.4, 0.6, 1.0, -0.5)
    assert seeds("1, 5-8,3") == (1, 5, 6, 7, 8, 3)
    assert len(seeds(f"1-{MOST_VALUES}")) == MOST_VALUES


@pytest.mark.parametrize("text", ["", ",", "a", "0.4;0.6", "nan", "inf", "1e999", ",".join(["1"] * (MOST_VALUES + 1))])
def test_weights_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        weights(text)


@pytest.mark.parametrize("text", ["", "a", "1.5", "-3", "8-5", f"0-{MOST_VALUES}", "1-99999999999999999999"])
def test_seeds_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError):
        seeds(text)
