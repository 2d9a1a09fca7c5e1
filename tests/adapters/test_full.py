"""Full fine-tuning as an adapter."""

from __future__ import annotations

import torch

from lorabake.adapters import graft
from lorabake.adapters.full import FullSettings
from lorabake.families import load_model


def test_it_trains_float32_copies_of_every_weight() -> None:
    model = load_model("pocket", dtype=torch.bfloat16)
    originals = dict(model.parts["denoiser"].named_parameters())
    adapter = graft(model, "full", FullSettings(), seed=1, parts=("denoiser",))
    trained = adapter.parameters()["denoiser"]
    assert trained.keys() == {f"denoiser.{name}" for name in originals}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in trained.values())
    assert all(p.data_ptr() != originals[name.removeprefix("denoiser.")].data_ptr() for name, p in trained.items())
    adapter.remove()
    now = dict(model.parts["denoiser"].named_parameters())
    assert all(now[name] is parameter for name, parameter in originals.items())


def test_taking_it_off_twice_does_nothing_more() -> None:
    model = load_model("pocket")
    adapter = graft(model, "full", FullSettings(), seed=1, parts=("text_encoder",))
    adapter.remove()
    before = list(model.parts["text_encoder"].parameters())
    adapter.remove()
    assert all(a is b for a, b in zip(model.parts["text_encoder"].parameters(), before, strict=True))
