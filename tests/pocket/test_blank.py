"""A blank model is a whole diffusers folder with a denoiser that predicts nothing yet."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lorabake.base.errors import UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.families import inspect_model, load_model
from lorabake.pocket.architecture import LATENT_CHANNELS
from lorabake.pocket.blank import BlankModel, Preparation, blank_model, new_denoiser
from lorabake.pocket.decoder import DecoderTraining
from lorabake.pocket.textmodel import TextWarmUp
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.draw import draw

_QUICK = Preparation(pictures=60, decoder=DecoderTraining(steps=2), text=TextWarmUp(steps=2, batch_size=4))


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> BlankModel:
    return blank_model(tmp_path_factory.mktemp("blank") / "model", preparation=_QUICK)


def test_it_loads_has_the_shipped_models_shape_and_draws(blank: BlankModel) -> None:
    facts, shipped = inspect_model(blank.folder), inspect_model(POCKET_MODEL)
    for name in ("family", "prediction", "resolution", "pixel_step", "latent_scale", "latent_channels", "architecture"):
        assert getattr(facts, name) == getattr(shipped, name)
    model, real = load_model(facts), load_model(shipped)
    for part in model.parts:
        shapes, real_shapes = (
            {name: tensor.shape for name, tensor in m.parts[part].state_dict().items()} for m in (model, real)
        )
        assert shapes == real_shapes
    torch.testing.assert_close(model.betas_T, real.betas_T)
    picture = draw(model, [Prompt("1girl, red hair", steps=2)])[0]
    assert picture.size == (64, 64)
    assert 10 < blank.round_trip_db < 30 and math.isfinite(blank.to_dict()["reading"])


def test_the_denoiser_predicts_zero_and_every_layer_gets_a_gradient_in_time(blank: BlankModel) -> None:
    unet = load_model(blank.folder).parts["denoiser"]
    latents, timesteps, text = (
        torch.randn(2, LATENT_CHANNELS, 16, 16),
        torch.tensor([10, 900]),
        torch.randn(2, 77, 128),
    )
    with torch.no_grad():
        assert not unet(latents, timesteps, text).any()
    unet.requires_grad_(True)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (unet(latents, timesteps, text) - torch.randn_like(latents)).square().mean().backward()
        optimizer.step()
    asleep = [name for name, parameter in unet.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not asleep


def test_denoisers_differ_by_seed_only() -> None:
    states = [new_denoiser(seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv_in.weight"], states[2]["conv_in.weight"])


def test_a_folder_with_something_in_it_is_refused(blank: BlankModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not empty"):
        blank_model(blank.folder, preparation=_QUICK)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        blank_model(tmp_path / "file", preparation=_QUICK)


@pytest.mark.slow
def test_diffusers_loads_and_runs_it(blank: BlankModel) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(blank.folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "1girl, red hair",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images[0]
    ours = draw(load_model(blank.folder), [Prompt("1girl, red hair", seed=5, steps=3, cfg=4.0)])[0]
    pixels = torch.frombuffer(bytearray(ours.tobytes()), dtype=torch.uint8).view(64, 64, 3).permute(2, 0, 1) / 255
    assert (theirs - pixels).abs().max() < 2 / 255
