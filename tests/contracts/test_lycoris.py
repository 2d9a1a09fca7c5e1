"""Against LyCORIS, layer by layer: the same weights give the same output and gradients, our tensors load there and theirs here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor

from lorabake.adapters import graft, graft_file
from lorabake.base.cards import find

RANK, ALPHA = 2, 1.5
ONE = {"rank": 1, "conv_rank": 1}
COMMON = {"rank": RANK, "alpha": ALPHA, "conv_rank": RANK, "conv_alpha": ALPHA}


@dataclass(frozen=True)
class Case:
    """One network type with one set of options, ours and theirs."""

    adapter: str
    theirs: Any
    ours: Mapping[str, Any]
    """Settings."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    strengths: tuple[float, ...] = (1.0, 0.6)
    """Multipliers at which both mean the same."""
    rank: int = RANK
    """Or what LyCORIS calls it."""
    only_read: bool = False
    """Nothing is trained so any more."""

    def make(self, base: Any) -> Any:
        """Theirs, newborn."""
        return self.theirs("layer", base, 1.0, **{"lora_dim": self.rank, "alpha": ALPHA, **self.options})


BLOCKS_3, BLOCKS_6 = ({"block_size": size, "conv_block_size": size} for size in (3, 6))
FREE, BOUND = {"constraint": 0.0}, {"constraint": 0.05, "rescaled": True}
BOUND_HERE = {"constraint": 0.05, "rescale": True}
CASES = {
    "lora": Case("lora", LoConModule, COMMON),
    "lora tucker": Case("lora", LoConModule, {**COMMON, "tucker": True}, {"use_tucker": True}),
    "lora rs": Case("lora", LoConModule, {**COMMON, "rank_stabilized": True}, {"rs_lora": True}),
    "lora dora": Case("lora", LoConModule, {**COMMON, "dora": True}, {"weight_decompose": True}, (1.0,)),
    "lora dora by inputs": Case(
        "lora", LoConModule, COMMON, {"weight_decompose": True, "wd_on_out": False}, (1.0,), only_read=True
    ),
    "lora tucker dora": Case(
        "lora",
        LoConModule,
        {**COMMON, "tucker": True, "dora": True},
        {"use_tucker": True, "weight_decompose": True},
        (1.0,),
    ),
    "loha": Case("loha", LohaModule, COMMON),
    "loha tucker": Case("loha", LohaModule, {**COMMON, "tucker": True}, {"use_tucker": True}),
    "loha rs": Case("loha", LohaModule, {**COMMON, "rank_stabilized": True}, {"rs_lora": True}),
    "loha dora": Case("loha", LohaModule, {**COMMON, "dora": True}, {"weight_decompose": True}, (1.0,)),
    "lokr": Case("lokr", LokrModule, COMMON),
    "lokr factor": Case("lokr", LokrModule, {**COMMON, "factor": 2}, {"factor": 2}),
    "lokr low rank": Case("lokr", LokrModule, {**COMMON, **ONE, "factor": 2}, {"factor": 2}, rank=1),
    "lokr tucker": Case(
        "lokr",
        LokrModule,
        {**COMMON, **ONE, "factor": 2, "tucker": True},
        {"factor": 2, "use_tucker": True},
        rank=1,
    ),
    "lokr both": Case("lokr", LokrModule, {**COMMON, **ONE, "decompose_both": True}, {"decompose_both": True}, rank=1),
    "lokr full": Case(
        "lokr", LokrModule, {**COMMON, "factor": 3, "full_matrix": True}, {"factor": 3, "full_matrix": True}
    ),
    "lokr dora": Case("lokr", LokrModule, {**COMMON, "dora": True}, {"weight_decompose": True}, (1.0,)),
    "oft": Case("oft", DiagOFTModule, BLOCKS_3, FREE, rank=3),
    "oft rescale": Case("oft", DiagOFTModule, {**BLOCKS_3, **BOUND_HERE}, BOUND, (1.0,), rank=3),
    "boft": Case("boft", ButterflyOFTModule, BLOCKS_6, FREE, rank=6),
    "boft rescale": Case("boft", ButterflyOFTModule, {**BLOCKS_6, **BOUND_HERE}, BOUND, (1.0,), rank=6),
    "ia3": Case("ia3", IA3Module, {"convolutions": True}),
    "ia3 inputs": Case("ia3", IA3Module, {"convolutions": True, "side": "inputs"}, {"train_on_input": True}),
    "glora": Case("glora", GLoRAModule, COMMON),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture
def layers(layers: Any) -> Any:
    """Those with a weight to multiply by: norms are compared in a module of their own."""
    layers.leave_out("norm")
    return layers


def module(case: Case, base: Any) -> Any:
    """Theirs on a layer, with weights as after training."""
    theirs = case.make(base)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return theirs


def reached(layers: Any, case: Case) -> list[tuple[int, Any]]:
    """Layers that the type changes, each with its place: all but those of which the shapes have no meaning there."""
    card = find("adapter", case.adapter)
    fits, settings = card.load()().fits, card.settings(**case.ours)
    return [(index, layer) for index, layer in enumerate(layers.layers()) if fits(layer, settings)]


def saved_of(theirs: Any) -> dict[str, Tensor]:
    """What theirs writes into a file."""
    return {
        name: tensor.detach().clone() for name, tensor in (theirs.custom_state_dict() or theirs.state_dict()).items()
    }


def result(layer: Any, x: Tensor, named: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients by name."""
    out = layer(x)
    weighting = torch.linspace(-1, 1, out.numel()).view(out.shape)
    grads = torch.autograd.grad((out * weighting).sum(), list(named.values()))
    return out.detach(), dict(zip(named, grads, strict=True))


@cases
def test_what_theirs_saves_is_the_same_here(layers: Any, case: Case) -> None:
    found = reached(layers, case)
    assert len(found) >= len(layers.inputs) - 1
    for index, layer in found:
        x, theirs = layers.inputs[index], module(case, layer.module)
        saved = saved_of(theirs)
        for strength in case.strengths:
            theirs.multiplier = strength
            theirs.apply_to()
            expected = layer.module(x).detach()
            theirs.restore()
            ours = graft_file(layers, case.adapter, {layer.key: saved}, strength)
            torch.testing.assert_close(layers.root[index](x), expected, rtol=1e-4, atol=1e-5)
            with ours.ahead():
                torch.testing.assert_close(layers.root[index](x), expected, rtol=1e-4, atol=1e-5)
            ours.remove()
            assert (expected - layer.module(x)).abs().max() > 1e-3


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items() if not case.only_read])
def test_ours_loads_there_with_the_same_output_and_gradients(layers: Any, case: Case, shuffle: Any) -> None:
    card = find("adapter", case.adapter)
    ours = graft(layers, case.adapter, card.settings(**case.ours), seed=1, parts=("denoiser",))
    shuffle(ours)
    ours.training = True
    tensors, parameters = ours.tensors(), ours.parameters()["denoiser"]
    modules = dict(enumerate(layers.root))
    for index, layer in reached(layers, case):
        own = {name.removeprefix(f"{layer.key}."): t for name, t in tensors.items() if name.startswith(f"{layer.key}.")}
        trained = {name: p for name, p in parameters.items() if name.startswith(f"{layer.key}.")}
        theirs = case.make(layer.module)
        named = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(own[name])
        assert named.keys() == {name.removeprefix(f"{layer.key}.") for name in trained}
        for name, constant in theirs.named_buffers():
            if name in own:
                assert constant.dtype.is_floating_point == own[name].dtype.is_floating_point
                assert math.isclose(float(constant), float(own[name]), rel_tol=1e-6)
        theirs.apply_to()
        expected, expected_grads = result(layer.module, layers.inputs[index], named)
        theirs.restore()
        out, grads = result(modules[index], layers.inputs[index], trained)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for name, grad in grads.items():
            if (
                "dora" not in case.options and "weight_decompose" not in case.options
            ):  # they differentiate the norm, too
                torch.testing.assert_close(
                    grad, expected_grads[name.removeprefix(f"{layer.key}.")], rtol=1e-3, atol=1e-4
                )
    ours.remove()


def test_diff_is_their_full(layers: Any) -> None:
    """Output, gradients and file, weights and biases. Theirs has the layer's weight in itself once it is on, and saves the difference."""
    seen = 0
    for index, layer in enumerate(layers.layers()):
        base, x, theirs = layer.module, layers.inputs[index], FullModule("layer", layer.module, 1.0)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        plain = base(x)
        theirs.apply_to()
        saved = {name: tensor.detach().clone() for name, tensor in theirs.custom_state_dict().items()}
        named = {name: p for name, p in (("diff", theirs.weight), ("diff_b", theirs.bias)) if p is not None}
        expected, expected_grads = result(base, x, named)
        theirs.restore()
        base.requires_grad_(False)  # theirs are put back as new ones
        ours = graft_file(layers, "diff", {layer.key: saved})
        parameters = {name.rpartition(".")[2]: p for name, p in ours.parameters()["denoiser"].items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        out, grads = result(layers.root[index], x, parameters)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-5)
        assert saved.keys() == parameters.keys() and (expected - plain).abs().max() > 1e-2
        ours.remove()
        seen += 1
    assert seen == len(layers.inputs)
