"""Stable Diffusion 3 and 3.5 against diffusers' own pipeline: tokens, text, latents, predictions, and whole pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorabake.base.errors import UserError
from lorabake.families import caption_readers, inspect_model, load_model
from lorabake.families.sd3.model import SD3Model
from lorabake.protocols.family import Framing, Model
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.draw import draw

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

CAPTIONS = ["a girl, red hair, beach", "red girls!", "", "a red girl, " * 200]


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


def inputs(model: Model, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents of two pictures, timesteps and conditioning."""
    torch.manual_seed(3)
    latents = torch.randn(2, 4, height, width)
    with torch.no_grad():
        return latents, torch.tensor([730.5, 21.0]), model.encode_text(model.tokenize(CAPTIONS[:2]))


def answer(theirs: Any, latents: Tensor, timesteps: Tensor, text: dict[str, Tensor]) -> Tensor:
    """What diffusers' denoiser says."""
    told = {"encoder_hidden_states": text["text_BMD"], "pooled_projections": text["pooled_BP"]}
    return theirs.transformer(latents, timestep=timesteps, **told).sample


def test_facts(folder: Path, theirs: Any) -> None:
    facts = inspect_model(folder)
    kind = "v3.5-medium" if theirs.transformer.config.qk_norm else "v3-medium"
    assert (facts.family, facts.name, facts.prediction, facts.resolution) == ("sd3", "tiny-3", "flow", 128 * 2)
    assert (facts.pixel_step, facts.latent_scale, facts.latent_channels) == (4, 2, 4)
    assert (facts.base_version, facts.architecture) == ("sd3", f"stable-diffusion-{kind}")
    assert facts.small and facts.shift == 3.0 and facts.notes == () and facts.usual_t5_tokens == 256
    assert load_model(facts).sampler["shift"] == 3.0


# ---- text


def test_tokens_are_the_pipelines(model: Model, theirs: Any) -> None:
    tokens = model.tokenize(CAPTIONS)
    for name, tokenizer, count in (
        ("text_encoder", theirs.tokenizer, 77),
        ("text_encoder_2", theirs.tokenizer_2, 77),
        ("text_encoder_3", theirs.tokenizer_3, 256),
    ):
        rows = tokenizer(CAPTIONS, padding="max_length", max_length=count, truncation=True, return_tensors="pt")
        assert torch.equal(tokens[name], rows.input_ids), name


@torch.no_grad()
def test_text_is_what_the_pipeline_encodes(model: Model, theirs: Any) -> None:
    given = model.encode_text(model.tokenize(CAPTIONS))
    text, _, pooled, _ = theirs.encode_prompt(CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False)
    assert given["text_BMD"].shape == (4, 77 + 256, 88) and given["pooled_BP"].shape == (4, 32 + 48)
    torch.testing.assert_close(given["text_BMD"], text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given["pooled_BP"], pooled, rtol=1e-5, atol=1e-5)
    assert model.frame([Framing((9, 9), (0, 0), (8, 8))]) == {}


def test_t5s_length_can_be_set(folder: Path) -> None:
    short = load_model(folder, t5_tokens=7)
    tokens = short.tokenize(["a girl"])
    assert tokens["text_encoder_3"].tolist() == [[3, 4, 1, 0, 0, 0, 0]]
    assert short.encode_text(tokens)["text_BMD"].shape == (1, 77 + 7, 88)
    with pytest.raises(UserError, match="t5_tokens is 0"):
        load_model(folder, t5_tokens=0)


def test_what_each_text_encoder_sees_of_captions(folder: Path) -> None:
    readers = caption_readers(inspect_model(folder), {"t5_tokens": None})
    assert list(readers) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    for read, room in zip(readers.values(), (75, 75, 255), strict=True):
        fits, cut = read([CAPTIONS[0], CAPTIONS[3]])
        assert (fits.room, fits.lost) == (room, "")
        assert cut.tokens == 4 * 200 and cut.windows == 1 and cut.lost
    (shorter,) = caption_readers(inspect_model(folder), {"t5_tokens": 20})["text_encoder_3"]([CAPTIONS[3]])
    assert shorter.room == 19


# ---- latents and predictions


