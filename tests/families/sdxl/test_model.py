"""SDXL against diffusers' own pipeline: tokens, text, framing, latents, and whole pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorabake.base.errors import UserError
from lorabake.families import inspect_model, load_model
from lorabake.families.sdxl.model import SDXLModel
from lorabake.protocols.family import Framing, Model
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.draw import draw

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

CAPTIONS = ["1girl, red hair, smile, beach", "wow! such hair!!", "", "blue dress, " * 40]


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


def difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of any channel of any pixel, of 255."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


# ---- text


def test_each_text_encoder_has_its_own_padding(model: Model, pipeline: Any) -> None:
    tokens = model.tokenize(CAPTIONS)
    for name, tokenizer in (("text_encoder", pipeline.tokenizer), ("text_encoder_2", pipeline.tokenizer_2)):
        theirs = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        assert torch.equal(tokens[name], theirs.input_ids)
    assert tokens["text_encoder"][2, -1] == pipeline.tokenizer.eos_token_id
    assert tokens["text_encoder_2"][2, -1] == 0, "'!' fills the second one's rows"


@torch.no_grad()
def test_text_is_what_the_pipeline_encodes(model: Model, pipeline: Any) -> None:
    given = model.encode_text(model.tokenize(CAPTIONS))
    tokens, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    assert given["text_BLD"].shape == (4, 77, 64 + 128) and given["pooled_BD"].shape == (4, 96)
    torch.testing.assert_close(given["text_BLD"], tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given["pooled_BD"], pooled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_long_captions_are_joined_and_their_pooled_text_is_the_first_windows(folder: Path) -> None:
    short, long = load_model(folder), load_model(folder, max_tokens=150)
    caption = "blue dress, " * 40
    first, whole = (model.encode_text(model.tokenize([caption])) for model in (short, long))
    assert whole["text_BLD"].shape == (1, 152, 192)
    torch.testing.assert_close(whole["text_BLD"][:, :76], first["text_BLD"][:, :76], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole["pooled_BD"], first["pooled_BD"], rtol=1e-5, atol=1e-5)


# ---- framing and prediction


def test_framing_is_told_height_first(model: Model) -> None:
    framings = [Framing((3000, 2000), (32, 16), (1152, 896)), Framing((64, 80), (0, 0), (64, 80))]
    told = model.frame(framings)
    assert set(told) == {"time_ids_B6"}
    assert told["time_ids_B6"].tolist() == [[2000, 3000, 16, 32, 896, 1152], [80, 64, 0, 0, 80, 64]]


@torch.no_grad()
def test_the_prediction_is_diffusers(model: Model, pipeline: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    latents, timesteps = torch.randn(2, 4, 16, 24, generator=generator), torch.tensor([37, 810])
    text = model.encode_text(model.tokenize(CAPTIONS[:2]))
    framing = model.frame([Framing((300, 200), (8, 0), (96, 64)), Framing((96, 64), (0, 0), (96, 64))])
    given = model.predict(latents, timesteps, text | framing)
    added = {"text_embeds": text["pooled_BD"], "time_ids": framing["time_ids_B6"]}
    expected = pipeline.unet(latents, timesteps, text["text_BLD"], added_cond_kwargs=added).sample
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    unframed = model.frame([Framing((96, 64), (0, 0), (96, 64))] * 2)
    assert (model.predict(latents, timesteps, text | unframed)[0] - given[0]).abs().max() > 1e-3


# ---- the autoencoder


@torch.no_grad()
def test_latents_are_scaled_as_sdxl_has_them(model: Model, pipeline: Any) -> None:
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = model.encode_images(images)
    theirs = pipeline.vae.encode(images).latent_dist.mean * 0.13025
    torch.testing.assert_close(latents, theirs, rtol=1e-5, atol=1e-5)
    decoded = pipeline.vae.decode(latents / 0.13025).sample
    torch.testing.assert_close(
        model.decode_latents(latents), decoded, rtol=1e-5, atol=1e-5 * float(decoded.abs().max())
    )


@pytest.mark.parametrize(
    ("asked", "of_vae"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_the_autoencoder_never_runs_in_half_precision(folder: Path, asked: torch.dtype, of_vae: torch.dtype) -> None:
    model = load_model(folder, dtype=asked)
    assert model.dtype == asked
    assert isinstance(model, SDXLModel)
    assert {parameter.dtype for parameter in model.vae.parameters()} == {of_vae}
    assert {parameter.dtype for part in model.parts.values() for parameter in part.parameters()} == {asked}


# ---- whole pictures

PROMPTS = [
    Prompt("1girl, red hair, twintails", "monochrome", seed=1, steps=4, cfg=4),
    Prompt("blue dress, standing, forest", seed=2, steps=3, cfg=6, width=80, height=48),
    Prompt("1boy, black hair", seed=3, steps=4, cfg=1),
]


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_pictures_are_those_of_the_pipeline(model: Model, pipeline: Any, sampler: str) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    ours = draw(model, [dataclasses.replace(prompt, sampler=sampler) for prompt in PROMPTS])
    own = pipeline.scheduler
    pipeline.scheduler = own if sampler == "euler" else DDIMScheduler.from_config(own.config, clip_sample=False)
    try:
        for prompt, picture in zip(PROMPTS, ours, strict=True):
            theirs = pipeline(
                prompt.text, negative_prompt=prompt.negative, num_inference_steps=prompt.steps, guidance_scale=prompt.cfg,
                width=prompt.width or 64, height=prompt.height or 64, generator=torch.Generator("cpu").manual_seed(prompt.seed),
            ).images[0]  # fmt: skip
            assert np.asarray(theirs).std() > 20, "a picture with something in it"
            assert picture.size == theirs.size
            assert difference(picture, theirs) <= 2
    finally:
        pipeline.scheduler = own


# ---- there and back


@torch.no_grad()
def test_what_is_saved_is_the_same_model_here_and_in_diffusers(model: Model, folder: Path, tmp_path: Path) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    changed = load_model(folder)
    changed.parts["denoiser"].get_parameter("conv_out.bias").add_(0.25)
    changed.parts["text_encoder_2"].get_parameter("text_projection.weight").mul_(1.5)
    changed.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    for part, module in changed.parts.items():
        state = again.parts[part].state_dict()
        assert state.keys() == module.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert dataclasses.replace(again.facts, path=folder, name="", digest="") == dataclasses.replace(
        model.facts, path=folder, name="", digest=""
    )
    theirs: Any = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, add_watermarker=False
    )
    theirs.set_progress_bar_config(disable=True)
    prompt = PROMPTS[0]
    picture = theirs(
        prompt.text, negative_prompt=prompt.negative, num_inference_steps=prompt.steps, guidance_scale=prompt.cfg,
        generator=torch.Generator("cpu").manual_seed(prompt.seed),
    ).images[0]  # fmt: skip
    (ours,) = draw(again, [dataclasses.replace(prompt, sampler="euler")])
    assert difference(ours, picture) <= 2
    (before,) = draw(model, [dataclasses.replace(prompt, sampler="euler")])
    assert difference(ours, before) > 5, "the change is in the saved model"


def test_a_folder_without_its_second_text_encoder_says_so(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/text_encoder_2/model.safetensors").unlink()
    shutil.rmtree(tmp_path / "model/tokenizer_2")
    with pytest.raises(UserError) as caught:
        load_model(inspect_model(tmp_path / "model"))
    assert "text_encoder_2" in str(caught.value) and "tokenizer_2" in str(caught.value)
