"""(IA)³: which side of which layers, what is computed in half precision, and the size of a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorabake.adapters import graft
from lorabake.adapters.ia3 import Ia3, Ia3Settings
from lorabake.base.errors import UserError
from lorabake.families import load_model

PAPER: Any = {r"to_[kv]|[kv]_proj": "outputs", r"net.2|fc2": "inputs", ".": "neither"}


def sides(**given: Any) -> dict[str, str]:
    made: Any = graft(load_model("pocket"), "ia3", Ia3Settings(**given), seed=1, parts=("denoiser", "text_encoder"))
    return {layer.change.layer.key: "inputs" if layer.tensors["on_input"] else "outputs" for layer in made.layers}


def test_sides_are_chosen_by_table() -> None:
    usual = sides()
    assert set(usual.values()) == {"outputs"} and set(sides(side="inputs").values()) == {"inputs"}
    chosen = sides(block_side=PAPER)
    assert chosen == {
        key: "inputs" if key.endswith(("net_2", "fc2")) else "outputs"
        for key in usual
        if key.endswith(("to_k", "to_v", "k_proj", "v_proj", "net_2", "fc2"))
    }
    assert usual.keys() < sides(convolutions=True).keys()
    with pytest.raises(UserError, match="nowhere"):
        sides(block_side={"nowhere": "neither"})
    with pytest.raises(ValueError, match="regular expression"):
        Ia3Settings(block_side={"(": "neither"})


@pytest.mark.parametrize("on_input", [0, 1])
@pytest.mark.parametrize("cells", [3, 300])
def test_small_factors_are_not_rounded_away_in_half_precision(on_input: int, cells: int) -> None:
    base = nn.Linear(16, 32).requires_grad_(False).bfloat16()
    given = {
        "weight": (torch.randn(16 if on_input else 32) * 1e-4).requires_grad_(),
        "on_input": torch.tensor(on_input),
    }
    x, weighting = torch.randn(cells, 16).bfloat16(), torch.randn(cells, 32)
    out = Ia3().forward(base, x, given, 1.0, Ia3Settings(), True)
    (gradient,) = torch.autograd.grad((out.float() * weighting).sum(), given["weight"])
    change = Ia3().change(base.weight.float(), given)
    (exact,) = torch.autograd.grad(((x.float() @ change.t()) * weighting).sum(), given["weight"])
    assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_a_change_has_a_size_that_can_be_scaled() -> None:
    base = nn.Linear(6, 4).requires_grad_(False)
    given = {"weight": torch.randn(4), "on_input": torch.tensor(0)}
    expected = (given["weight"][:, None] * base.weight).norm()
    torch.testing.assert_close(Ia3().change_norm(base, given), expected)
    Ia3().scale_change(given, torch.tensor(0.25))
    torch.testing.assert_close(Ia3().change_norm(base, given), expected / 4)


def test_other_trainers_are_told() -> None:
    assert Ia3Settings(side="inputs").metadata() == {"network_args": {"algo": "ia3", "train_on_input": True}}
