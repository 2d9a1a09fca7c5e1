"""What every network type promises. New types are found by their cards and need no line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.adapters import graft, graft_file
from lorabake.base.cards import Settings, cards
from lorabake.base.errors import UserError
from lorabake.families import load_model
from lorabake.formats.kohya import Layers, read_lora, write_lora
from lorabake.protocols.adapter import AdapterCard, BiasedLayerType, Graft, LayerType

ALL = [cast(AdapterCard, card) for card in cards("adapter").values()]
LAYERWISE = [card for card in ALL if card.saves == "lora"]
WHOLE = [card for card in ALL if card.saves == "model"]
PARTS = ("denoiser", "text_encoder")

every = pytest.mark.parametrize("card", ALL, ids=lambda card: card.name)
layerwise = pytest.mark.parametrize("card", LAYERWISE, ids=lambda card: card.name)
Shuffle = Callable[..., None]


def everywhere(card: AdapterCard) -> Settings:
    """Settings with which a type reaches every layer it can, at a small rank."""
    wanted = {"rank": 2, "conv_rank": 3, "alpha": 1.5, "block_size": 6, "conv_block_size": 6, "convolutions": True}
    return card.settings(**{name: value for name, value in wanted.items() if name in card.settings.model_fields})


def grafted(model: Any, card: AdapterCard, seed: int = 1, parts: Any = PARTS) -> Graft:
    return graft(model, card.name, everywhere(card), seed=seed, parts=parts)


def trainable(graft_: Graft) -> dict[str, nn.Parameter]:
    return {name: parameter for named in graft_.parameters().values() for name, parameter in named.items()}


def by_layer(tensors: dict[str, Tensor]) -> Layers:
    found: Layers = {}
    for key, tensor in tensors.items():
        layer, _, name = key.partition(".")
        found.setdefault(layer, {})[name] = tensor
    return found


def apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's own arithmetic with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def merged(layer_type: LayerType, module: Any, index: int, *adapters: Graft) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer with the changes of all adapters."""
    weight, bias = module.weight, module.bias
    for adapter in adapters:
        if change := by_layer(adapter.tensors()).get(f"lora_unet_layer_{index}"):
            delta = layer_type.delta(module, change)
            assert delta.shape == weight.shape and delta.abs().max() > 0
            weight = weight + adapter.multiplier * delta
            if isinstance(layer_type, BiasedLayerType):
                bias_delta = layer_type.bias_delta(module, change)
                bias = bias if bias_delta is None else bias + adapter.multiplier * bias_delta
    return weight, bias


def gradients(bench: Any, adapter: Graft) -> dict[str, Tensor]:
    for parameter in trainable(adapter).values():
        parameter.grad = None
    bench.output().square().mean().backward()
    return {name: p.grad.clone() for name, p in trainable(adapter).items() if p.grad is not None}


# ---- on the pocket model: every type


@every
def test_at_birth_the_output_is_unchanged(bench: Any, card: AdapterCard) -> None:
    with torch.no_grad():
        before = bench.output()
        adapter = grafted(bench.model, card)
        after = bench.output()
        adapter.remove()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@every
def test_birth_depends_on_the_seed_alone(bench: Any, card: AdapterCard) -> None:
    born: list[dict[str, Tensor]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(born))
        adapter = grafted(bench.model, card, seed)
        born.append({name: tensor.clone() for name, tensor in adapter.tensors().items()})
        names = trainable(adapter).keys()
        adapter.remove()
    assert all(torch.equal(born[0][name], born[1][name]) for name in born[0])
    if card in LAYERWISE and any(born[0][name].unique().numel() > 1 for name in names):  # else nothing is drawn
        assert any(not torch.equal(born[0][name], born[2][name]) for name in born[0])


