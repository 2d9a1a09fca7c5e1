"""Flux.1 against diffusers' own pipeline: tokens, text, latents, predictions, gradients, and whole pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorabake.adapters import graft, graft_file
from lorabake.adapters.lora import LoraSettings
from lorabake.base.errors import UserError
from lorabake.families import caption_readers, inspect_model, load_model
from lorabake.families.flux.model import FluxModel
from lorabake.families.networks.flux_layout import diffusers_pieces
from lorabake.formats.kohya import read_lora, write_lora
from lorabake.protocols.family import Framing, Model
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.draw import draw

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

CAPTIONS = ["a girl, red hair, beach", "red girls!", "", "a red girl, " * 200]


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


def inputs(model: Model) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents of two pictures of 8 × 12 cells, timesteps and conditioning."""
    torch.manual_seed(3)
    latents = torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        return latents, torch.tensor([730.5, 21.0]), model.encode_text(model.tokenize(CAPTIONS[:2]))


def answer(theirs: Any, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor], guidance: Tensor | None) -> Tensor:
    """What diffusers' denoiser says, packed and unpacked by its pipeline."""
    batch, channels, height, width = latents.shape
    ids = theirs._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, torch.float32)
    output = theirs.transformer(
        hidden_states=theirs._pack_latents(latents, batch, channels, height, width),
        encoder_hidden_states=text["text_BLD"],
        pooled_projections=text["pooled_BD"],
        timestep=timesteps / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(text["text_BLD"].shape[1], 3),
        guidance=guidance,
    ).sample
    return theirs._unpack_latents(output, 2 * height, 2 * width, vae_scale_factor=2)


def test_facts(folder: Path, theirs: Any) -> None:
    facts = inspect_model(folder)
    dev = theirs.transformer.config.guidance_embeds
    assert (facts.family, facts.prediction, facts.resolution) == ("flux", "flow", 1024)
    assert (facts.pixel_step, facts.latent_scale, facts.latent_channels) == (4, 2, 4)
    assert (facts.base_version, facts.architecture) == ("flux1", "flux-1-dev" if dev else "flux-1-schnell")
    assert facts.small
    assert (facts.usual_cfg, facts.usual_guidance) == (1.0, 3.5 if dev else None)


def test_tokens_are_the_pipelines(model: Model, theirs: Any) -> None:
    length = 512 if theirs.transformer.config.guidance_embeds else 256
    tokens = model.tokenize(CAPTIONS)
    for name, tokenizer, count in (
        ("text_encoder", theirs.tokenizer, 77),
        ("text_encoder_2", theirs.tokenizer_2, length),
    ):
        rows = tokenizer(CAPTIONS, padding="max_length", max_length=count, truncation=True, return_tensors="pt")
        assert torch.equal(tokens[name], rows.input_ids)


@torch.no_grad()
def test_text_is_what_the_pipeline_encodes(model: Model, theirs: Any) -> None:
    given = model.encode_text(model.tokenize(CAPTIONS))
    length = given["text_BLD"].shape[1]
    text, pooled, _ = theirs.encode_prompt(CAPTIONS, CAPTIONS, max_sequence_length=length)
    torch.testing.assert_close(given["text_BLD"], text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given["pooled_BD"], pooled, rtol=1e-5, atol=1e-5)
    assert model.frame([Framing((9, 9), (0, 0), (8, 8))]) == {}


def test_t5s_length_can_be_set(folder: Path) -> None:
    assert load_model(folder, t5_tokens=7).tokenize(["a girl"])["text_encoder_2"].tolist() == [[3, 4, 1, 0, 0, 0, 0]]
    for wrong in (0, 513):
        with pytest.raises(UserError, match=f"t5_tokens is {wrong}"):
            load_model(folder, t5_tokens=wrong)


def test_what_t5_sees_of_captions(folder: Path, theirs: Any) -> None:
    room = 511 if theirs.transformer.config.guidance_embeds else 255
    (reader,) = caption_readers(inspect_model(folder)).values()
    fits, cut = reader([CAPTIONS[0], CAPTIONS[3]])
    assert (fits.room, fits.lost) == (room, "")
    assert cut.tokens == 4 * 200 and cut.windows == 1 and len(cut.kept.split()) < 3 * 200 and cut.lost
    (reader,) = caption_readers(inspect_model(folder), {"t5_tokens": 40}).values()
    assert reader([CAPTIONS[3]])[0].room == 39


@torch.no_grad()
def test_latents_and_pictures_are_the_pipelines(model: Model, theirs: Any) -> None:
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    config = theirs.vae.config
    expected = (theirs.vae.encode(images).latent_dist.mean - config.shift_factor) * config.scaling_factor
    latents = model.encode_images(images)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    pictures = theirs.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    torch.testing.assert_close(model.decode_latents(latents), pictures, rtol=1e-5, atol=1e-5)
    spread = theirs.vae.encode(images).latent_dist.std * config.scaling_factor
    drawn = model.encode_images(images, torch.Generator().manual_seed(4))
    assert 0.5 < ((drawn - latents) / spread).std() < 1.5


@torch.no_grad()
def test_predictions_are_the_denoisers(model: Model, theirs: Any) -> None:
    latents, timesteps, text = inputs(model)
    dev = theirs.transformer.config.guidance_embeds
    for guidance in (None, torch.tensor([3.5, 2.0])):
        told = (torch.ones(2) if guidance is None else guidance) if dev else None
        expected = answer(theirs, latents, timesteps, text, told)
        given = model.predict(latents, timesteps, text if guidance is None else {**text, "guidance_B": guidance})
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


