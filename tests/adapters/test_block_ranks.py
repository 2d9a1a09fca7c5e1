"""Ranks by block, layers left out, and the rank-stabilised scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lorabake.adapters import graft, graft_file
from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.formats.metadata import TrainingFacts


def grafted(**settings: Any) -> Any:
    return graft(load_model("pocket"), "lora", LoraSettings(**settings), seed=1, parts=("denoiser",))


def ranks(made: Any) -> dict[str, int]:
    return {layer.change.layer.key: layer.tensors["lora_down.weight"].shape[0] for layer in made.layers}


def test_the_first_pattern_decides_the_rank() -> None:
    usual, chosen = (
        ranks(grafted(rank=4)),
        ranks(grafted(rank=4, block_rank={"mid_block": 8, r"attn2\.to_[kv]$": 0, "attn2": 1})),
    )
    for key, rank in usual.items():
        expected = (
            8
            if "mid_block" in key
            else 0
            if key.endswith(("attn2_to_k", "attn2_to_v"))
            else 1
            if "attn2" in key
            else rank
        )
        assert chosen.get(key, 0) == expected, key
    assert {0, 1, 4, 8} == {chosen.get(key, 0) for key in usual}


def test_residual_blocks_can_be_chosen_without_all_of_them() -> None:
    usual, chosen = ranks(grafted(rank=4)), ranks(grafted(rank=4, block_rank={"mid_block.resnets": 2}))
    more = chosen.keys() - usual.keys()
    assert more and all("mid_block_resnets" in key and chosen[key] == 2 for key in more)


def test_alpha_goes_along_so_that_the_scale_stays() -> None:
    made = grafted(rank=8, alpha=4.0, conv_rank=2, conv_alpha=1.0, block_rank={"mid_block": 2})
    for layer in made.layers:
        rank = layer.tensors["lora_up.weight"].shape[1]
        assert float(layer.tensors["alpha"]) / rank == 0.5


def test_layers_have_the_alpha_that_the_first_pattern_says() -> None:
    """Also where their rank is another, and on convolutions; others keep alpha along with the rank."""
    given = {r"mid_block\.resnets": 3.0, "mid_block": 6.0, "attn2": 1.5}
    made = grafted(
        rank=8, alpha=4.0, conv_rank=2, conv_alpha=1.0, block_rank={"mid_block": 2, "to_q": 4}, block_alpha=given
    )
    found: set[float] = set()
    for layer in made.layers:
        path, rank = layer.change.layer.path, layer.tensors["lora_up.weight"].shape[1]
        chosen = (
            3.0 if "mid_block.resnets" in path else 6.0 if "mid_block" in path else 1.5 if "attn2" in path else rank / 2
        )
        assert float(layer.tensors["alpha"]) == chosen, path
        found.add(chosen / rank)
    assert found == {1.5, 3.0, 0.5, 0.1875, 0.375}


def test_a_changed_alpha_scales_the_change() -> None:
    made, other = (grafted(rank=4, block_alpha={"mid_block": alpha}) for alpha in (2.0, 6.0))
    for one, three in zip(made.layers, other.layers, strict=True):
        for layer in (one, three):
            layer.tensors["lora_up.weight"].detach().fill_(0.01)
        deltas = (Lora().delta(layer.base, layer.tensors) for layer in (three, one))
        factor = 3 if "mid_block" in one.change.layer.path else 1
        torch.testing.assert_close(next(deltas), factor * next(deltas))


def test_rank_stabilised_alphas_by_layer() -> None:
    for layer in grafted(
        rank=16, rank_stabilized=True, block_rank={"mid_block": 4}, block_alpha={"mid_block": 3.0}
    ).layers:
        inside = "mid_block" in layer.change.layer.path
        assert float(layer.tensors["alpha"]) == (3.0 * 2 if inside else 16.0 * 4)


@pytest.mark.parametrize("wrong", [{"mid": 0}, {"mid": -1.0}, {"mid": math.inf}, {"(mid": 2.0}, {"mid": "x"}], ids=str)
def test_what_is_no_table_of_alphas(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LoraSettings(rank=4, block_alpha=wrong)


def test_a_pattern_of_alphas_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"adapter\.block_alpha: 'middle' is in no name"):
        grafted(rank=4, block_alpha={"middle": 2.0})


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"adapter\.block_rank: 'middle' is in no name .* such as 'lora_unet_.*' and 'denoiser\."
    ):
        grafted(rank=4, block_rank={"mid_block": 2, "middle": 2})
    with pytest.raises(UserError, match="finds no layer to train"):
        grafted(rank=4, block_rank={"denoiser": 0})


@pytest.mark.parametrize("wrong", [{"mid": -1}, {"mid": 1025}, {"(mid": 2}, {"mid": 1.5}], ids=str)
def test_what_is_no_table_of_ranks(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LoraSettings(rank=4, block_rank=wrong)


@pytest.mark.parametrize(("rank", "alpha"), [(16, 4.0), (9, None)])
def test_rank_stabilised_files_say_the_same_to_everybody(rank: int, alpha: float | None) -> None:
    """Every reader scales by alpha / rank; that must be alpha / sqrt(rank) of the settings."""
    made = grafted(rank=rank, alpha=alpha, rank_stabilized=True, block_rank={"mid_block": 4})
    with torch.no_grad():
        for layer in made.layers:
            layer.tensors["lora_up.weight"].fill_(0.01)
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in made.tensors().items():
        key, _, suffix = name.partition(".")
        by_layer.setdefault(key, {})[suffix] = tensor
    read = graft_file(load_model("pocket"), "lora", by_layer)
    for layer, again in zip(made.layers, read.layers, strict=True):  # pyright: ignore[reportAttributeAccessIssue]
        down, up = layer.tensors["lora_down.weight"], layer.tensors["lora_up.weight"]
        its_rank = up.shape[1]
        its_alpha = (alpha or rank) * its_rank / rank
        expected = (up.flatten(1) @ down.flatten(1)) * its_alpha / math.sqrt(its_rank)
        found = Lora().delta(again.base, again.tensors)
        torch.testing.assert_close(found.flatten(1), expected.detach(), rtol=1e-5, atol=1e-7)


def test_files_tell() -> None:
    told = LoraSettings(rank=4, block_rank={"mid": 0}, rank_stabilized=True).metadata()
    assert told["network_args"] == {"block_rank": {"mid": 0}, "rs_lora": True}
    assert told.keys() <= TrainingFacts.__dataclass_fields__.keys()
    assert LoraSettings(block_alpha={"mid": 2.0}).metadata()["network_args"] == {"block_alpha": {"mid": 2.0}}
    assert LoraSettings().metadata()["network_args"] == {}
