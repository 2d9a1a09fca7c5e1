"""Noise in the loop: the plain one is what it always was, and what is added to a picture is the picture's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorabake.base.events import Events
from lorabake.base.streams import torch_stream
from lorabake.recipe import check_values
from lorabake.train.bake import Bake
from lorabake.train.loop import batch_inputs, loss_of
from lorabake.train.prepare import prepare


def bake(dataset: Path, **objective: Any) -> Bake:
    raw: dict[str, dict[str, Any]] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu"},
        "objective": objective,
    }
    return prepare(check_values(raw), Events())


def plain(shape: Any, step: int, micro: int) -> Tensor:
    return torch.randn(shape, generator=torch_stream(42, "noise", step, micro))


def test_the_stream_of_noise_is_what_it_always_was(dataset: Path) -> None:
    """Runs that were started long ago must go on to the same bytes."""
    baked = bake(dataset)
    inputs = batch_inputs(baked, 3, 1, (4, 2))
    assert torch.equal(inputs["noise_BCHW"], plain(inputs["latents_BCHW"].shape, 3, 1))
    assert "mixed_BCHW" not in inputs


@pytest.mark.parametrize("objective", [{"noise": "offset"}, {"noise": "pyramid"}, {"input_perturbation": 0.1}], ids=str)
def test_an_option_changes_nothing_else(dataset: Path, objective: dict[str, Any]) -> None:
    without, given = (batch_inputs(bake(dataset, **settings), 3, 0, (4, 2)) for settings in ({}, objective))
    changed = {name for name in given if name not in without or not torch.equal(given[name], without[name])}
    assert changed == ({"mixed_BCHW"} if "noise" not in objective else {"noise_BCHW"})


def added(baked: Bake, step: int, micro: int, batch: tuple[int, ...]) -> Tensor:
    """What an offset and a perturbation add to plain noise, BC and BCHW in one."""
    inputs = batch_inputs(baked, step, micro, batch)
    noise = inputs["noise_BCHW"]
    shift = noise - plain(noise.shape, step, micro)
    assert float((shift - shift[:, :, :1, :1]).abs().max()) < 1e-5
    return torch.stack([shift, inputs["mixed_BCHW"] - noise], dim=1)


def test_what_is_added_is_the_pictures_own(dataset: Path) -> None:
    baked = bake(dataset, noise="offset", noise_offset=0.5, noise_offset_random=True, input_perturbation=0.3, input_perturbation_random=True)  # fmt: skip
    pair, turned, alone = (added(baked, 3, 0, batch) for batch in ((4, 2), (2, 4), (4,)))
    torch.testing.assert_close(pair[[1, 0]], turned, rtol=0, atol=1e-5)
    torch.testing.assert_close(pair[:1], alone, rtol=0, atol=1e-5)
    others = [added(baked, *when, (4,)) for when in ((4, 0), (3, 1))]
    twice = added(baked, 3, 0, (4, 4))
    different = [alone[0], *(other[0] for other in others), twice[1], pair[1]]
    for index, one in enumerate(different):
        assert all(float((one - other).abs().max()) > 0.01 for other in different[:index])


def test_what_is_asked_for_is_the_noise_without_its_perturbation(dataset: Path) -> None:
    """A model that sees through the perturbation, and says what plain noise there was, makes no error."""
    baked = bake(dataset, input_perturbation=0.3)
    inputs = batch_inputs(baked, 3, 0, (4, 2))

    class Knowing:
        facts, parts = baked.model.facts, baked.model.parts

        def encode_text(self, tokens: Any) -> Any:
            return {}

        def predict(self, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Any) -> Tensor:
            mixed = baked.objective.corrupt(inputs["latents_BCHW"], inputs["mixed_BCHW"], timesteps_B)
            assert torch.equal(latents_BCHW, mixed), "what is mixed in is perturbed"
            return inputs["noise_BCHW"]

    model: Any = Knowing()
    assert float(loss_of(model, baked.objective, inputs)) == 0.0
