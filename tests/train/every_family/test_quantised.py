"""Training on a base in few bits, for every family: without naming one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.errors import Problems
from lorabake.base.events import Events
from lorabake.families import load_model
from lorabake.families.networks.quantised import QuantisedLinear, quantised_layers, saved
from lorabake.formats.kohya import read_lora
from lorabake.recipe import check, check_values
from lorabake.recipe.load import read_raw
from lorabake.sampling.apply import apply_lora
from lorabake.train.bake import Bake
from lorabake.train.loop import batch_loss
from lorabake.train.prepare import prepare
from lorabake.train.run import train

KINDS = ("int8", "fp8", "nf4")
FROZEN = ("optimizer.text_encoder_lr=0", "data.captions.shuffle=false")


def baked(kitchen: Any, *options: str) -> Bake:
    return prepare(check(kitchen.recipe, [*FROZEN, *options]), Events())


def in_full(bake: Bake) -> Bake:
    """The same model with its layers as ordinary ones, of the weights that the few bits stand for."""
    for layer in quantised_layers(bake.model):
        module: Any = layer.module
        if isinstance(module, QuantisedLinear) and "stored" in module.__dict__:
            weight = module.weight
            del module.__dict__["stored"]
            plain: Any = module
            plain.__class__ = torch.nn.Linear
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    return bake


def gradient(bake: Bake) -> torch.Tensor:
    for group in bake.groups:
        group.values.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        group.zero_gradient()
    batch_loss(bake, 0, 0, (0, 2)).backward()
    return torch.cat([group.gradient for group in bake.groups]).clone()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_weights_it_stands_for(kitchen: Any, kind: str) -> None:
    bake = baked(kitchen, f"model.quantize='{kind}'")
    layers, now, before = saved(bake.model)
    assert layers > 5 and now < {"int8": 0.4, "fp8": 0.4, "nf4": 0.2}[kind] * before
    ours, theirs = gradient(bake), gradient(in_full(bake))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert theirs.any()


def test_nothing_is_quantised_unless_it_is_asked_for(kitchen: Any) -> None:
    assert saved(baked(kitchen).model) == (0, 0, 0)


def test_taken_off_it_leaves_the_base_as_it_was(kitchen: Any) -> None:
    bake = baked(kitchen, "model.quantize='nf4'")
    before = [layer.module.__dict__["stored"] for layer in quantised_layers(bake.model) if layer.part == "denoiser"]
    copies = [(one.values.clone(), one.scale.clone()) for one in before]
    gradient(bake)
    bake.graft.remove()
    after = [layer.module.__dict__["stored"] for layer in quantised_layers(bake.model) if layer.part == "denoiser"]
    for (values, scale), one in zip(copies, after, strict=True):
        assert torch.equal(values, one.values) and torch.equal(scale, one.scale)


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_a_killed_run_goes_on_to_the_same_bytes(kitchens: Any, tmp_path: Path, kind: str) -> None:
    options = [*FROZEN, f"model.quantize='{kind}'", "train.length=4 steps", "save.every=2 steps"]
    checked, told = check(kitchens("flux").recipe, options), list[Any]()
    train(checked, tmp_path / "whole", Events(told.append))
    assert any("model.quantize: " in event.get("text", "") for event in told)
    stops = itertools.count()
    train(checked, tmp_path / "cut", Events(), stop=lambda: next(stops) == 1)
    train(checked, tmp_path / "cut", Events())
    files = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(files) == 2
    for file in files:
        assert (tmp_path / "cut" / "checkpoints" / file.name).read_bytes() == file.read_bytes()
    model = load_model(kitchens("flux").folder / "model")
    assert len(apply_lora(model, files[0]).tensors()) == sum(map(len, read_lora(files[0]).layers.values()))


def test_it_learns_about_as_much(kitchens: Any, tmp_path: Path, losses: Any) -> None:
    """The losses of a whole run on weights that are a little off."""

    def losses_with(name: str, *options: str) -> torch.Tensor:
        train(check(kitchens("sd1").recipe, [*FROZEN, *options]), tmp_path / name, Events())
        return torch.tensor(losses(tmp_path / name))

    plain = losses_with("plain")
    for kind, off in {"int8": 0.02, "fp8": 0.05, "nf4": 0.15}.items():
        ours = losses_with(kind, f"model.quantize='{kind}'")
        assert ours[-5:].mean() == pytest.approx(float(plain[-5:].mean()), rel=off)
        assert not torch.equal(ours, plain)


def test_adapters_that_ask_for_a_weight_get_it(kitchens: Any) -> None:
    bake = baked(kitchens("flux"), "model.quantize='int8'", "adapter.dropout=0.1")
    assert gradient(bake).any()
    layer = next(layer for layer in quantised_layers(bake.model) if layer.part == "denoiser")
    weight: Any = layer.module.weight
    assert weight.shape == (layer.module.out_features, layer.module.in_features) and not weight.is_meta


def test_what_trains_the_weights_themselves_is_refused(kitchens: Any) -> None:
    with pytest.raises(Problems, match=r"model\.quantize.*'nf4': adapter 'full' trains the weights"):
        check_values({**read_raw(kitchens("sd1").recipe, ["model.quantize='nf4'"]), "adapter": {"name": "full"}})
