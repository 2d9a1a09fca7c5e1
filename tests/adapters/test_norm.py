"""Changed norms: which, in half precision, and where PyTorch would crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorabake.adapters import graft
from lorabake.adapters.norm import Norm, NormSettings
from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.formats.kohya import network_type, read_lora, write_lora
from lorabake.sampling.apply import adapter_of, apply_lora


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("pocket")


def names(model: Any, **settings: Any) -> set[str]:
    """Tensors of a newborn adapter."""
    made = graft(model, "norm", NormSettings(**settings), seed=1, parts=("denoiser", "text_encoder"))
    found = set(made.tensors())
    made.remove()
    return found


def test_norms_have_their_layers_names(model: Any) -> None:
    found = names(model)
    for layer in (
        "lora_unet_down_blocks_0_resnets_0_norm1",
        "lora_unet_mid_block_attentions_0_norm",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm3",
        "lora_te_text_model_encoder_layers_0_layer_norm1",
    ):
        assert {f"{layer}.w_norm", f"{layer}.b_norm"} <= found
    assert not any("conv_norm_out" in name for name in found), "no trainer changes it"
    assert names(model, bias=False) == {name for name in found if name.endswith(".w_norm")}


def test_they_are_chosen_by_name(model: Any) -> None:
    found = names(model, blocks={"resnets": False, "mid_block": True, ".": False})
    assert found and all("mid_block" in name and "resnets" not in name for name in found)
    with pytest.raises(UserError, match=r"adapter\.blocks: 'middle' is in no name"):
        names(model, blocks={"middle": False})


def test_its_files_are_read_back(model: Any, tmp_path: Path) -> None:
    made = graft(model, "norm", NormSettings(), seed=1, parts=("denoiser",))
    write_lora(tmp_path / "x.safetensors", made.tensors(), {}, "fp16")
    made.remove()
    file = read_lora(tmp_path / "x.safetensors")
    assert network_type(file.layers) == adapter_of(tmp_path / "x.safetensors", file) == "norm"
    apply_lora(model, tmp_path / "x.safetensors").remove()


@pytest.mark.parametrize("base", [nn.LayerNorm(8), nn.GroupNorm(4, 8)], ids=["layer norm", "group norm"])
def test_small_changes_are_not_rounded_away_in_half_precision(base: Any) -> None:
    """Computed beside the base, whose own output is nothing here: so that nothing of the change can be lost in it."""
    base, x = base.to(torch.bfloat16).requires_grad_(False), torch.randn(2, 8, dtype=torch.bfloat16)
    base.weight.zero_()
    change = {"w_norm": torch.full((8,), 1e-3), "b_norm": torch.full((8,), -1e-4)}
    out = Norm().forward(base, x, change, 1.0, NormSettings(), training=False)
    base.weight.fill_(1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), base(x).float() * 1e-3 - 1e-4, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("wants_gradient", [True, False])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_group_norms_learn_whatever_they_are_given(wants_gradient: bool, memory: torch.memory_format) -> None:
    """The first norm of a network is given what nothing before it learns from."""
    base: Any = nn.GroupNorm(2, 8).requires_grad_(False)
    x = torch.randn(2, 8, 6, 6).to(memory_format=memory).requires_grad_(wants_gradient)
    change = {"w_norm": torch.full((8,), 0.3, requires_grad=True), "b_norm": torch.zeros(8, requires_grad=True)}
    out = Norm().forward(base, x, change, 1.0, NormSettings(), training=True)
    torch.testing.assert_close(out, base(x) * 1.3)
    (out.square().sum() / 2).backward()
    grads: Any = [tensor.grad for tensor in change.values()]
    plain = base(x).detach()
    torch.testing.assert_close(grads[0], (plain.square() * 1.3).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[1], (plain * 1.3).sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_its_size_is_told_and_scaled() -> None:
    base, tensors = nn.LayerNorm(2), {"w_norm": torch.tensor([3.0, 4.0]), "b_norm": torch.ones(2)}
    assert float(Norm().change_norm(base, tensors)) == 5
    Norm().scale_change(tensors, torch.tensor(0.2))
    torch.testing.assert_close(tensors, {"w_norm": torch.tensor([0.6, 0.8]), "b_norm": torch.full((2,), 0.2)})
