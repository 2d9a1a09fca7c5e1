"""Our Flux.1 denoiser against diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorabake.base.errors import Problems
from lorabake.families.flux.model import diffusers_tensors
from lorabake.families.networks.dit_config import FluxConfig
from lorabake.families.networks.flux import FluxTransformer
from lorabake.families.networks.flux_layout import diffusers_pieces, flux_diffusers, flux_own

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "axes_dims_rope": (4, 14, 14),
    "num_layers": 2,
    "num_single_layers": 2,
    "in_channels": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
}


def load_theirs(ours: FluxTransformer, state: dict[str, Tensor]) -> None:
    """Diffusers' tensors into our network, by the key table."""
    rename = flux_diffusers(ours.config)
    own = {name: torch.full_like(tensor, torch.nan) for name, tensor in ours.state_dict().items()}
    for name, tensor in state.items():
        for target in rename(name):
            part = tensor[slice(*target.rows)] if target.rows else tensor
            own[target.name][slice(*target.into) if target.into else slice(None)] = part
    ours.load_state_dict(own)


def pair(guidance: bool) -> tuple[FluxTransformer, Any]:
    """Ours and theirs, with the same random weights."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**SIZES, guidance_embeds=guidance).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = FluxTransformer(FluxConfig.from_json(dict(theirs.config)))
    load_theirs(ours, theirs.state_dict())
    return ours, theirs


def inputs(height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, timesteps, text, pooled text of two pictures."""
    return torch.randn(2, 4, height, width), torch.tensor([3.5, 871.25]), torch.randn(2, 9, 24), torch.randn(2, 12)


def answer(
    theirs: Any, latents: Tensor, timesteps: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor | None
) -> Tensor:
    """Theirs, packed and unpacked by their pipeline."""
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    batch, channels, height, width = latents.shape
    ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, torch.float32)
    output = theirs(
        hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=timesteps / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(text.shape[1], 3),
        guidance=guidance,
    ).sample
    return FluxPipeline._unpack_latents(output, height * 8, width * 8, vae_scale_factor=8)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 14)])
@torch.no_grad()
def test_predictions_equal_diffusers(guided: bool, height: int, width: int) -> None:
    ours, theirs = pair(guided)
    latents, timesteps, text, pooled = inputs(height, width)
    guidance = torch.tensor([1.0, 3.5]) if guided else None
    expected = answer(theirs, latents, timesteps, text, pooled, guidance)
    given = ours(latents, timesteps, text, pooled, torch.tensor([1.0, 3.5]))
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_equal_diffusers() -> None:
    ours, theirs = pair(True)
    latents, timesteps, text, pooled = inputs()
    guidance = torch.tensor([1.0, 2.0])
    weight = torch.randn_like(latents)
    (ours(latents, timesteps, text, pooled, guidance) * weight).sum().backward()
    (answer(theirs, latents, timesteps, text, pooled, guidance) * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert len(gradients) == len(ours.state_dict())
    of_ours = diffusers_tensors(gradients, ours.config)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert of_ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in of_ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_the_key_table_goes_both_ways() -> None:
    ours, theirs = pair(True)
    back = diffusers_tensors(ours.state_dict(), ours.config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())
    pieces = list(diffusers_pieces(ours.config))
    assert len(set(pieces)) == len(pieces)


def test_guidance_matters_and_must_be_told() -> None:
    ours, _ = pair(True)
    with torch.no_grad():
        one, other = (ours(*(torch.ones_like(x) for x in inputs()), torch.tensor([g, g])) for g in (1.0, 4.0))
    assert (one - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="guidance"):
        ours(*inputs())


def test_gradient_checkpointing_changes_memory_only() -> None:
    ours, _ = pair(False)
    latents, timesteps, text, pooled = inputs()
    latents.requires_grad_()
    gradients: dict[bool, Tensor] = {}
    kept: dict[bool, int] = {}
    for enabled in (False, True):
        ours.gradient_checkpointing = enabled
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = ours(latents, timesteps, text, pooled)
            kept[enabled] = sum(sizes)
        (gradients[enabled],) = torch.autograd.grad(prediction.square().sum(), latents)
    torch.testing.assert_close(gradients[True], gradients[False], rtol=0, atol=0)
    assert kept[True] < kept[False] / 5


def test_bfloat16_stays_near() -> None:
    ours, _ = pair(True)
    latents, timesteps, text, pooled = inputs()
    guidance = torch.ones(2)
    with torch.no_grad():
        expected = ours(latents, timesteps, text, pooled, guidance)
        near = ours.bfloat16()
        given = near(latents.bfloat16(), timesteps, text.bfloat16(), pooled.bfloat16(), guidance)
    assert given.dtype == torch.bfloat16
    assert (given.float() - expected).norm() < 0.05 * expected.norm()


def test_layers_can_be_replaced() -> None:
    """An adapter stands where a layer stood: every Linear must be called as a child."""

    class Seen(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base, self.calls = base, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.base(x)

    ours, _ = pair(True)
    seen: dict[str, Seen] = {}
    for path, module in list(ours.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent, _, child = path.rpartition(".")
            seen[path] = Seen(module)
            setattr(ours.get_submodule(parent), child, seen[path])
    with torch.no_grad():
        ours(*inputs(), torch.ones(2))
    assert {path: module.calls for path, module in seen.items()} == dict.fromkeys(seen, 1)


def test_names_in_black_forest_labs_files() -> None:
    assert (
        flux_own("double_blocks.0.img_attn.norm.query_norm.scale")[0].name
        == "double_blocks.0.img_attn.norm.query_norm.weight"
    )
    assert flux_own("final_layer.adaLN_modulation.1.bias")[0].name == "final_layer.adaLN_modulation.1.bias"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"_class_name": "ChromaTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"axes_dims_rope": [16, 56]}, "three even numbers"),
        ({"axes_dims_rope": [16, 56, 54]}, "sum of 128"),
        ({"out_channels": 32}, "out_channels"),
        ({"num_layers": "many"}, "num_layers"),
        ({"patch_size": 2}, "patch_size"),
        ({"image_encoder_dim": 5}, "image_encoder_dim"),
    ],
)
def test_what_this_network_is_not(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(Problems, match=words):
        FluxConfig.from_json({"_class_name": "FluxTransformer2DModel", **changed})
