"""Names of SDXL's layers in LoRA files: counted, pinned, and read back by diffusers' own conversion."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.adapters.lora import Lora, LoraSettings
from lorabake.families.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from lorabake.families.networks.config import ClipConfig, UNetConfig
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.sdxl.model import layers_of
from lorabake.protocols.family import Layer

PINNED = Path(__file__).with_name("sdxl_keys.txt")
UNET = UNetConfig(
    block_out_channels=(320, 640, 1280), layers_per_block=(2, 2, 2), heads=(5, 10, 20), transformer_depth=(1, 2, 10),
    attends_down=(False, True, True), attends_up=(False, True, True), cross_attention_dim=2048,
    use_linear_projection=True, micro_channels=2816,
)  # fmt: skip
BIG = ClipConfig(hidden_size=1280, intermediate_size=5120, layers=32, heads=20, quick_gelu=False, projection_dim=1280)


@pytest.fixture(scope="module")
def sdxl() -> list[Layer]:
    """Every layer of an SDXL model of the real size, without its weights."""
    with torch.device("meta"):
        return list(
            layers_of(
                {
                    "denoiser": UNet2DConditionModel(UNET),
                    "text_encoder": CLIPTextModel(ClipConfig()),
                    "text_encoder_2": CLIPTextModelWithProjection(BIG),
                }
            )
        )


def test_the_sizes_are_sdxls(sdxl: list[Layer]) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet2DConditionModel(UNET).parameters()) == 2_567_463_684
        assert sum(p.numel() for p in CLIPTextModelWithProjection(BIG).parameters()) == 694_659_840
    chosen = [layer for layer in sdxl if layer.part == "denoiser" and Lora().fits(layer, LoraSettings())]
    rank = 16
    assert sum(rank * sum(layer.module.get_parameter("weight").shape) for layer in chosen) == 42_557_440


def test_the_986_names_of_other_tools(sdxl: list[Layer]) -> None:
    chosen = [layer for layer in sdxl if Lora().fits(layer, LoraSettings())]
    assert Counter(layer.part for layer in chosen) == {"denoiser": 722, "text_encoder": 72, "text_encoder_2": 192}
    keys = [layer.key for layer in chosen]
    assert keys[0] == "lora_unet_input_blocks_4_1_proj_in"
    assert keys[721] == "lora_unet_output_blocks_5_1_proj_out"
    assert keys[722] == "lora_te1_text_model_encoder_layers_0_self_attn_k_proj"
    assert keys[-1] == "lora_te2_text_model_encoder_layers_31_mlp_fc2"
    assert {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_2",
        "lora_unet_output_blocks_0_1_transformer_blocks_0_attn2_to_out_0",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1",
    } <= set(keys)
    assert sorted(keys) == PINNED.read_text().split()


def test_residual_blocks_and_ends(sdxl: list[Layer]) -> None:
    keys = {layer.path: layer.key.removeprefix("lora_unet_") for layer in sdxl if layer.part == "denoiser"}
    expected = {
        "conv_in": "input_blocks_0_0",
        "time_embedding.linear_1": "time_embed_0",
        "time_embedding.linear_2": "time_embed_2",
        "add_embedding.linear_1": "label_emb_0_0",
        "add_embedding.linear_2": "label_emb_0_2",
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "down_blocks.2.resnets.1.conv2": "input_blocks_8_0_out_layers_3",
        "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.resnets.2.conv_shortcut": "output_blocks_5_0_skip_connection",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
        "conv_out": "out_2",
    }
    assert {path: keys[path] for path in expected} == expected
    assert len(set(keys.values())) == len(keys)


def test_every_layer_has_its_group(sdxl: list[Layer]) -> None:
    groups = Counter((layer.part, layer.group) for layer in sdxl)
    assert groups == {
        ("denoiser", "transformer"): 722,
        ("denoiser", "resnet"): 17 * 3 + 11 + 2 + 2,
        ("denoiser", "norm"): 17 * 2 + 11 + 70 * 3,
        ("denoiser", "other"): 6 + 1,
        ("text_encoder", "text"): 72,
        ("text_encoder", "norm"): 12 * 2,
        ("text_encoder", "other"): 1,
        ("text_encoder_2", "text"): 192,
        ("text_encoder_2", "norm"): 32 * 2,
        ("text_encoder_2", "other"): 1 + 1,
    }
    (projection,) = [layer for layer in sdxl if layer.path == "text_projection"]
    assert projection.key == "lora_te2_text_projection"


@pytest.mark.slow
def test_diffusers_finds_the_same_layers_by_these_names(sdxl: list[Layer]) -> None:
    from types import SimpleNamespace

    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    layers = [layer for layer in sdxl if layer.group in ("transformer", "resnet", "text")]
    numbered = {layer.key: torch.tensor([float(index)]) for index, layer in enumerate(layers)}
    weights = {f"{key}.{name}.weight": t for key, t in numbered.items() for name in ("lora_down", "lora_up")}
    config: Any = SimpleNamespace(layers_per_block=2)
    found, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(weights, config))
    folders = {"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    downs = {name: tensor for name, tensor in found.items() if ".down." in name}
    assert len(downs) == len(layers)
    for name, tensor in downs.items():
        layer = layers[int(tensor)]
        path = name.replace(".processor", "").replace("_lora.down.weight", "")
        for suffix in (".lora.down.weight", ".lora_linear_layer.down.weight"):
            path = path.removesuffix(suffix)
        classic = path.replace("to_out", "to_out.0") if layer.part == "denoiser" else path
        for ours, theirs in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
            classic = classic.replace(theirs, ours) if layer.part != "denoiser" else classic
        assert classic == f"{folders[layer.part]}.{layer.path}", name
