"""Preparing a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorabake.base.errors import Interrupted, UserError
from lorabake.base.events import Event, Events
from lorabake.recipe import check_values
from lorabake.train.prepare import prepare


def test_stopped_while_encoding_what_is_done_stays_done(dataset: Path) -> None:
    checked = check_values({"data": {"folder": str(dataset)}, "adapter": {"rank": 1}, "train": {"device": "cpu"}})
    told: list[Event] = []
    with pytest.raises(Interrupted, match="Stopped after encoding 2 of 6 pictures"):
        prepare(checked, Events(told.append), stop=lambda: len(told) == 2)
    assert len(told) == 2
    told.clear()
    baked = prepare(checked, Events(told.append))
    assert [(event["done"], event["total"]) for event in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(baked.latents) == 6


def test_rates_decide_which_parts_are_trained(dataset: Path) -> None:
    raw = {"data": {"folder": str(dataset)}, "adapter": {"rank": 1}, "train": {"device": "cpu"}}
    for rates, parts in (
        ({"lr": 1e-3, "text_encoder_lr": 0.0}, ["denoiser"]),
        ({"lr": 0.0, "text_encoder_lr": 1e-3}, ["text_encoder"]),
        ({"lr": 1e-3, "text_encoder_lr": 1e-4}, ["denoiser", "text_encoder"]),
    ):
        baked = prepare(check_values({**raw, "optimizer": rates}), Events())
        assert [group.name for group in baked.groups] == parts
        assert list(baked.base_rates) == [rate for rate in rates.values() if rate]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed_before_anything_is_loaded(dataset: Path) -> None:
    """Recipes may be written on another machine than the one that trains, so checking them does not ask for it."""
    checked = check_values({"data": {"folder": str(dataset)}, "train": {"device": "cuda"}})
    with pytest.raises(UserError, match=r'train\.device is "cuda".*no GPU here'):
        prepare(checked, Events())
