"""Weights leave memory and come back as they were."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families import load_model

IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


def test_nothing_holds_what_rests() -> None:
    model: Any = load_model("pocket", dtype=torch.bfloat16)  # in another type than in the file: memory of its own
    held = [weakref.ref(parameter) for parameter in model.text_encoder.parameters()]
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in model.text_encoder.parameters()]
    model.rest(["text_encoder"])
    gc.collect()
    assert held and not [ref for ref in (*held, *storages) if ref() is not None]
    assert {parameter.dtype for parameter in model.text_encoder.parameters()} == {torch.bfloat16}


def test_a_model_that_is_let_go_is_gone() -> None:
    model: Any = load_model("pocket", late=True)
    held = weakref.ref(model.unet)
    del model
    gc.collect()
    assert held() is None


def test_what_is_trained_stays() -> None:
    model: Any = load_model("pocket")
    weight = model.text_encoder.text_model.final_layer_norm.weight
    weight.requires_grad_(True)
    model.rest(["text_encoder", "vae"])
    assert model.resting() == {"vae"}
    assert model.text_encoder.text_model.final_layer_norm.weight is weight


def test_it_comes_and_goes_as_often_as_one_likes() -> None:
    model: Any = load_model("pocket")
    before = model.encode_images(IMAGE)
    for _ in range(3):
        model.rest(["vae"])
        model.rest(["vae"])
        assert torch.equal(model.encode_images(IMAGE), before)
        model.wake(["vae"])
    assert not any(module._forward_pre_hooks for module in model.vae.modules())


def test_several_threads_may_wake_it_at_once() -> None:
    model: Any = load_model("pocket", late=True)
    with ThreadPoolExecutor(4) as pool:
        latents = list(pool.map(model.encode_images, [IMAGE] * 8))
    assert all(torch.equal(latents[0], other) for other in latents)


def test_a_file_that_has_changed_meanwhile_is_not_read(tmp_path: Path) -> None:
    shutil.copytree(POCKET_MODEL, tmp_path / "pocket")
    model: Any = load_model(tmp_path / "pocket")
    model.rest(["vae"])
    (file,) = (tmp_path / "pocket" / "vae").glob("*.safetensors")
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match="has changed since it was opened"):
        model.encode_images(IMAGE)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        model.encode_images(IMAGE)


def test_text_encoders_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    """Wherever they lie, and whatever lies beside them."""
    shutil.copytree(POCKET_MODEL, tmp_path / "same")
    shutil.copytree(POCKET_MODEL, tmp_path / "other")
    (file,) = (tmp_path / "other" / "text_encoder").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    spaces = [load_model(base).text_space for base in ("pocket", tmp_path / "same", tmp_path / "other")]
    assert spaces[0] == spaces[1] != spaces[2]
