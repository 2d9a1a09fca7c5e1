"""Recomputing a share of the activations: the same gradients to the last bit, from ever less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorabake.base.errors import Problems
from lorabake.base.events import Events
from lorabake.recipe import check
from lorabake.train.loop import batch_loss
from lorabake.train.prepare import prepare

SHARES = ("false", "0.25", "0.5", "0.75", "true")


def test_each_share_keeps_less_and_changes_nothing(kitchen: Any) -> None:
    gradients: list[torch.Tensor] = []
    kept: list[int] = []
    for share in SHARES:
        baked = prepare(check(kitchen.recipe, [f"train.gradient_checkpointing={share}"]), Events())
        for group in baked.groups:
            group.values.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = batch_loss(baked, 0, 0, (0, 2))
        kept.append(sum(sizes.values()))
        loss.backward()
        gradients.append(torch.cat([group.gradient for group in baked.groups]).clone())
    assert all(torch.equal(gradients[0], other) for other in gradients[1:]) and gradients[0].any()
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[2] > kept[-1]


@pytest.mark.parametrize("share", ["1.5", "-0.1", "'half'", "0.0"])
def test_what_is_no_share_is_refused(kitchens: Any, share: str) -> None:
    with pytest.raises(Problems, match=r"train\.gradient_checkpointing"):
        check(kitchens("sd1").recipe, [f"train.gradient_checkpointing={share}"])
