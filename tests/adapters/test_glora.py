"""GLoRA: two ways of computing it, a core in a file, another alpha, and the size of a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.functional import tucker_weight_from_conv
from torch import Tensor, nn

from lorabake.adapters import graft_file
from lorabake.adapters.glora import Glora, GloraSettings
from lorabake.families import load_model
from lorabake.protocols.family import Layer


def tensors(base: Any, rank: int = 3, alpha: float = 2.0) -> dict[str, Tensor]:
    """As after training."""
    layer = Layer("denoiser", "x", base, "transformer", "lora_unet_x")
    settings = GloraSettings(rank=rank, alpha=alpha, conv_rank=rank, conv_alpha=alpha)
    weights, constants = Glora().create(layer, settings, torch.Generator().manual_seed(1))
    return {**{name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in weights.items()}, **constants}


@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("rank", [1, 24])
def test_beside_and_merged_agree(rows: int, rank: int) -> None:
    base = nn.Linear(48, 64).requires_grad_(False)
    given = tensors(base, rank)
    x = torch.randn(rows, 48)
    trained = [tensor.requires_grad_() for name, tensor in given.items() if name != "alpha"]
    results = []
    for out in (
        Glora().forward(base, x, given, 0.6, GloraSettings(), True),
        nn.functional.linear(x, Glora().changed(base.weight, given, 0.6), base.bias),
    ):
        results.append((out, torch.autograd.grad((out * out.detach().cos()).sum(), trained)))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        drawn = Glora().forward(base, x, given, 0.6, GloraSettings(), False)
    torch.testing.assert_close(drawn, results[0][0], rtol=1e-4, atol=1e-4)


def test_a_core_is_read_where_a_file_has_one() -> None:
    model = load_model("pocket")
    layer = next(layer for layer in model.layers() if layer.key.endswith("conv1"))
    base: Any = layer.module
    given = tensors(base)
    given["b2.weight"], given["bm.weight"] = torch.randn(3, base.weight.shape[1], 1, 1), torch.randn(3, 3, 3, 3)
    a1, a2 = given["a1.weight"].flatten(1), given["a2.weight"].flatten(1)
    b = tucker_weight_from_conv(given["b1.weight"], given["b2.weight"], given["bm.weight"])
    of_inputs = torch.einsum("oihw,ij->ojhw", base.weight, a1 @ a2)
    made: Any = graft_file(model, "glora", {layer.key: given})
    found = Glora().delta(base, made.layers[0].tensors)
    torch.testing.assert_close(found, (of_inputs + b) * (2 / 3), rtol=1e-4, atol=1e-4)


def test_another_alpha_and_another_size() -> None:
    base = nn.Conv2d(4, 6, 3).requires_grad_(False)
    given = tensors(base)
    change = Glora().delta(base, given)
    torch.testing.assert_close(Glora().delta(base, Glora().rescaled(given, 3.0)), change * 3, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Glora().change_norm(base, given), change.norm())
    Glora().scale_change(given, torch.tensor(0.2))
    torch.testing.assert_close(Glora().delta(base, given), change * 0.2, rtol=1e-4, atol=1e-5)


def test_grouped_convolutions_are_left_alone() -> None:
    settings = GloraSettings(conv_rank=2)
    plain, grouped = (
        Layer("denoiser", "x", nn.Conv2d(4, 4, 3, groups=groups), "resnet", "lora_unet_x") for groups in (1, 2)
    )
    assert Glora().fits(plain, settings) and not Glora().fits(grouped, settings)
