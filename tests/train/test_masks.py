"""Masked loss, by hand and in whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorabake.base.errors import Problems
from lorabake.base.events import Events
from lorabake.dataset.masks import MaskConfig
from lorabake.recipe import check_values
from lorabake.train.bake import Bake
from lorabake.train.loop import Asked, batch_inputs, loss_of, run_loop
from lorabake.train.masks import MaskInputs, weights
from lorabake.train.prepare import prepare

MASK = np.array([[0.0, 0.5], [1.0, 0.0]], np.float32)


def masked(dataset: Path, **masks: Any) -> dict[str, Any]:
    """A recipe with masks: the right half of each picture but the last, which has none."""
    for path in sorted(dataset.rglob("*.png"))[:-1]:
        mask = Image.new("L", (64, 64), "black")
        mask.paste("white", (32, 0, 64, 64))
        (path.parent / "masks").mkdir(exist_ok=True)
        mask.save(path.parent / "masks" / path.name)
    return {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset), "masks": {"source": "files", **masks}},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "4 steps"},
    }


class Asking:
    """An objective and a model in one, which answer with what they are given: the error is the prediction's square."""

    parts: dict[str, Any] = {}

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return latents

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def error(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        return (prediction - target).square()

    def weigh(self, error_B: Tensor, timesteps: Tensor) -> Tensor:
        return error_B * timesteps

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        assert not conditioning
        return latents


def hand_loss(mask: Tensor | None) -> tuple[float, Tensor]:
    """Loss of one picture of two channels whose errors are 1, 4, 9, 16 in both, at timestep 3; and its gradient."""
    answer = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 2, 2, 2).clone().requires_grad_()
    inputs = {"latents_BCHW": answer, "noise_BCHW": torch.zeros(1, 2, 2, 2), "timesteps_B": torch.tensor([3.0])}
    both: Any = Asking()
    loss = loss_of(both, both, inputs if mask is None else {**inputs, "mask_B1HW": mask})
    loss.backward()
    assert answer.grad is not None
    return float(loss.detach()), answer.grad


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"normalise": "none"}, 3 * (0.5 * 4 + 9) / 4),
        ({"normalise": "area"}, 3 * (0.5 * 4 + 9) / 1.5),
        ({"normalise": "none", "unmasked_weight": 0.1}, 3 * (0.1 * 1 + 0.5 * 4 + 9 + 0.1 * 16) / 4),
        ({"normalise": "area", "unmasked_weight": 0.1}, 3 * (0.1 * 1 + 0.5 * 4 + 9 + 0.1 * 16) / 1.7),
    ],
    ids=str,
)
def test_the_loss_by_hand(config: dict[str, Any], expected: float) -> None:
    mask = weights(MASK, MaskConfig(source="files", **config), mirrored=False)
    assert hand_loss(mask[None])[0] == pytest.approx(expected, rel=1e-6)
    assert hand_loss(None)[0] == pytest.approx(3 * (1 + 4 + 9 + 16) / 4)


def test_a_mask_that_shows_everything_changes_no_bit() -> None:
    for normalise in ("area", "none"):
        mask = weights(np.ones((2, 2), np.float32), MaskConfig(source="files", normalise=normalise), mirrored=False)
        (loss, gradient), (plain_loss, plain) = hand_loss(mask[None]), hand_loss(None)
        assert loss == plain_loss and torch.equal(gradient, plain)


def test_nothing_is_asked_of_what_lies_outside() -> None:
    gradient = hand_loss(weights(MASK, MaskConfig(source="files"), mirrored=False)[None])[1]
    assert (gradient[..., 0, 0] == 0).all() and (gradient[..., 1, 1] == 0).all()
    assert (gradient[..., 0, 1] != 0).all() and (gradient[..., 1, 0] != 0).all()


def asked(step: int, *views: tuple[int, int]) -> Asked:
    return Asked(step, 0, views, [""] * len(views))


def test_each_row_has_the_mask_of_its_picture_and_view() -> None:
    of = MaskInputs(
        [[MASK, MASK], [None, None]],
        [[False, True]] * 2,
        [(2, 2), (2, 2)],
        MaskConfig(source="files", normalise="none"),
        7,
    )
    rows = of(asked(0, (1, 1), (0, 0), (0, 1)))["mask_B1HW"]
    assert rows.tolist() == [[[[1, 1], [1, 1]]], [[[0, 0.5], [1, 0]]], [[[0.5, 0], [0, 1]]]]