@every
def test_taken_off_the_base_is_bit_identical(bench: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    bytes_before = bench.bytes()
    modules = [id(module) for part in bench.model.parts.values() for module in part.modules()]
    with torch.no_grad():
        before = bench.output()
        adapter = grafted(bench.model, card)
        shuffle(adapter)
        assert not torch.equal(bench.output(), before), "the adapter does nothing"
        adapter.remove()
        assert torch.equal(bench.output(), before)
    assert bench.bytes() == bytes_before
    assert [id(module) for part in bench.model.parts.values() for module in part.modules()] == modules


@every
def test_switched_off_it_is_the_base_and_then_itself_again(bench: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    plain = bench.output()
    adapter = grafted(bench.model, card)
    shuffle(adapter)
    adapter.training = True
    with torch.no_grad():
        changed = bench.output()
        with adapter.off():
            assert torch.equal(bench.output(), plain)
        assert torch.equal(bench.output(), changed) and not torch.equal(changed, plain)
    with adapter.ahead():
        with torch.no_grad(), adapter.off():
            assert torch.equal(bench.output(), plain)
        assert not torch.equal(bench.output(), plain)
        bench.output().square().mean().backward()
    assert all(parameter.grad is not None for parameter in trainable(adapter).values())
    adapter.remove()


@every
def test_gradients_reach_what_is_trained_and_nothing_else(bench: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    adapter = grafted(bench.model, card)
    shuffle(adapter)
    adapter.training = True
    found = gradients(bench, adapter)
    ours = {id(parameter) for parameter in trainable(adapter).values()}
    others = [
        f"{part}.{name}"
        for part, module in bench.model.parts.items()
        for name, parameter in module.named_parameters()
        if id(parameter) not in ours and (parameter.grad is not None or parameter.requires_grad)
    ]
    adapter.remove()
    assert found.keys() == trainable_names(bench, card)
    assert [name for name, gradient in found.items() if not torch.isfinite(gradient).all()] == []
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    assert others == []


def trainable_names(bench: Any, card: AdapterCard) -> set[str]:
    adapter = grafted(bench.model, card)
    names = set(trainable(adapter))
    adapter.remove()
    return names


@every
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_asked_for_is_left_alone(bench: Any, card: AdapterCard, part: Any) -> None:
    adapter = grafted(bench.model, card, parts=(part,))
    found = adapter.parameters()
    adapter.remove()
    assert list(found) == [part] and found[part]


@every
def test_recomputed_activations_give_the_same_gradients(bench: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    adapter = grafted(bench.model, card)
    shuffle(adapter)
    adapter.training = True
    kept = gradients(bench, adapter)
    bench.model.checkpoint_gradients(True)
    recomputed = gradients(bench, adapter)
    bench.model.checkpoint_gradients(False)
    adapter.remove()
    torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-9)


@every
@pytest.mark.parametrize("training", [True, False], ids=["in training", "at rest"])
def test_what_is_made_ahead_of_a_pass_changes_nothing(
    bench: Any, card: AdapterCard, shuffle: Shuffle, training: bool
) -> None:
    """The same output and gradients within it; after it, weights that have moved since count again."""
    adapter = grafted(bench.model, card)
    shuffle(adapter)
    adapter.training = training
    plain, output = gradients(bench, adapter), bench.output().detach()
    with adapter.ahead():
        ahead, output_ahead = gradients(bench, adapter), bench.output().detach()
    torch.testing.assert_close(output_ahead, output, rtol=1e-4, atol=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(ahead[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)
    shuffle(adapter, seed=12)
    with torch.no_grad():
        moved = bench.output()
        with adapter.ahead():
            moved_ahead = bench.output()
    adapter.remove()
    assert (moved - output).abs().max() > 1e-3
    torch.testing.assert_close(moved_ahead, moved, rtol=1e-4, atol=1e-5)


@every
def test_ahead_of_a_pass_and_recomputed_activations_agree(bench: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    adapter = grafted(bench.model, card)
    shuffle(adapter)
    adapter.training = True
    with adapter.ahead():
        kept = gradients(bench, adapter)
    bench.model.checkpoint_gradients(True)
    with adapter.ahead():
        recomputed = gradients(bench, adapter)
    bench.model.checkpoint_gradients(False)
    adapter.remove()
    torch.testing.assert_close(recomputed, kept, rtol=1e-5, atol=1e-9)


# ---- layer by layer


@layerwise
def test_the_change_is_its_delta(layers: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    """Forward with the adapter equals forward with merged weights, at every strength."""
    plain = [layer.module for layer in layers.layers()]
    adapter = grafted(layers, card, parts=("denoiser",))
    shuffle(adapter)
    changes, layer_type = by_layer(adapter.tensors()), card.load()()
    assert len(changes) >= 3
    for strength in (1.0, 0.4, -0.7, 0.0) if card.linear else (1.0, 0.0):
        adapter.multiplier = strength
        outputs = layers.outputs()
        for index, module in enumerate(plain):
            expected = apply(module, layers.inputs[index], *merged(layer_type, module, index, adapter))
            torch.testing.assert_close(outputs[index], expected, rtol=1e-5, atol=1e-5)


@layerwise
def test_strength_zero_is_the_base(bench: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    with torch.no_grad():
        before = bench.output()
        adapter = grafted(bench.model, card)
        shuffle(adapter)
        adapter.multiplier = 0.0
        after = bench.output()
        adapter.remove()
    assert torch.equal(after, before)


@layerwise
@pytest.mark.parametrize("first_off", [0, 1])
def test_two_at_once_add_up_and_come_off_in_any_order(
    layers: Any, card: AdapterCard, shuffle: Shuffle, first_off: int
) -> None:
    plain = [layer.module for layer in layers.layers()]
    bare = layers.outputs()
    pair = [grafted(layers, card, seed, parts=("denoiser",)) for seed in (1, 2)]
    for seed, adapter in enumerate(pair):
        shuffle(adapter, seed)
    pair[1].multiplier = 0.5 if card.linear else 1.0
    layer_type = card.load()()

    def expected_of(*adapters: Graft) -> list[Tensor]:
        return [
            apply(module, layers.inputs[index], *merged(layer_type, module, index, *adapters))
            for index, module in enumerate(plain)
        ]

    torch.testing.assert_close(layers.outputs(), expected_of(*pair), rtol=1e-5, atol=1e-5)
    left = pair[1 - first_off]
    expected = expected_of(left)
    pair[first_off].remove()
    torch.testing.assert_close(layers.outputs(), expected, rtol=1e-5, atol=1e-5)
    left.remove()
    assert all(torch.equal(now, before) for now, before in zip(layers.outputs(), bare, strict=True))
    assert [id(module) for module in layers.root] == [id(module) for module in plain]


@layerwise
def test_three_at_once_reach_the_layer_below_them_all(layers: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    plain = [layer.module for layer in layers.layers()]
    stack = [grafted(layers, card, seed, parts=("denoiser",)) for seed in (1, 2, 3)]
    for seed, adapter in enumerate(stack):
        shuffle(adapter, seed)
    layer_type = card.load()()
    for index, (module, output) in enumerate(zip(plain, layers.outputs(), strict=True)):
        expected = apply(module, layers.inputs[index], *merged(layer_type, module, index, *stack))
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    stack[1].remove()
    stack[0].remove()
    stack[2].remove()
    assert [id(module) for module in layers.root] == [id(module) for module in plain]


@layerwise
def test_saved_and_loaded_gives_the_same_output(
    bench: Any, card: AdapterCard, shuffle: Shuffle, tmp_path: Path
) -> None:
    adapter = grafted(bench.model, card)
    shuffle(adapter)
    with torch.no_grad():
        trained = bench.output()
    write_lora(tmp_path / "x.safetensors", adapter.tensors(), {}, "fp32")
    adapter.remove()
    loaded = graft_file(bench.model, card.name, read_lora(tmp_path / "x.safetensors").layers)
    with torch.no_grad():
        drawn = bench.output()
    assert not any(parameter.requires_grad for parameter in trainable(loaded).values())
    loaded.remove()
    torch.testing.assert_close(drawn, trained, rtol=0, atol=0)


@layerwise
def test_a_file_that_does_not_fit_changes_nothing(layers: Any, card: AdapterCard, shuffle: Shuffle) -> None:
    adapter = grafted(layers, card, parts=("denoiser",))
    shuffle(adapter)
    good = by_layer({name: tensor.clone() for name, tensor in adapter.tensors().items()})
    adapter.remove()
    modules = [id(module) for module in layers.root.modules()]
    key = next(iter(good))
    trained = next(name for name, tensor in good[key].items() if tensor.dim() > 0)
    bad: dict[str, tuple[Layers, str]] = {
        "another model's layer": ({**good, "lora_unet_elsewhere": good[key]}, "1 of its .* lora_unet_elsewhere"),
        "another shape": ({**good, key: {**good[key], trained: good[key][trained][..., :-1]}}, "expected|missing"),
        "a tensor gone": (
            {**good, key: {n: t for n, t in good[key].items() if n != trained}},
            rf"{trained}' is missing",
        ),
        "only alpha": ({**good, key: {"alpha": torch.tensor(1.0)}}, "is missing|alpha"),
        "a tensor more": ({**good, key: {**good[key], "mystery": torch.ones(1)}}, r"mystery"),
    }
    for name, (layers_, message) in bad.items():
        with pytest.raises(UserError, match=message):
            graft_file(layers, card.name, layers_)
            pytest.fail(f"{name} was accepted")
        assert [id(module) for module in layers.root.modules()] == modules, name


@pytest.mark.parametrize("card", WHOLE, ids=lambda card: card.name)
def test_a_saved_model_is_a_base_model(bench: Any, card: AdapterCard, shuffle: Shuffle, tmp_path: Path) -> None:
    adapter = grafted(bench.model, card)
    shuffle(adapter)
    with torch.no_grad():
        trained = bench.output()
    bench.model.save(tmp_path / "tuned")
    adapter.remove()
    tuned = load_model(tmp_path / "tuned")
    with torch.no_grad():
        drawn = tuned.predict(
            bench.latents, bench.timesteps, tuned.encode_text(tuned.tokenize(["1girl, red hair, beach", "1boy, night"]))
        )
    torch.testing.assert_close(drawn, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("card", WHOLE, ids=lambda card: card.name)
def test_a_whole_model_is_not_grafted_from_a_file(layers: Any, card: AdapterCard) -> None:
    with pytest.raises(UserError, match="base model"):
        graft_file(layers, card.name, {"lora_unet_layer_0": {"diff": torch.zeros(18, 12)}})
