"""Denoisers with random weights for benchmarks: ours, and diffusers' with other trainers' ways to adapt it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

SD15: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
"""In diffusers' names, as the others."""
SDXL: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
SDXL_HALF = SDXL | {
    "block_out_channels": [160, 320, 640],
    "cross_attention_dim": 1024,
    "addition_time_embed_dim": 128,
    "projection_class_embeddings_input_dim": 640 + 6 * 128,
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
"""Ends of the names of diffusers' layers that LoRA usually changes."""


def our_unet(sizes: dict[str, Any], dtype: Any, device: Any) -> Any:
    """Ours, frozen. On the device "meta" it has no weights."""
    import torch

    from lorabake.families.networks.config import UNetConfig
    from lorabake.families.networks.load import memory_format
    from lorabake.families.networks.unet import UNet2DConditionModel

    device = torch.device(device)
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.from_json(sizes)).to(dtype)
    if device.type == "meta":
        return unet.requires_grad_(False)
    unet = unet.to_empty(device=device)
    _fill(unet)
    return unet.to(memory_format=memory_format(unet, dtype, device)).requires_grad_(False)  # pyright: ignore[reportCallIssue]


def diffusers_unet(sizes: dict[str, Any], dtype: Any, device: Any) -> Any:
    """diffusers', frozen."""
    import torch

    network: Any = importlib.import_module("diffusers.models.unets.unet_2d_condition").UNet2DConditionModel
    with torch.device("meta"):
        unet = network(**sizes).to(dtype)
    unet = unet.to_empty(device=device)
    _fill(unet)
    return unet.requires_grad_(False)


def with_peft(unet: Any, rank: int) -> list[Any]:
    """Adapts diffusers' network; returns the weights to train, in float32, as mixed-precision scripts have them."""
    peft: Any = importlib.import_module("peft")
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION)))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def one_module_per_layer(unet: Any, dtype: Any, rank: int) -> list[Any]:
    """Each layer's forward becomes forward(x) + up(down(x)) · scale, from two small layers of the same kind; returns their weights."""
    import torch
    from torch import nn

    multiplier, scale = 1.0, 1.0

    def changed(layer: Any) -> list[Any]:
        if isinstance(layer, nn.Linear):
            down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        else:
            down = nn.Conv2d(layer.in_channels, rank, 1, bias=False)
            up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        place, before = layer.weight.device, layer.forward
        down, up = down.to(place, dtype), up.to(place, dtype)
        torch.nn.init.zeros_(up.weight)
        setattr(layer, "forward", lambda x: before(x) + up(down(x)) * multiplier * scale)  # noqa: B010
        return [down.weight, up.weight]

    return [
        weight
        for name, layer in unet.named_modules()
        if ".attentions." in name and isinstance(layer, nn.Linear | nn.Conv2d)
        for weight in changed(layer)
    ]


def floor(predict: Callable[[Any], Any], latents: Any, noise: Any) -> Callable[[], None]:
    """Forward and backward down to the input; no weight gets a gradient."""
    import torch

    def step() -> None:
        given = latents.detach().requires_grad_()
        torch.nn.functional.mse_loss(predict(given).float(), noise.float()).backward()

    return step


def _fill(network: Any) -> None:
    """Small random weights, and norms that do nothing."""
    import torch

    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)
    for parameter in network.parameters():
        parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02, generator=generator)
