"""What a model takes in memory, told before any of it is read."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from lorabake.families import footprint, inspect_model, load_model
from lorabake.families.networks.latent_model import LatentModel
from lorabake.families.networks.quantised import quantise, stored, stored_size
from lorabake.families.networks.residence import STORED
from lorabake.protocols.family import Quantisation


@pytest.mark.parametrize("kind", get_args(Quantisation))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 64), (5, 77), (64, 2)])
def test_a_stored_weight_takes_what_is_told(kind: Any, shape: tuple[int, int]) -> None:
    assert stored_size(torch.empty(shape, device="meta"), kind) == stored(torch.ones(shape), kind).nbytes


def in_memory(model: Any) -> dict[str, int]:
    """Bytes of each network that is awake, stored weights by what is stored of them."""
    found: dict[str, int] = {}
    for name, network in {**model.parts, "vae": model.vae}.items():
        kept = [module.__dict__[STORED].nbytes for module in network.modules() if STORED in module.__dict__]
        tensors = [tensor for module in network.modules()
                   for tensor in (*module._parameters.values(), *module._buffers.values())]  # fmt: skip
        storages = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor is not None and not tensor.is_meta}
        found[name] = sum(kept) + sum(storages.values())
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_pocket_model_takes_what_is_told(precision: str) -> None:
    facts, dtype = inspect_model("pocket"), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    told = footprint(facts, precision)
    assert in_memory(load_model(facts, dtype=dtype)) == told.networks
    for kind in get_args(Quantisation):
        model = load_model(facts, late=True, dtype=dtype)
        assert isinstance(model, LatentModel)
        quantise(model, kind)
        model.wake([*model.parts, "vae"])
        assert in_memory(model) == told.quantised[kind]
        assert told.quantised[kind]["denoiser"] < told.networks["denoiser"]


def test_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabake.families.networks import residence

    monkeypatch.setattr(residence.Residence, "wake", lambda self: pytest.fail("weights are read"))
    assert sum(footprint(inspect_model("pocket"), "bf16").networks.values()) > 0
