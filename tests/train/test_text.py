"""Captions are encoded once where that cannot change anything."""

from __future__ import annotations

import pytest
import torch

from lorabake.families import load_model
from lorabake.protocols.family import Model
from lorabake.train.text import TextSource, conditioning_of

CAPTIONS = ["1girl, red hair, smile, beach", "night", "", "1boy, blue eyes, forest, sitting, hat"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("pocket")


def conditioning(model: Model, source: TextSource, captions: list[str]) -> torch.Tensor:
    return conditioning_of(model, source(captions))["text_BLD"]


def test_cached_equals_uncached(model: Model) -> None:
    cached, plain = (TextSource(model, trained=False, repeating=repeating) for repeating in (True, False))
    for captions in (CAPTIONS, CAPTIONS[::-1], CAPTIONS[1:2] * 3):
        torch.testing.assert_close(
            conditioning(model, cached, captions), conditioning(model, plain, captions), rtol=1e-5, atol=1e-5
        )


def test_what_is_kept_does_not_depend_on_the_company_it_came_in(model: Model) -> None:
    """Else a run that goes on after a kill, and meets captions in other batches first, would end with other bytes."""
    reference = {
        caption: conditioning(model, TextSource(model, trained=False, repeating=True), [caption])[0]
        for caption in CAPTIONS
    }
    for captions in (CAPTIONS, CAPTIONS[2:], CAPTIONS[::-1], [CAPTIONS[0]] * 2 + [CAPTIONS[3]]):
        rows = conditioning(model, TextSource(model, trained=False, repeating=True), captions)
        assert all(torch.equal(row, reference[caption]) for row, caption in zip(rows, captions, strict=True))


def test_each_caption_is_encoded_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda ids: asked.append(len(ids)) or real(ids))
    source = TextSource(model, trained=False, repeating=True)
    for captions in (CAPTIONS[:2], CAPTIONS, CAPTIONS[::-1]):
        source(captions)
    assert sum(asked) == len(CAPTIONS)


@pytest.mark.parametrize("repeating", [True, False])
def test_a_trained_encoder_gets_gradients_every_time(model: Model, repeating: bool) -> None:
    weight = model.parts["text_encoder"].get_submodule("text_model.final_layer_norm").get_parameter("weight")
    weight.requires_grad_(True)
    source = TextSource(model, trained=True, repeating=repeating)
    gradients = [
        torch.autograd.grad(conditioning(model, source, CAPTIONS[:2]).square().sum(), weight)[0] for _ in range(2)
    ]
    weight.requires_grad_(False)
    assert torch.equal(*gradients) and gradients[0].any()
    assert not conditioning(model, TextSource(model, trained=False, repeating=repeating), CAPTIONS[:1]).requires_grad


def test_only_what_cannot_change_is_kept(model: Model) -> None:
    """All else is token ids, under the names of the text encoders; :func:`conditioning_of` leaves what is none of them alone."""
    for trained, repeating, names in (
        (False, True, {"text_BLD"}),
        (False, False, {"text_encoder"}),
        (True, True, {"text_encoder"}),
    ):
        assert TextSource(model, trained=trained, repeating=repeating)(CAPTIONS).keys() == names
    told = {"text_BLD": torch.ones(1, 2, 3), "time_ids_B6": torch.ones(1, 6)}
    assert conditioning_of(model, told) == told
