"""Networks that no step needs leave memory, and nothing of a run changes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.events import Events
from lorabake.families import inspect_model, load_model
from lorabake.recipe import check
from lorabake.train.prepare import prepare
from lorabake.train.run import train

STATIC = ("optimizer.text_encoder_lr=0", "data.captions.shuffle=false", "train.length=3 steps", "save.every=2 steps")


def bytes_of(network: torch.nn.Module) -> int:
    """Bytes of weights that have storage."""
    return sum(tensor.untyped_storage().nbytes() for tensor in network.state_dict().values() if not tensor.is_meta)


def results(folder: Path) -> dict[str, bytes]:
    wanted = [*folder.glob("checkpoints/*.safetensors"), *folder.glob("samples/*.png"), folder / "events.jsonl"]
    return {path.name: path.read_bytes() for path in wanted}


def test_text_encoders_and_vae_are_gone_once_they_have_spoken(kitchen: Any) -> None:
    baked = prepare(check(kitchen.recipe, STATIC), Events())
    model: Any = baked.model
    encoders = {name: part for name, part in model.parts.items() if name != "denoiser"}
    assert baked.idle == model.resting() == encoders.keys() | {"vae"}
    assert bytes_of(model.vae) == 0 < bytes_of(model.parts["denoiser"])
    for encoder in encoders.values():  # a CLIP without a projection gets one of its own, which is in no file
        assert bytes_of(encoder) <= max(tensor.nbytes for tensor in encoder.state_dict().values() if tensor.dim() == 2)
        assert all(tensor.is_meta for name, tensor in encoder.state_dict().items() if "text_projection" not in name)


def test_samples_and_checkpoints_are_those_of_a_model_that_stays(
    kitchen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, told = check(kitchen.recipe, STATIC), list[Any]()
    train(checked, tmp_path / "resting", Events(told.append))
    assert not [event for event in told if event["kind"] == "samples_failed"]
    monkeypatch.setattr("lorabake.families.networks.latent_model.LatentModel.rest", lambda self, names: None)
    train(checked, tmp_path / "staying", Events())
    resting = results(tmp_path / "resting")
    assert resting == results(tmp_path / "staying")
    assert sum(name.endswith(".png") for name in resting) == 3


def test_what_rests_wakes_by_being_used(kitchen: Any) -> None:
    facts = inspect_model(kitchen.folder / "model")
    there, late = load_model(facts), load_model(facts, late=True)
    assert late.resting() == {*late.parts, "vae"} and there.resting() == frozenset()
    image_BCHW = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(late.encode_images(image_BCHW), there.encode_images(image_BCHW))
    assert late.resting() == {*late.parts}
    tokens = there.tokenize(["red hair"])
    told = there.encode_text(tokens)
    assert all(torch.equal(tensor, told[name]) for name, tensor in late.encode_text(tokens).items())
    assert late.resting() == {"denoiser"}
    late.wake(["denoiser"])
    for part, network in there.parts.items():
        state = late.parts[part].state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