def test_the_whole_picture_counts_now_and_then() -> None:
    of = MaskInputs([[MASK]], [[False]], [(2, 2)], MaskConfig(source="files", unmasked_probability=0.3), 7)
    whole = [[bool((row == 1).all()) for row in of(asked(step, *[(0, 0)] * 4))["mask_B1HW"]] for step in range(250)]
    assert whole[3] == [bool((row == 1).all()) for row in of(asked(3, *[(0, 0)] * 4))["mask_B1HW"]]
    assert 0.26 < np.mean(whole) < 0.34 and len({tuple(row) for row in whole}) > 10


def test_no_weight_moves_for_the_sake_of_what_lies_outside(dataset: Path) -> None:
    """Targets that differ outside of the masks alone give the same gradient, to the last bit."""
    baked = prepare(check_values(masked(dataset)), Events())
    inputs = batch_inputs(baked, 0, 0, (0, 1))
    outside = (inputs["mask_B1HW"] == 0).expand_as(inputs["noise_BCHW"])
    assert outside.any() and not outside.all()

    def gradient(move: Tensor) -> Tensor:
        class Moved:
            def __getattr__(self, name: str) -> Any:
                return getattr(baked.objective, name)

            def target(self, *arguments: Tensor) -> Tensor:
                return baked.objective.target(*arguments) + move

        objective: Any = Moved()
        for group in baked.groups:
            group.zero_gradient()
        loss_of(baked.model, objective, inputs).backward()
        return torch.cat([group.gradient.clone() for group in baked.groups])

    plain = gradient(torch.zeros_like(inputs["noise_BCHW"]))
    assert torch.equal(gradient(5.0 * outside), plain)
    assert not torch.equal(gradient(5.0 * ~outside), plain)


def test_masks_follow_the_mirrored_view(dataset: Path) -> None:
    raw = masked(dataset)
    raw["data"]["flip"] = True
    baked = prepare(check_values(raw), Events())
    (more,) = baked.more_inputs
    straight, mirrored = more(asked(0, (0, 0), (0, 1)))["mask_B1HW"]
    assert torch.equal(straight.flip(2), mirrored) and not torch.equal(straight, mirrored)


def weights_after(baked: Bake) -> Tensor:
    run_loop(baked, 0, Events(), lambda step: False)
    return torch.cat([group.values.detach() for group in baked.groups])


def test_masks_are_trained_with_and_their_draws_change_no_other(dataset: Path) -> None:
    one, half, all_whole = (prepare(check_values(masked(dataset, **more)), Events())
                            for more in ({}, {"unmasked_probability": 0.5}, {"unmasked_probability": 0.999999}))  # fmt: skip
    plain = replace(one, more_inputs=())
    first, second = batch_inputs(one, 2, 0, (0, 1)), batch_inputs(half, 2, 0, (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first if name != "mask_B1HW")
    results = [weights_after(baked) for baked in (plain, all_whole, one, half)]
    assert torch.equal(results[0], results[1]), "a picture that counts whole is a picture without a mask"
    assert not torch.equal(results[0], results[2]) and not torch.equal(results[2], results[3])


def test_what_is_wrong_with_masks_is_told_before_the_run(dataset: Path) -> None:
    plain = {"data": {"folder": str(dataset), "masks": {"source": "files"}}}
    with pytest.raises(Problems, match=r"data\.masks\.source +'files': none of the 6 pictures has a mask\. Put a mask"):
        check_values(plain)
    with pytest.raises(Problems, match=r"'alpha': none of the 6 pictures has a mask\. Use pictures with transparency"):
        check_values({"data": {"folder": str(dataset), "masks": {"source": "alpha"}}})
    raw = masked(dataset)
    Image.new("L", (64, 32), "white").save(next(dataset.rglob("masks")) / "001.png")
    with pytest.raises(Problems, match=r"1_mira/001\.png +its mask is 64x32, the picture 64x64"):
        check_values(raw)


def test_all_black_masks_are_refused(dataset: Path) -> None:
    raw = masked(dataset)
    for path in next(dataset.rglob("masks")).iterdir():
        Image.new("L", (64, 64)).save(path)
    with pytest.raises(Problems, match=r"'files': .*5 of 6 pictures have a mask that is black"):
        check_values(raw)


def test_idle_masks_are_told(dataset: Path) -> None:
    raw = masked(dataset, source="none", unmasked_weight=0.2)
    told = check_values(raw).warnings
    assert "data.masks.unmasked_weight = 0.2 does nothing: data.masks.source is 'none'." in told
    assert any("5 of the pictures have masks, which are not used" in note for note in told)
