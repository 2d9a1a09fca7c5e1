"""Which blocks wait, and what becomes of their weights."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabake.families import load_model
from lorabake.families.networks.swapping import BlockSwap, evenly


@given(st.integers(1, 80), st.integers(1, 100))
def test_those_that_wait_are_spread(blocks: int, count: int) -> None:
    chosen = evenly(blocks, count)
    assert len(chosen) == min(blocks, count) and chosen == sorted(set(chosen)) and chosen[-1] < blocks
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert chosen[0] <= -(-blocks // len(chosen)) and blocks - chosen[-1] <= -(-blocks // len(chosen))


def test_by_hand() -> None:
    assert evenly(6, 3) == [1, 3, 5] and evenly(57, 57) == list(range(57)) and evenly(4, 9) == [0, 1, 2, 3]


@pytest.mark.parametrize("late", [True, False])
def test_weights_are_where_they_should_be(late: bool) -> None:
    """However they came, and after they have gone and come again: at home, but for the one whose turn it is."""
    model: Any = load_model("pocket", late=late)
    whole = {name: tensor.clone() for name, tensor in load_model("pocket").parts["denoiser"].state_dict().items()}
    swap = BlockSwap(model.unet, model.unet.blocks(), torch.device("cpu"))
    for _ in range(2):
        model.wake(["denoiser"])
        swap._settle()
        for index in range(len(model.unet.blocks())):
            swap._fetch(index)
            places = {place.untyped_storage().data_ptr() for place in swap._places}
            for other, modules in enumerate(model.unet.blocks()):
                weights = [tensor for module in modules for tensor in module.parameters()]
                assert {weight.untyped_storage().data_ptr() in places for weight in weights} == {other == index}
        found = model.unet.state_dict()
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
        model.rest(["denoiser"])
        assert model.resting() >= {"denoiser"}


def test_a_model_that_is_let_go_is_gone() -> None:
    model: Any = load_model("pocket")
    swap = BlockSwap(model.unet, model.unet.blocks(), torch.device("cpu"))
    swap._settle()
    held, homes = weakref.ref(model.unet), [weakref.ref(block.home.untyped_storage()) for block in swap._waiting]
    del model, swap
    gc.collect()
    assert held() is None and homes and all(home() is None for home in homes)
