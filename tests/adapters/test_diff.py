"""Whole changes of layers: which, with what, in half precision, and files of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorabake.adapters import graft, graft_file
from lorabake.adapters.diff import Diff, DiffSettings
from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.formats.kohya import network_type, read_lora, write_lora
from lorabake.sampling.apply import adapter_of, apply_lora


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("pocket")


def names(model: Any, **settings: Any) -> set[str]:
    """Tensors of a newborn adapter on the denoiser."""
    made = graft(model, "diff", DiffSettings(**settings), seed=1, parts=("denoiser",))
    found = set(made.tensors())
    made.remove()
    return found


def test_layers_are_chosen_by_kind_and_by_name(model: Any) -> None:
    usual, whole = names(model), names(model, convolutions=True)
    assert usual < whole and not any("resnets" in name for name in usual) and any("resnets" in name for name in whole)
    mid, attention = names(model, blocks={"mid_block": True, ".": False}), names(model, blocks={"ff_net": False})
    assert mid == {name for name in whole if "mid_block" in name and ("attentions" in name or "resnets" in name)}
    assert attention == {name for name in usual if "ff_net" not in name}
    with pytest.raises(UserError, match=r"adapter\.blocks: 'middle' is in no name"):
        names(model, blocks={"middle": False})
    with pytest.raises(ValueError, match="no regular expression"):
        DiffSettings(blocks={"(": True})


def test_biases_are_trained_where_there_are_some_and_they_are_wanted(model: Any) -> None:
    biased = {layer.key for layer in model.layers() if layer.module.bias is not None}
    with_, without = names(model), names(model, bias=False)
    assert without == {name for name in with_ if name.endswith(".diff")}
    assert with_ - without == {
        f"{name.partition('.')[0]}.diff_b" for name in without if name.partition(".")[0] in biased
    }
    assert with_ - without


def test_its_files_are_read_back_whatever_they_leave_out(model: Any, tmp_path: Path) -> None:
    """LyCORIS calls them "full", which is another adapter here: one that trains models."""
    made = graft(model, "diff", DiffSettings(), seed=1, parts=("denoiser",))
    path, bare = tmp_path / "x.safetensors", tmp_path / "bare.safetensors"
    write_lora(path, made.tensors(), {}, "fp32")
    write_lora(bare, {name: value for name, value in made.tensors().items() if name.endswith(".diff")}, {}, "fp32")
    made.remove()
    file = read_lora(path)
    assert network_type(file.layers) == "full" and adapter_of(path, file) == "diff"
    for given, tensors in ((path, {"diff", "diff_b"}), (bare, {"diff"})):
        applied = apply_lora(model, given)
        assert {name.rpartition(".")[2] for name in applied.tensors()} == tensors
        applied.remove()


@pytest.mark.parametrize("base", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, padding=1)], ids=["linear", "convolution"])
def test_small_changes_are_not_rounded_away_in_half_precision(base: Any) -> None:
    """Added to a weight in bfloat16, a change of a thousandth of it would be nothing."""
    base = base.to(torch.bfloat16)
    nn.init.ones_(base.weight)
    nn.init.zeros_(base.bias)
    x = torch.ones((2, 6) if isinstance(base, nn.Linear) else (2, 6, 3, 3), dtype=torch.bfloat16)
    tensors = {"diff": torch.full(base.weight.shape, -0.9995), "diff_b": torch.full(base.bias.shape, 0.25)}
    base.weight.data -= 1  # the base gives nothing, so that all is the change
    out = Diff().forward(base, x, tensors, 0.5, DiffSettings(), training=False)
    summands = 6 if isinstance(base, nn.Linear) else 54
    assert out.dtype == torch.bfloat16
    middle = out if isinstance(base, nn.Linear) else out[:, :, 1, 1]
    torch.testing.assert_close(
        middle.float(), torch.full_like(middle.float(), 0.5 * (0.25 - 0.9995 * summands)), rtol=1e-2, atol=0
    )


def test_its_size_is_told_and_scaled() -> None:
    base, tensors = nn.Linear(3, 2), {"diff": torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]), "diff_b": torch.ones(2)}
    assert float(Diff().change_norm(base, tensors)) == 5
    Diff().scale_change(tensors, torch.tensor(0.2))
    assert float(Diff().change_norm(base, tensors)) == pytest.approx(1)
    torch.testing.assert_close(tensors["diff_b"], torch.full((2,), 0.2))


def test_left_out_a_layer_is_the_base_with_its_bias() -> None:
    base, x = nn.Linear(3, 2), torch.randn(4, 3)
    tensors = {"diff": torch.ones(2, 3), "diff_b": torch.ones(2)}
    settings = DiffSettings(module_dropout=0.5)
    torch.manual_seed(1)
    outs = [Diff().forward(base, x, tensors, 1.0, settings, training=True) for _ in range(20)]
    kinds = [torch.equal(out, base(x)) for out in outs]
    changed = base(x) + x.sum(1, keepdim=True) + 1
    assert 0 < sum(kinds) < 20
    for out, same in zip(outs, kinds, strict=True):
        torch.testing.assert_close(out, base(x) if same else changed)


def test_a_file_of_another_model_is_refused(model: Any) -> None:
    key = next(layer.key for layer in model.layers() if layer.group == "transformer")
    with pytest.raises(UserError, match="expected"):
        graft_file(model, "diff", {key: {"diff": torch.zeros(2, 2)}})
