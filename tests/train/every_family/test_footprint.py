"""What validate tells of the base's memory, against what every family's networks take once they are read."""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
from torch import nn

from lorabake.families import family_card, footprint, load_model
from lorabake.families.networks.latent_model import LatentModel
from lorabake.families.networks.quantised import quantise, saved
from lorabake.protocols.family import Quantisation
from lorabake.recipe import check


def taken(network: nn.Module) -> int:
    """Bytes of what is in memory of a network; weights in few bits apart."""
    tensors = (*network.parameters(), *network.buffers())
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


def test_it_is_what_the_networks_take(kitchen: Any) -> None:
    checked = check(kitchen.recipe)
    reading = checked.recipe.model.reading(family_card(checked.facts).text_options)
    told = footprint(checked.facts, "bf16", **reading)
    for kind in (None, *get_args(Quantisation)):
        model = load_model(checked.facts, late=True, dtype=torch.bfloat16, **reading)
        networks = {**model.parts, "vae": cast(LatentModel, model).vae}
        if kind:
            quantise(model, kind)
        model.wake([*model.parts, "vae"])
        layers, few, dense = saved(model)
        expected = told.quantised[kind] if kind else told.networks
        assert sum(map(taken, networks.values())) + few == sum(expected.values())
        assert sum(told.networks.values()) - sum(expected.values()) == dense - few
        assert bool(layers) == bool(kind)
