"""Our U-Net against diffusers' own, weight for weight, value for value and gradient for gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lorabake.families.networks.config import UNetConfig
from lorabake.families.networks.unet import UNet2DConditionModel, UNetBlock, timestep_sinusoids

SMALL: dict[str, Any] = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8, "cross_attention_dim": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {**SMALL, "attention_head_dim": 8},
    "sd2": {**SMALL, "attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True, "upcast_attention": True},
    "pocket": {**SMALL, "attention_head_dim": 2, "layers_per_block": 1},
    "uneven": {
        "block_out_channels": [16, 24, 40],
        "norm_num_groups": 4,
        "norm_eps": 1e-4,
        "cross_attention_dim": 20,
        "attention_head_dim": [4, 3, 5],
        "layers_per_block": [1, 2, 3],
        "transformer_layers_per_block": [1, 2, 1],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "in_channels": 9,
        "out_channels": 4,
    },
    "sdxl": {
        "block_out_channels": [16, 32, 48],
        "norm_num_groups": 8,
        "cross_attention_dim": 24,
        "attention_head_dim": [1, 2, 3],
        "transformer_layers_per_block": [1, 2, 3],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 10 + 6 * 6,
    },
}


def pair(name: str) -> tuple[UNet2DConditionModel, Any]:
    """Ours and theirs, with the same random weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as Reference

    torch.manual_seed(0)
    theirs = Reference(**CONFIGS[name])
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms' ones and zeros would hide a mistake
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = UNet2DConditionModel(UNetConfig.from_json(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(model: UNet2DConditionModel, height: int = 16, width: int = 16) -> tuple[torch.Tensor, ...]:
    config = model.config
    latents = torch.randn(2, config.in_channels, height, width, requires_grad=True)
    return latents, torch.tensor([3, 981]), torch.randn(2, 77, config.cross_attention_dim, requires_grad=True)


def told(model: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Pooled text and sizes for networks that are told of them, under the names of our arguments."""
    if model.config.micro_channels is None:
        return {}
    sizes = torch.tensor([[1024.0, 768.0, 0.0, 64.0, 1024.0, 896.0], [512.0, 2048.0, 13.0, 0.0, 640.0, 1536.0]])
    return {"pooled_BP": torch.randn(2, model.config.pooled_channels, requires_grad=True), "sizes_BS": sizes}


def theirs_of(reference: Any, inputs: tuple[torch.Tensor, ...], told: dict[str, torch.Tensor]) -> torch.Tensor:
    added = {"text_embeds": told["pooled_BP"], "time_ids": told["sizes_BS"]} if told else None
    return reference(*inputs, added_cond_kwargs=added).sample


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert (given - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-9


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_diffusers(name: str) -> None:
    ours, theirs = pair(name)
    latents, timesteps, text = inputs(ours)
    extra = told(ours)
    given, expected = ours(latents, timesteps, text, **extra), theirs_of(theirs, (latents, timesteps, text), extra)
    close(given, expected)
    weight = torch.randn_like(expected)
    named = dict(ours.named_parameters())
    roots = {"latents": latents, "text": text} | ({"pooled": extra["pooled_BP"]} if extra else {})
    of_ours = torch.autograd.grad(given, (*roots.values(), *named.values()), weight)
    of_theirs = torch.autograd.grad(expected, (*roots.values(), *dict(theirs.named_parameters()).values()), weight)
    reference = dict(zip((*roots, *dict(theirs.named_parameters())), of_theirs, strict=True))
    largest = max(float(gradient.abs().max()) for gradient in of_theirs)
    for key, gradient in zip((*roots, *named), of_ours, strict=True):
        difference = (gradient - reference[key]).abs().max()
        assert difference <= 1e-5 * reference[key].abs().max() + 1e-7 * largest, key


@pytest.mark.parametrize(("height", "width"), [(13, 9), (8, 17)])
def test_any_size_of_latents(height: int, width: int) -> None:
    ours, theirs = pair("uneven")
    with torch.no_grad():
        latents, timesteps, text = inputs(ours, height, width)
        close(ours(latents, timesteps, text), theirs(latents, timesteps, text).sample)


def test_channels_last_gives_the_same() -> None:
    ours, _ = pair("sd1")
    latents, timesteps, text = inputs(ours)
    with torch.no_grad():
        expected = ours(latents, timesteps, text)
        ours.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        close(ours(latents.contiguous(memory_format=torch.channels_last), timesteps, text), expected)
        close(ours(latents, timesteps, text), expected)


def test_recomputed_gradients_are_the_same_and_need_less() -> None:
    ours, _ = pair("pocket")
    latents, timesteps, text = inputs(ours)
    frozen = copy.deepcopy(ours).requires_grad_(False)
    kept: dict[bool, int] = {}
    gradients: dict[bool, torch.Tensor] = {}
    for enabled in (False, True):
        frozen.checkpoint_gradients(enabled)
        assert all(bool(b.gradient_checkpointing) is enabled for b in frozen.modules() if isinstance(b, UNetBlock))
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = frozen(latents, timesteps, text)
            kept[enabled] = sum(sizes)
        (gradients[enabled],) = torch.autograd.grad(prediction.square().sum(), latents)
    torch.testing.assert_close(gradients[True], gradients[False], rtol=0, atol=0)
    assert kept[True] < kept[False] / 3


def test_layers_can_be_replaced() -> None:
    """An adapter stands where a layer stood: every Linear and Conv2d must be called as a child."""

    class Seen(torch.nn.Module):
        def __init__(self, base: torch.nn.Module) -> None:
            super().__init__()
            self.base, self.calls = base, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.base(x)

    for name in ("sd1", "sd2", "sdxl"):
        ours, _ = pair(name)
        seen: dict[str, Seen] = {}
        for path, module in list(ours.named_modules()):
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                parent, _, child = path.rpartition(".")
                seen[path] = Seen(module)
                setattr(ours.get_submodule(parent), child, seen[path])
        with torch.no_grad():
            ours(*inputs(ours), **told(ours))
        assert {path: module.calls for path, module in seen.items()} == dict.fromkeys(seen, 1)


def test_a_network_that_is_told_of_sizes_must_be_told() -> None:
    ours, _ = pair("sdxl")
    with pytest.raises(ValueError, match="pooled text"):
        ours(*inputs(ours))


def test_sizes_and_pooled_text_reach_the_prediction() -> None:
    ours, _ = pair("sdxl")
    given, extra = inputs(ours), told(ours)
    with torch.no_grad():
        plain = ours(*given, **extra)
        for name, other in (("pooled_BP", extra["pooled_BP"] + 1), ("sizes_BS", extra["sizes_BS"].flip(1))):
            assert (ours(*given, **{**extra, name: other}) - plain).abs().amax((1, 2, 3)).min() > 1e-3


def test_sinusoids() -> None:
    given = timestep_sinusoids(torch.tensor([0, 500]), 6)
    angles = [500.0, 500.0 / 10000 ** (1 / 3), 500.0 / 10000 ** (2 / 3)]
    expected = torch.tensor([[1.0] * 3 + [0.0] * 3, [*torch.tensor(angles).cos(), *torch.tensor(angles).sin()]])
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=0)
