"""The shipped judge and detectors: ceilings on fresh pictures, and what they say about bad input."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.pocket.characters import CHARACTERS, Character, horns
from lorabake.pocket.judge import (
    Detectors,
    Judge,
    measure_detectors,
    measure_judge,
    train_detectors,
    train_judge,
)
from lorabake.pocket.judge.weights import SHIPPED
from lorabake.pocket.world import axes, draw, sample


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def fresh_pictures(count: int, seed: int, **fixed: Any) -> tuple[np.ndarray, list[dict[str, int | None]]]:
    rng = random.Random(seed)
    drawings = [draw(sample(rng, **fixed), rng.getrandbits(32)) for _ in range(count)]
    return np.stack([np.asarray(drawing.image) for drawing in drawings]), [drawing.labels for drawing in drawings]


def test_shipped_weights_are_small() -> None:
    sizes = [path.stat().st_size for path in SHIPPED.glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) <= 2.5e6


def test_attributes_gives_an_index_and_a_probability_per_axis(judge: Judge) -> None:
    images, _ = fresh_pictures(3, seed=1)
    answers = judge.attributes(images)
    assert list(answers) == list(axes)
    for axis, (index, probability) in answers.items():
        assert index.shape == probability.shape == (3,)
        assert (index >= 0).all() and (index < len(axes[axis])).all()
        assert (probability > 1 / len(axes[axis]) - 1e-6).all() and (probability <= 1).all()


def test_the_judge_sees_a_quick_sample_right(judge: Judge) -> None:
    images, labels = fresh_pictures(60, seed=2)
    assert judge.accuracy(images, labels).mean > 0.93


def test_wrong_labels_score_badly(judge: Judge) -> None:
    images, labels = fresh_pictures(60, seed=2)
    assert judge.accuracy(images, labels[1:] + labels[:1]).mean < 0.6


def test_labels_that_are_not_told_do_not_count(judge: Judge) -> None:
    images, labels = fresh_pictures(4, seed=3, view="from behind")
    scored = judge.accuracy(images, labels)
    assert scored.counts["eye_color"] == 0 and np.isnan(scored.per_axis["eye_color"])
    assert scored.counts["view"] == 4


@pytest.mark.slow
def test_ceilings_on_fresh_pictures(judge: Judge) -> None:
    measured = measure_judge(judge, pictures=300, seed=1)
    assert measured.mean >= 0.97
    # With 300 pictures the rarest axis has about 60 labels, so that a ceiling of .96 may measure as .90.
    assert min(measured.per_axis.values()) >= 0.9


@pytest.mark.slow
def test_the_judge_forgives_soft_pictures(judge: Judge) -> None:
    images, labels = fresh_pictures(200, seed=5)
    torch.manual_seed(0)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    soft = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = (0.5 * pictures + 0.5 * soft + torch.randn_like(soft) * 8).clamp(0, 255)
    assert judge.accuracy(noisy.byte().permute(0, 2, 3, 1).numpy(), labels).mean > 0.9


@pytest.mark.slow
def test_shipped_detectors_know_their_features_and_leave_others_alone() -> None:
    quality = measure_detectors(Detectors.load(), pictures=300, seed=1)
    assert set(quality) == {feature for character in CHARACTERS.values() for feature in character.features}
    assert min(row.accuracy for row in quality.values()) >= 0.9
    assert max(row.false_positives for row in quality.values()) <= 0.05


def test_detectors_answer_by_name() -> None:
    detectors = Detectors.load()
    rng = random.Random(0)
    specs = [CHARACTERS["zorbi"].spec(rng, view="front", style="outline", framing="upper body") for _ in range(12)]
    images = np.stack([np.asarray(draw(spec, seed).image) for seed, spec in enumerate(specs)])
    assert detectors.rate(images, "star antenna") > 0.7
    assert detectors.rate(images, "fox tail") < 0.3
    with pytest.raises(UserError, match="Did you mean 'star antenna'"):
        detectors.rate(images, "star antena")


def test_training_is_reproducible(judge: Judge) -> None:
    first, second = (train_judge(steps=2, seed=3).network.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    somebody = Character("somebody", {}, (horns(),))
    one, two = (train_detectors([somebody], judge, steps=2, seed=3).network.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weights_survive_a_round_trip(judge: Judge, tmp_path: Path) -> None:
    images, _ = fresh_pictures(4, seed=7)
    judge.save(tmp_path / "again.safetensors")
    again = Judge.load(tmp_path / "again.safetensors")
    for axis, (index, _) in judge.attributes(images).items():
        np.testing.assert_array_equal(index, again.attributes(images)[axis][0])


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [((2, 64, 64), np.uint8, "uint8"), ((2, 64, 64, 3), np.float32, "float32"), ((2, 60, 60, 3), np.uint8, "60 x 60")],
)
def test_other_arrays_are_refused(judge: Judge, shape: tuple[int, ...], dtype: type, message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge.attributes(np.zeros(shape, dtype))


def test_larger_pictures_are_averaged_down(judge: Judge) -> None:
    rng = random.Random(9)
    large = np.stack([np.asarray(draw(sample(rng), seed, size=128).image) for seed in range(4)])
    assert judge.attributes(large)["view"][0].shape == (4,)


def test_missing_and_foreign_weights_are_explained(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_judge"):
        Judge.load(tmp_path / "nothing.safetensors")
    judge.save(tmp_path / "judge.safetensors")
    with pytest.raises(UserError, match="no detectors"):
        Detectors.load(tmp_path / "judge.safetensors")
    with pytest.raises(UserError, match="no extras"):
        train_detectors([Character("plain")], judge, steps=1)
