"""Sampling: every value occurs, held-out ones never do, and wrong names are answered with advice."""

from __future__ import annotations

import random

import pytest

from lorabake.base.errors import UserError
from lorabake.pocket.world import Spec, axes, sample


def test_every_value_occurs() -> None:
    rng = random.Random(0)
    specs = [sample(rng) for _ in range(800)]
    for axis, values in axes.items():
        assert {getattr(spec, axis) for spec in specs} == set(values)


def test_nothing_is_tied_to_anything() -> None:
    """Every pair of values of two axes occurs together."""
    rng = random.Random(1)
    specs = [sample(rng) for _ in range(4000)]
    for first, second in (("hair_style", "outfit"), ("headgear", "object"), ("skin", "eye_color"), ("style", "view")):
        pairs = {(getattr(spec, first), getattr(spec, second)) for spec in specs}
        assert len(pairs) == len(axes[first]) * len(axes[second])


def test_held_out_values_never_occur() -> None:
    rng = random.Random(2)
    held = {"background": {"beach", "night"}, "object": ["sword"]}
    specs = [sample(rng, hold_out=held) for _ in range(500)]
    assert {spec.background for spec in specs} == set(axes["background"]) - {"beach", "night"}
    assert "sword" not in {spec.object for spec in specs}


def test_fixed_fields_are_kept() -> None:
    assert sample(random.Random(3), pose="sitting", flip=True).pose == "sitting"


@pytest.mark.parametrize(
    ("hold_out", "message"),
    [
        ({"backgrund": {"sky"}}, "Did you mean 'background'"),
        ({"background": {"skyy"}}, "Did you mean 'sky'"),
        ({"glasses": {"none", "glasses"}}, "at least one"),
    ],
)
def test_wrong_hold_outs_are_refused(hold_out: dict[str, set[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(random.Random(0), hold_out=hold_out)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(UserError, match="Did you mean 'twintails'"):
        Spec(hair_style="twintail")
    with pytest.raises(UserError, match="Did you mean 'pose'"):
        sample(random.Random(0), poze="sitting")
