"""Running averages of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorabake.optimizers._averages import Averages
from lorabake.optimizers._flat import FlatGroup


def groups() -> list[FlatGroup]:
    generator = torch.Generator().manual_seed(1)
    return [
        FlatGroup(name, {"a": nn.Parameter(torch.randn(3, 4, generator=generator))}) for name in ("denoiser", "text")
    ]


def test_they_are_diffusers() -> None:
    from diffusers.training_utils import EMAModel

    ours = groups()
    averages = Averages(ours, [0.5, 0.9])
    theirs = {
        decay: EMAModel([group.values for group in ours], decay=decay, use_ema_warmup=False) for decay in (0.5, 0.9)
    }
    generator = torch.Generator().manual_seed(2)
    for step in range(30):
        with torch.no_grad():
            for group in ours:
                group.values.add_(torch.randn(group.values.shape, generator=generator))
        averages.update(step)
        for model in theirs.values():
            model.step([group.values for group in ours])
    for decay, model in theirs.items():
        for group, expected in zip(ours, model.shadow_params, strict=True):
            torch.testing.assert_close(averages.tensors()[f"ema{decay:g}.{group.name}"], expected, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    (group,) = groups()[:1]
    with torch.no_grad():
        group.values.zero_()
    averages = Averages([group], [0.15])
    (average,) = averages.tensors().values()
    with torch.no_grad():
        group.values.fill_(1.0)
    averages.update(0)
    assert float(average[0]) == 1.0, "the first is taken as it is"
    with torch.no_grad():
        group.values.fill_(2.0)
    averages.update(1)
    assert float(average[0]) == pytest.approx(0.15 * 1.0 + 0.85 * 2.0), "2/11 is above the decay"


def test_looking_at_one_leaves_the_weights() -> None:
    ours = groups()
    averages = Averages(ours, [0.9])
    first = [group.values.detach().clone() for group in ours]
    with torch.no_grad():
        for group in ours:
            group.values.mul_(3.0)
    before = [group.values.detach().clone() for group in ours]
    with averages.as_weights(0.9):
        assert all(torch.equal(group.values, value) for group, value in zip(ours, first, strict=True))
    assert all(torch.equal(group.values, value) for group, value in zip(ours, before, strict=True))
