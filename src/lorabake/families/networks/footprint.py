"""How many bytes a base model's weights take in memory, as they are and in fewer bits: told from its files' headers, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, get_args

from torch import nn

from lorabake.families.networks.latent_model import LatentModel
from lorabake.families.networks.quantised import quantised_layers, stored_size
from lorabake.protocols.family import Model, Quantisation


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a model's weights."""

    networks: Mapping[str, int]
    """Of each network, as it is loaded."""
    quantised: Mapping[Quantisation, Mapping[str, int]]
    """Of each network with each ``model.quantize``."""


def footprint(model: Model) -> Footprint:
    """What a model takes once all of it is in memory. It may be resting: shapes and types are enough, and nothing is read."""
    networks: dict[str, nn.Module] = {**model.parts, "vae": cast(LatentModel, model).vae}
    plain = {name: _bytes(network) for name, network in networks.items()}
    found: dict[Quantisation, Mapping[str, int]] = {}
    for kind in get_args(Quantisation):
        sizes = dict(plain)
        for layer in quantised_layers(model):
            weight = layer.module.weight
            assert isinstance(weight, nn.Parameter)
            sizes[layer.part] += stored_size(weight, kind) - weight.nbytes
        found[kind] = sizes
    return Footprint(plain, found)


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensors in (network.parameters(), network.buffers()) for tensor in tensors)
