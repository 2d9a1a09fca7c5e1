"""A LoRA on SDXL: the loss and every gradient, and the file in diffusers, against W + s·B·A worked out there."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lorabake.adapters import graft
from lorabake.adapters.lora import LoraSettings
from lorabake.families import load_model
from lorabake.formats.kohya import read_lora, write_lora
from lorabake.objectives.diffusion import DiffusionSettings, diffusion_for
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import Framing, Layer, Model, Part

pytestmark = pytest.mark.slow  # importing diffusers alone takes seconds

SETTINGS = LoraSettings(rank=3, alpha=1.5, conv_rank=2, conv_alpha=3)
PARTS: tuple[Part, ...] = ("denoiser", "text_encoder", "text_encoder_2")
CAPTIONS = ["1girl, red hair, smile, beach", "night"]
FRAMINGS = [Framing((300, 200), (8, 0), (48, 32)), Framing((48, 32), (0, 0), (48, 32))]


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture
def grafted(model: Model) -> Iterator[Graft]:
    """A LoRA on every layer, as training might have left it."""
    adapter = graft(model, "lora", SETTINGS, seed=1, parts=PARTS)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for named in adapter.parameters().values():
            for parameter in named.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    yield adapter
    adapter.remove()


def their_names(pipeline: Any) -> dict[Part, Any]:
    return {"denoiser": pipeline.unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}


def merged(pipeline: Any, layers: Mapping[str, Layer], weights: Mapping[str, Tensor]) -> dict[Part, dict[str, Tensor]]:
    """W + s·B·A of every changed layer, by part and by the name the weight has in diffusers or transformers."""
    found: dict[Part, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key in {name.partition(".")[0] for name in weights}:
        layer = layers[key]
        state, path = their_names(pipeline)[layer.part].state_dict(), f"{layer.path}.weight"
        if path not in state:  # transformers 5 leaves the outer name out
            path = path.removeprefix("text_model.")
        weight = state[path]
        down, up = weights[f"{key}.lora_down.weight"], weights[f"{key}.lora_up.weight"]
        spatial = weight.dim() == 4 and weight.shape[2] > 1
        found[layer.part][path] = weight + (3 / 2 if spatial else 1.5 / 3) * (up.flatten(1) @ down.flatten(1)).view(
            weight.shape
        )
    return found


def their_text(
    pipeline: Any, changed: Mapping[Part, dict[str, Tensor]], ids: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.func.functional_call(
            their_names(pipeline)[part], changed[part], (ids[part],), {"output_hidden_states": True}
        )
        for part in ("text_encoder", "text_encoder_2")
    )
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def test_loss_and_gradients_are_those_of_merged_weights_in_diffusers(
    model: Model, grafted: Graft, pipeline: Any
) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    generator = torch.Generator().manual_seed(9)
    latents, noise = (torch.randn(2, 4, 8, 12, generator=generator) for _ in range(2))
    timesteps, ids = torch.tensor([37, 810]), model.tokenize(CAPTIONS)
    objective = diffusion_for(DiffusionSettings(weighting="none"), model)
    conditioning = model.encode_text(ids) | model.frame(FRAMINGS)
    output = model.predict(objective.corrupt(latents, noise, timesteps), timesteps, conditioning)
    error = objective.error(output, objective.target(latents, noise, timesteps), timesteps).mean((1, 2, 3))
    loss = objective.weigh(error, timesteps).mean()
    parameters = {name: p for named in grafted.parameters().values() for name, p in named.items()}
    loss.backward()

    theirs = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    changed = merged(pipeline, {layer.key: layer for layer in model.layers()}, theirs)
    text, pooled = their_text(pipeline, changed, ids)
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sizes = torch.tensor([[200.0, 300, 0, 8, 32, 48], [32, 48, 0, 0, 32, 48]])
    prediction = torch.func.functional_call(
        pipeline.unet,
        changed["denoiser"],
        (scheduler.add_noise(latents, noise, timesteps), timesteps, text),
        {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}},
    ).sample
    expected = F.mse_loss(prediction, noise)
    expected.backward()

    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    size = torch.cat([t.grad.flatten() for t in theirs.values() if t.grad is not None]).norm()
    untouched, worst, total = set[str](), dict[str, float](), torch.zeros(())
    for name, parameter in parameters.items():
        ours, reference = parameter.grad, theirs[name].grad
        if ours is None or reference is None:
            assert (ours is None or not ours.any()) and (reference is None or not reference.any()), name
            untouched.add(name.partition("_self_attn")[0].partition("_mlp")[0])
            continue
        # Where attention is sure of itself, queries and keys get gradients that nearly cancel: what is left has float32's noise of the whole.
        worst[name] = float((ours - reference).norm() / (reference.norm() + 0.01 * size))
        total += (ours - reference).square().sum()
    assert untouched == {"lora_te1_text_model_encoder_layers_2"}, "the first encoder's last layer is not looked at"
    assert len(worst) > 400
    assert max(worst.values()) < 1e-4, max(worst, key=lambda name: worst[name])
    assert float(total.sqrt() / size) < 1e-5


@torch.no_grad()
def their_outputs(pipeline: Any) -> tuple[Tensor, Tensor, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 48, 0, 0, 32, 48]] * 2)}
    return text, pooled, pipeline.unet(latents, torch.tensor([500, 20]), text, added_cond_kwargs=told).sample


@torch.no_grad()
def test_diffusers_loads_every_layer_of_the_file(model: Model, grafted: Graft, pipeline: Any, tmp_path: Path) -> None:
    """Names of all parts, residual blocks and samplers too, and the effect: base + W + s·B·A."""
    tensors = grafted.tensors()
    write_lora(tmp_path / "mira.safetensors", tensors, {"ss_network_dim": "3"}, "fp32")
    assert set(read_lora(tmp_path / "mira.safetensors").layers) == {name.partition(".")[0] for name in tensors}
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    changed = merged(pipeline, {layer.key: layer for layer in model.layers()}, weights)
    parts, plain = their_names(pipeline), their_outputs(pipeline)
    originals = {part: copy.deepcopy(module.state_dict()) for part, module in parts.items()}
    for part, module in parts.items():
        module.load_state_dict({**originals[part], **changed[part]})
    expected = their_outputs(pipeline)
    for part, module in parts.items():
        module.load_state_dict(originals[part])
    pipeline.load_lora_weights(tmp_path, weight_name="mira.safetensors")
    try:
        loaded = their_outputs(pipeline)
        adapted = [
            name for module in parts.values() for name, _ in module.named_modules() if name.endswith("lora_A.default_0")
        ]
        assert len(adapted) == len(weights) // 2
    finally:
        pipeline.unload_lora_weights()
    for before, wanted, got in zip(plain, expected, loaded, strict=True):
        assert (before - wanted).abs().max() > 0.01, "the LoRA is large enough to be seen"
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    given = model.encode_text(model.tokenize(CAPTIONS))
    torch.testing.assert_close(given["text_BLD"], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given["pooled_BD"], expected[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_recomputed_blocks_predict_the_same(model: Model) -> None:
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    told = model.encode_text(model.tokenize(CAPTIONS)) | model.frame(FRAMINGS)
    with torch.enable_grad():
        latents.requires_grad_()
        plain = torch.autograd.grad(model.predict(latents, torch.tensor([5, 600]), told).square().sum(), latents)[0]
        model.checkpoint_gradients(True)
        again = torch.autograd.grad(model.predict(latents, torch.tensor([5, 600]), told).square().sum(), latents)[0]
        model.checkpoint_gradients(False)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