@torch.no_grad()
def test_latents_and_pictures_are_the_pipelines(model: Model, theirs: Any) -> None:
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    expected = (theirs.vae.encode(images).latent_dist.mean - 0.0609) * 1.5305
    latents = model.encode_images(images)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    pictures = theirs.vae.decode(latents / 1.5305 + 0.0609).sample
    torch.testing.assert_close(model.decode_latents(latents), pictures, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 12), (24, 2), (6, 10)])
def test_predictions_are_the_denoisers(model: Model, theirs: Any, height: int, width: int) -> None:
    """Sizes whose middle of the table of positions is off by half a token, too."""
    latents, timesteps, text = inputs(model, height, width)
    expected = answer(theirs, latents, timesteps, text)
    given = model.predict(latents, timesteps, text)
    assert expected.std() > 0.1
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_beyond_the_table_of_positions_is_refused(model: Model) -> None:
    _, timesteps, text = inputs(model)
    with pytest.raises(UserError, match="24 a side"):
        model.predict(torch.zeros(2, 4, 8, 26), timesteps, text)


def test_every_gradient_is_the_denoisers(folder: Path, theirs: Any) -> None:
    import copy

    from lorabake.families.sd3.model import diffusers_tensors

    ours = load_model(folder)
    assert isinstance(ours, SD3Model)
    latents, timesteps, text = inputs(ours)
    weight = torch.randn_like(latents)
    ours.transformer.requires_grad_(True)
    (ours.predict(latents, timesteps, text) * weight).sum().backward()
    reference = copy.copy(theirs)
    reference.transformer = copy.deepcopy(theirs.transformer).requires_grad_(True)
    (answer(reference, latents, timesteps, text) * weight).sum().backward()
    gradients = {name: p.grad for name, p in ours.transformer.named_parameters() if p.grad is not None}
    of_ours = diffusers_tensors({"pos_embed": torch.zeros(1), **gradients}, ours.transformer.config)
    expected = {name: p.grad for name, p in reference.transformer.named_parameters()}
    assert of_ours.keys() - {"pos_embed.pos_embed"} == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(of_ours[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=name)


def test_recomputed_blocks_predict_the_same_and_keep_less(folder: Path) -> None:
    model = load_model(folder)
    latents, timesteps, text = inputs(model)
    latents.requires_grad_()
    gradients: dict[bool, Tensor] = {}
    kept: dict[bool, int] = {}
    for enabled in (False, True):
        model.checkpoint_gradients(enabled)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = model.predict(latents, timesteps, text)
            kept[enabled] = sum(sizes)
        (gradients[enabled],) = torch.autograd.grad(prediction.square().sum(), latents)
    torch.testing.assert_close(gradients[True], gradients[False], rtol=0, atol=0)
    assert kept[True] < kept[False] / 5


def test_layers_can_be_replaced(folder: Path) -> None:
    """An adapter stands where a layer stood: every layer must be called as a child, and once."""

    class Seen(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.calls = base, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.base(x)

    model = load_model(folder)
    seen: dict[str, Seen] = {}
    for layer in model.layers():
        parent, _, child = layer.path.rpartition(".")
        seen[layer.key] = Seen(layer.module)
        setattr(model.parts[layer.part].get_submodule(parent), child, seen[layer.key])
    latents, timesteps, text = inputs(model)
    with torch.no_grad():
        model.predict(latents, timesteps, text)
    assert {key: module.calls for key, module in seen.items()} == dict.fromkeys(seen, 1)


# ---- whole pictures


@pytest.mark.parametrize(("width", "height"), [(16, 16), (24, 16)])
def test_pictures_are_the_pipelines(model: Model, theirs: Any, width: int, height: int) -> None:
    """With the shares of noise told: left alone, the pipeline shifts the last of them twice."""
    prompt = Prompt("a red girl, beach", "hair", width=width, height=height, steps=4, seed=7, cfg=3.0)
    (given,) = draw(model, [prompt])
    expected = theirs(
        prompt.text, negative_prompt=prompt.negative, width=width, height=height, guidance_scale=3.0,
        num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25], generator=torch.Generator().manual_seed(7),
    ).images[0]  # fmt: skip
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
