"""Fidelity compares a model's pictures with what the prompts' real drawings show."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.pocket import fidelity
from lorabake.pocket.fidelity import Fidelity, score, sheet
from lorabake.pocket.judge import Accuracy, Judge
from lorabake.pocket.judge.network import AttributeNet
from lorabake.pocket.world import axes
from lorabake.protocols.family import Model
from lorabake.recipe.prompts import Prompt


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("pocket")


@pytest.fixture(scope="module")
def judge() -> Judge:
    """An untrained judge: this file tests the bookkeeping, not the judge."""
    return Judge(AttributeNet([len(values) for values in axes.values()]))


@pytest.fixture(scope="module")
def result(model: Model, judge: Judge) -> Fidelity:
    return score(model, judge, 8, steps=2)


def test_the_score_is_the_judges_accuracy_on_both_sides(result: Fidelity, judge: Judge) -> None:
    labels = [pair.real.labels for pair in result.pairs]
    drawn = judge.accuracy(np.stack([np.asarray(pair.drawn) for pair in result.pairs]), labels)
    real = judge.accuracy(np.stack([np.asarray(pair.real.image) for pair in result.pairs]), labels)
    shown = [axis for axis in axes if drawn.counts[axis]]
    assert result.per_axis == {axis: drawn.per_axis[axis] for axis in shown}
    assert result.ceiling == {axis: real.per_axis[axis] for axis in shown}
    assert result.mean == pytest.approx(sum(result.per_axis.values()) / len(shown))
    assert result.ratio == pytest.approx(result.mean / result.ceiling_mean)


def test_prompts_name_what_can_be_seen_and_differ(result: Fidelity) -> None:
    for pair in result.pairs:
        assert sorted(pair.prompt.text.split(", ")) == sorted(pair.real.tags)
    assert len({pair.prompt.text for pair in result.pairs}) == len({pair.prompt.seed for pair in result.pairs}) == 8


def test_the_same_seed_asks_for_the_same_pictures(result: Fidelity, model: Model, judge: Judge) -> None:
    again, other = score(model, judge, 8, steps=2), score(model, judge, 4, seed=1, steps=2)
    assert again.to_dict() == result.to_dict()
    assert [pair.prompt for pair in again.pairs] == [pair.prompt for pair in result.pairs]
    assert {pair.prompt.text for pair in other.pairs}.isdisjoint(pair.prompt.text for pair in result.pairs)


def test_a_model_that_draws_the_truth_reaches_the_ceiling(
    result: Fidelity, model: Model, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = {pair.prompt.text: pair.real.image for pair in result.pairs}

    def perfect(model: Model, prompts: Sequence[Prompt], **_: object) -> list[Image.Image]:
        return [truth[prompt.text] for prompt in prompts]

    monkeypatch.setattr(fidelity, "draw_prompts", perfect)
    assert score(model, judge, 8, steps=2).ratio == 1


def test_numbers_go_into_json_and_pictures_do_not(result: Fidelity) -> None:
    said = json.loads(json.dumps(result.to_dict()))
    assert (said["pictures"], said["steps"], said["cfg"]) == (8, 2, 4.0)
    assert said["axes"]["framing"] == {
        "accuracy": result.per_axis["framing"],
        "ceiling": result.ceiling["framing"],
        "pictures": 8,
    }


def test_axes_that_nothing_shows_are_left_out(model: Model, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(self: Judge, images: np.ndarray, labels: Sequence[object]) -> Accuracy:
        nothing = dict.fromkeys(axes, float("nan")) | {"pose": 0.5}
        return Accuracy(nothing, 0.5, dict.fromkeys(axes, 0) | {"pose": len(labels)})

    monkeypatch.setattr(Judge, "accuracy", blind)
    result = score(model, judge, 2, steps=1)
    assert (result.per_axis, result.mean, result.ratio) == ({"pose": 0.5}, 0.5, 1.0)


def test_the_sheet_has_drawn_over_real(result: Fidelity) -> None:
    page = np.asarray(sheet(result.pairs, columns=5, scale=2))
    cell = 2 * 64 + 2
    assert page.shape == (4 * cell, 5 * cell, 3)
    for index, pair in enumerate(result.pairs):
        top, left = 2 * (index // 5) * cell, index % 5 * cell
        np.testing.assert_array_equal(page[top : top + 128 : 2, left : left + 128 : 2], np.asarray(pair.drawn))
        below = page[top + cell : top + cell + 128 : 2, left : left + 128 : 2]
        np.testing.assert_array_equal(below, np.asarray(pair.real.image))


def test_nothing_to_judge_or_to_show_is_refused(model: Model, judge: Judge, result: Fidelity) -> None:
    with pytest.raises(UserError, match="at least 1"):
        score(model, judge, 0)
    for pairs, columns in ((), 5), (result.pairs, 0):
        with pytest.raises(UserError, match="at least 1"):
            sheet(pairs, columns)
    assert dataclasses.is_dataclass(result)
