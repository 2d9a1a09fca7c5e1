"""LoRA-FA: one half stays as it was drawn, and no input is kept for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabake.adapters import adopt, graft
from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.adapters.lora_fa import LoraFa, LoraFaSettings
from lorabake.base.cards import find
from lorabake.families import load_model
from lorabake.protocols.family import Layer


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("pocket")


def test_one_half_is_trained_and_both_are_saved(model: Any) -> None:
    made: Any = graft(model, "lora-fa", LoraFaSettings(rank=4), seed=1, parts=("denoiser", "text_encoder"))
    trained = [name for named in made.parameters().values() for name in named]
    saved = list(made.tensors())
    downs = [layer.tensors["lora_down.weight"] for layer in made.layers]
    made.remove()
    assert trained and all(name.endswith(".lora_up.weight") for name in trained)
    assert len(saved) == 3 * len(trained) and not any(tensor.requires_grad for tensor in downs)


def test_it_goes_on_with_the_half_of_a_file(model: Any) -> None:
    parts: Any = ("denoiser",)
    file = graft(model, "lora", LoraSettings(rank=4, alpha=2), seed=1, parts=parts)
    given: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors().items():
        layer, _, suffix = name.partition(".")
        given.setdefault(layer, {})[suffix] = tensor if suffix == "alpha" else tensor + 0.1
    file.remove()
    made = graft(model, "lora-fa", LoraFaSettings(rank=4, alpha=2), seed=2, parts=parts)
    assert adopt(made, given) == 0
    tensors = made.tensors()
    made.remove()
    for layer, own in given.items():
        for suffix, tensor in own.items():
            assert torch.equal(tensors[f"{layer}.{suffix}"], tensor)


def test_what_is_drawn_has_the_papers_variance() -> None:
    layer = Layer("denoiser", "0", nn.Linear(400, 8), "transformer", "lora_unet_0")
    born, _ = LoraFa().create(layer, LoraFaSettings(rank=100), torch.Generator().manual_seed(1))
    assert float(born["lora_down.weight"].var()) == pytest.approx(2 / 500, rel=0.05)
    assert not born["lora_up.weight"].any()


@pytest.mark.parametrize(("kind", "keeps"), [(Lora(), True), (LoraFa(), False)], ids=["lora", "lora-fa"])
def test_inputs_are_not_kept_for_the_backward_pass(kind: Any, keeps: bool) -> None:
    base = nn.Linear(64, 32).requires_grad_(False)
    layer = Layer("denoiser", "0", base, "transformer", "lora_unet_0")
    settings = LoraFaSettings(rank=4)
    weights, constants = kind.create(layer, settings, torch.Generator().manual_seed(1))
    for name, tensor in weights.items():
        tensor.requires_grad_(name not in getattr(kind, "frozen", ()))
    x = torch.randn(500, 64, requires_grad=True)  # as in the middle of a network
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = kind.forward(base, x, {**weights, **constants}, 1.0, settings, True)
    assert any(tensor.numel() == x.numel() for tensor in kept) is keeps
    out.square().sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("rows", [3, 3000])
def test_output_and_gradients_are_those_of_a_lora(rows: int) -> None:
    """However many rows there are: LoRA merges where that is less work, LoRA-FA does not."""
    base, x = nn.Linear(24, 16).requires_grad_(False), torch.randn(rows, 24)
    tensors = {"lora_down.weight": torch.randn(4, 24), "lora_up.weight": torch.randn(16, 4), "alpha": torch.tensor(2.0)}
    tensors["lora_up.weight"].requires_grad_()
    outs = [kind.forward(base, x, tensors, 0.5, LoraFaSettings(rank=4), True) for kind in (Lora(), LoraFa())]
    grads = [torch.autograd.grad(out.mean(), tensors["lora_up.weight"])[0] for out in outs]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_its_size_is_scaled_in_what_is_trained() -> None:
    base = nn.Linear(5, 3)
    tensors = {"lora_down.weight": torch.randn(2, 5), "lora_up.weight": torch.randn(3, 2), "alpha": torch.tensor(2.0)}
    before, down = LoraFa().change_norm(base, tensors), tensors["lora_down.weight"].clone()
    LoraFa().scale_change(tensors, torch.tensor(0.25))
    torch.testing.assert_close(LoraFa().change_norm(base, tensors), before / 4)
    assert torch.equal(tensors["lora_down.weight"], down)


def test_its_files_are_loras() -> None:
    card: Any = find("adapter", "lora-fa")
    assert card.writes == "lora" and not card.also_called
