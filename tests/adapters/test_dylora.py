"""DyLoRA: what it trains as is what its file is cut to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabake.adapters.dylora import Dylora, DyloraSettings, truncated
from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.base.errors import UserError
from lorabake.protocols.family import Layer

BASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(10, 8), (3, 10)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "convolution in groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5)),
}
bases = pytest.mark.parametrize(("make", "shape"), BASES.values(), ids=BASES.keys())


def born(make: Any, settings: DyloraSettings) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A layer, weights as after training (leaves), and alpha."""
    torch.manual_seed(2)
    base = make().requires_grad_(False)
    weights, constants = Dylora().create(
        Layer("denoiser", "0", base, "resnet", "lora_unet_0"), settings, torch.Generator()
    )
    trained = {name: torch.randn_like(tensor).mul_(0.3).requires_grad_() for name, tensor in weights.items()}
    return base, trained, constants["alpha"]


@bases
@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize("one_unit", [False, True])
def test_in_training_it_is_one_of_its_smaller_loras(
    make: Any, shape: tuple[int, ...], unit: int, one_unit: bool
) -> None:
    """Each of them is met, and none else; so output and gradients are those of the file cut to that rank."""
    settings = DyloraSettings(rank=6, conv_rank=6, alpha=3, conv_alpha=3, unit=unit, one_unit=one_unit)
    base, weights, alpha = born(make, settings)
    x = torch.randn(shape)
    plain = LoraSettings(rank=6)
    cuts = {}
    for rank in range(1, 7):
        small = truncated({"layer": {**weights, "alpha": alpha}}, rank)["layer"]
        assert small["lora_up.weight"].shape[1] == rank and float(small["alpha"]) == pytest.approx(3 / 6 * rank)
        cuts[rank] = Lora().forward(base, x, small, 0.7, plain, training=False).detach()
    met = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out = Dylora().forward(base, x, {**weights, "alpha": alpha}, 0.7, settings, training=True)
        (rank,) = (rank for rank, cut in cuts.items() if torch.allclose(out, cut, rtol=1e-5, atol=1e-5))
        met.add(rank)
        grads = dict(zip(weights, torch.autograd.grad(out.square().sum(), list(weights.values())), strict=True))
        first = rank - (rank - 1) % unit - 1 if one_unit else 0
        of_ups = grads["lora_up.weight"].transpose(0, 1).flatten(1)
        of_downs = grads["lora_down.weight"].unflatten(0, (-1, 6)).transpose(0, 1).flatten(1)
        for found in (of_ups, of_downs):
            assert [bool(row.any()) for row in found] == [first <= index < rank for index in range(6)]
    assert met == {1: {1, 2, 3, 4, 5, 6}, 2: {2, 4, 6}, 4: {4, 6}}[unit]


@bases
def test_at_rest_it_is_a_lora(make: Any, shape: tuple[int, ...]) -> None:
    settings = DyloraSettings(rank=6, conv_rank=6)
    base, weights, alpha = born(make, settings)
    x, tensors = torch.randn(shape), {**weights, "alpha": alpha}
    outs = [kind.forward(base, x, tensors, 1.0, settings, training=False) for kind in (Dylora(), Lora(), Dylora())]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_cut_layers_of_fewer_ranks_and_without_alpha_stay_as_they_are() -> None:
    small = {"lora_down.weight": torch.randn(2, 5), "lora_up.weight": torch.randn(3, 2)}
    (cut,) = truncated({"layer": small}, 4).values()
    assert float(cut["alpha"]) == 2
    assert torch.equal(cut["lora_down.weight"], small["lora_down.weight"])
    assert torch.equal(cut["lora_up.weight"], small["lora_up.weight"])


def test_what_is_no_plain_lora_is_not_cut() -> None:
    half = {"lora_down.weight": torch.zeros(2, 5)}
    with pytest.raises(UserError, match=r"lora_up\.weight' is missing"):
        truncated({"layer": half}, 1)
    with pytest.raises(UserError, match="dora_scale' is no tensor of a plain LoRA"):
        truncated({"layer": {**half, "lora_up.weight": torch.zeros(3, 2), "dora_scale": torch.ones(3, 1)}}, 1)
    with pytest.raises(UserError, match="cut to rank 0"):
        truncated({}, 0)


def test_a_unit_of_all_ranks_would_be_a_lora() -> None:
    with pytest.raises(ValueError, match="that is 'lora'"):
        DyloraSettings(rank=8, unit=8)
    assert DyloraSettings(rank=8, unit=4).metadata()["network_args"] == {"unit": 4}