class LowRank(nn.Module):
    """W + s·B·A on some of a layer's rows, by its definition."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base.weight + self.scale * (self.up @ self.down), self.base.bias)


def test_loss_and_every_lora_gradient_are_those_of_diffusers(folder: Path, theirs: Any) -> None:
    import copy

    ours = load_model(folder)
    latents, timesteps, text = inputs(ours)
    noise = torch.randn_like(latents)
    target = noise - latents
    adapter = graft(ours, "lora", LoraSettings(rank=3, alpha=1.5), seed=1, parts=("denoiser",))
    parameters = adapter.parameters()["denoiser"]
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    loss = (ours.predict(noise, timesteps, text) - target).square().mean()
    loss.backward()

    reference = copy.copy(theirs)
    reference.transformer = copy.deepcopy(theirs.transformer).requires_grad_(False)
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    keys = {
        layer.path: layer.key for layer in ours.layers() if layer.part == "denoiser" and layer.group == "transformer"
    }
    for piece in diffusers_pieces(ours._parts.transformer.config):  # pyright: ignore[reportAttributeAccessIssue]
        if piece.ours in keys:
            key = keys[piece.ours]
            up = leaves[f"{key}.lora_up.weight"]
            up = up[slice(*piece.our_rows)] if piece.our_rows else up
            parent, _, child = piece.theirs.rpartition(".")
            holder = reference.transformer.get_submodule(parent)
            change = LowRank(holder.get_submodule(child), leaves[f"{key}.lora_down.weight"], up, 0.5)
            setattr(holder, child, change)
    told = torch.ones(2) if theirs.transformer.config.guidance_embeds else None
    expected = (answer(reference, noise, timesteps, text, told) - target).square().mean()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert len(parameters) == 2 * (2 * 10 + 3 * 3)
    largest = max(float(leaf.grad.abs().max()) for leaf in leaves.values() if leaf.grad is not None)
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-4, atol=1e-6 * largest, msg=name)
    adapter.remove()


def test_a_lora_file_means_the_same_in_diffusers(folder: Path, theirs: Any, tmp_path: Path) -> None:
    """Without ``linear1``, for which diffusers' reader of kohya's names has the real model's sizes built in (see test_names)."""
    ours = load_model(folder)
    torch.manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for layer in ours.layers():
        if layer.group in ("transformer", "text") and not layer.path.endswith("linear1"):
            assert isinstance(layer.module, nn.Linear)
            tensors[f"{layer.key}.lora_down.weight"] = 0.2 * torch.randn(4, layer.module.in_features)
            tensors[f"{layer.key}.lora_up.weight"] = 0.2 * torch.randn(layer.module.out_features, 4)
            tensors[f"{layer.key}.alpha"] = torch.tensor(2.0)
    write_lora(tmp_path / "mira.safetensors", tensors, {"ss_network_dim": "4"}, "fp32")

    def both() -> tuple[Tensor, Tensor, Tensor]:
        latents, timesteps, text = inputs(ours)
        length = text["text_BLD"].shape[1]
        encoded, pooled, _ = theirs.encode_prompt(CAPTIONS[:2], CAPTIONS[:2], max_sequence_length=length)
        told = torch.ones(2) if theirs.transformer.config.guidance_embeds else None
        expected = answer(theirs, latents, timesteps, {"text_BLD": encoded, "pooled_BD": pooled}, told)
        return ours.predict(latents, timesteps, text), expected, pooled

    with torch.no_grad():
        plain, _, plain_pooled = both()
        adapter = graft_file(ours, "lora", read_lora(tmp_path / "mira.safetensors").layers)
        theirs.load_lora_weights(tmp_path, weight_name="mira.safetensors")
        try:
            given, expected, pooled = both()
        finally:
            theirs.unload_lora_weights()
        adapter.remove()
        after, _, _ = both()
    assert (plain - expected).abs().max() > 0.02 and (plain_pooled - pooled).abs().max() > 0.02, "the LoRA shows"
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, plain)


def test_pictures_are_the_pipelines(model: Model, theirs: Any) -> None:
    length = 512 if theirs.transformer.config.guidance_embeds else 256
    for width, height in ((16, 16), (24, 16)):
        told = 2.5 if model.facts.usual_guidance else None
        prompt = Prompt("a red girl, beach", width=width, height=height, steps=4, seed=7, guidance=told)
        (given,) = draw(model, [prompt])
        settings = {"num_inference_steps": 4, "guidance_scale": 2.5, "max_sequence_length": length}
        generator = torch.Generator().manual_seed(7)
        expected = theirs(prompt.text, width=width, height=height, generator=generator, **settings).images[0]
        assert given.size == expected.size == (width, height)
        assert np.abs(np.asarray(given).astype(int) - np.asarray(expected).astype(int)).max() <= 1
        assert np.asarray(given).std() > 5


def test_bfloat16_stays_near(folder: Path) -> None:
    exact, near = load_model(folder), load_model(folder, dtype=torch.bfloat16)
    latents, timesteps, text = inputs(exact)
    with torch.no_grad():
        expected = exact.predict(latents, timesteps, text)
        given = near.predict(latents, timesteps, near.encode_text(near.tokenize(CAPTIONS[:2])))
        picture = near.decode_latents(near.encode_images(torch.rand(1, 3, 16, 16)))
    assert given.dtype == torch.bfloat16 and torch.isfinite(picture).all()
    assert (given.float() - expected).norm() < 0.05 * expected.norm()


def test_float16_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="float16"):
        load_model(folder, dtype=torch.float16)


def test_checkpointing_reaches_the_denoiser(folder: Path) -> None:
    model = load_model(folder)
    assert isinstance(model, FluxModel)
    model.checkpoint_gradients(True)
    assert model.transformer.gradient_checkpointing
    model.checkpoint_gradients(False)
    assert not model.transformer.gradient_checkpointing
