"""Limits on the size of a layer's change: kohya's formula, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorabake.adapters import graft
from lorabake.adapters._norms import norm_limit
from lorabake.adapters.full import FullSettings
from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.base.errors import UserError
from lorabake.families import load_model

SETTINGS = LoraSettings(rank=4, alpha=2.0, conv_rank=2)


@pytest.fixture
def grafted() -> Any:
    """A LoRA on the pocket model with changes of all sizes."""
    made: Any = graft(load_model("pocket"), "lora", SETTINGS, seed=1, parts=("denoiser",))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for index, layer in enumerate(made.layers):
            up = layer.tensors["lora_up.weight"]
            up.copy_(torch.randn(up.shape, generator=generator) * 0.03 * (index % 7))
    return made


def deltas(made: Any) -> list[torch.Tensor]:
    return [Lora().delta(layer.base, layer.tensors).detach().clone() for layer in made.layers]


def test_the_norm_is_that_of_the_change(grafted: Any) -> None:
    for layer, delta in zip(grafted.layers, deltas(grafted), strict=True):
        norm = Lora().change_norm(layer.base, layer.tensors)
        torch.testing.assert_close(norm, delta.norm(), rtol=1e-4, atol=1e-7)


def test_the_norm_of_grouped_convolutions() -> None:
    base = torch.nn.Conv2d(8, 12, 3, groups=2)
    weights = {
        "lora_down.weight": torch.randn(2, 4, 3, 3),
        "lora_up.weight": torch.randn(12, 2, 1, 1),
        "alpha": torch.tensor(3.0),
    }
    torch.testing.assert_close(Lora().change_norm(base, weights), Lora().delta(base, weights).norm())


def test_what_is_too_large_is_scaled_as_kohya_does(grafted: Any) -> None:
    before = deltas(grafted)
    norms = torch.stack([delta.norm() for delta in before])
    largest = float(norms.median())
    told = norm_limit(grafted, largest)()
    counted = norms.clamp(min=largest / 2)
    ratios = counted.clamp(max=largest) / counted
    assert 0 < told["norms_scaled"] < len(before) and told["norms_scaled"] == int((ratios < 1).sum())
    for delta, after, ratio in zip(before, deltas(grafted), ratios, strict=True):
        torch.testing.assert_close(after, delta * ratio, rtol=1e-3, atol=1e-7)
    assert told["norm_mean"] == pytest.approx(float((norms * ratios).mean()), rel=1e-4)
    assert told["norm_max"] == pytest.approx(largest, rel=1e-4)


def test_what_is_small_enough_is_left_alone_to_the_bit(grafted: Any) -> None:
    before = {name: tensor.clone() for name, tensor in grafted.tensors().items()}
    told = norm_limit(grafted, 1000.0)()
    assert told["norms_scaled"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in grafted.tensors().items())


def test_whole_models_have_no_change_to_limit() -> None:
    made = graft(load_model("pocket"), "full", FullSettings(), seed=1, parts=("denoiser",))
    with pytest.raises(UserError, match="'full' cannot"):
        norm_limit(made, 1.0)
