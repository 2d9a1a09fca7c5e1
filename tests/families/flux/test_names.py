"""Names of LoRA layers at Flux.1's real sizes, and what diffusers makes of them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorabake.families.flux.model import flux_layers
from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.config import ClipConfig
from lorabake.families.networks.dit_config import FluxConfig, T5Config
from lorabake.families.networks.flux import FluxTransformer
from lorabake.families.networks.flux_layout import diffusers_pieces
from lorabake.families.networks.t5 import T5Encoder
from lorabake.protocols.family import Layer

PARAMETERS = 11_901_408_320
"""Of the denoiser of dev."""
COUNTS = {
    **{f"double_blocks_{stream}_{name}": 19 for stream in ("img", "txt") for name in ("attn_proj", "attn_qkv", "mlp_0", "mlp_2", "mod_lin")},
    **{f"single_blocks_{name}": 38 for name in ("linear1", "linear2", "modulation_lin")},
}  # fmt: skip
FIRST = [
    "lora_unet_double_blocks_0_img_mod_lin",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_double_blocks_0_img_attn_proj",
    "lora_unet_double_blocks_0_img_mlp_0",
    "lora_unet_double_blocks_0_img_mlp_2",
    "lora_unet_double_blocks_0_txt_mod_lin",
    "lora_unet_double_blocks_0_txt_attn_qkv",
    "lora_unet_double_blocks_0_txt_attn_proj",
    "lora_unet_double_blocks_0_txt_mlp_0",
    "lora_unet_double_blocks_0_txt_mlp_2",
]
LAST = [
    "lora_unet_single_blocks_37_linear1",
    "lora_unet_single_blocks_37_linear2",
    "lora_unet_single_blocks_37_modulation_lin",
]
OTHERS = [
    "lora_unet_img_in",
    "lora_unet_time_in_in_layer",
    "lora_unet_time_in_out_layer",
    "lora_unet_vector_in_in_layer",
    "lora_unet_vector_in_out_layer",
    "lora_unet_guidance_in_in_layer",
    "lora_unet_guidance_in_out_layer",
    "lora_unet_txt_in",
    "lora_unet_final_layer_linear",
    "lora_unet_final_layer_adaLN_modulation_1",
]
T5_LAYER = [
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_k",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_v",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_o",
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0",
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1",
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo",
]


@pytest.fixture(scope="module")
def denoiser() -> FluxTransformer:
    with torch.device("meta"):
        return FluxTransformer(FluxConfig())


@pytest.fixture(scope="module")
def layers(denoiser: FluxTransformer) -> list[Layer]:
    return list(flux_layers("denoiser", denoiser))


def test_the_denoisers_size(denoiser: FluxTransformer) -> None:
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == PARAMETERS


def test_the_304_layers_that_kohya_trains(layers: list[Layer]) -> None:
    trained = [layer.key for layer in layers if layer.group == "transformer"]
    assert len(trained) == len(set(trained)) == 304
    assert trained[:10] == FIRST and trained[-3:] == LAST
    kinds = Counter(re.sub(r"_\d+", "", key, count=1).removeprefix("lora_unet_") for key in trained)
    assert kinds == COUNTS


def test_layers_around_the_blocks_have_names_and_are_left_alone(layers: list[Layer]) -> None:
    assert [layer.key for layer in layers if layer.group != "transformer"] == OTHERS
    assert {layer.group for layer in layers} == {"transformer", "other"}


def test_text_encoders() -> None:
    with torch.device("meta"):
        clip, t5 = CLIPTextModel(ClipConfig()), T5Encoder(T5Config())
    of_clip, of_t5 = list(flux_layers("text_encoder", clip)), list(flux_layers("text_encoder_2", t5))
    assert len(of_clip) == 72 and {layer.group for layer in of_clip} == {"text"}
    assert of_clip[0].key.startswith("lora_te1_text_model_encoder_layers_0_self_attn_")
    assert len(of_t5) == 168 and {layer.group for layer in of_t5} == {"other"}
    assert [layer.key for layer in of_t5[:7]] == T5_LAYER


@pytest.mark.slow
def test_diffusers_knows_them_all_and_cuts_them_where_we_do(layers: list[Layer]) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    file: dict[str, Tensor] = {}
    for layer in layers:
        if layer.group == "transformer":
            assert isinstance(layer.module, nn.Linear)
            inputs, outputs = layer.module.in_features, layer.module.out_features
            file[f"{layer.key}.lora_down.weight"] = torch.full((1, inputs), 0.5)
            file[f"{layer.key}.lora_up.weight"] = torch.arange(float(outputs))[:, None]
            file[f"{layer.key}.alpha"] = torch.tensor(1.0)
    converted: dict[str, Any] = _convert_kohya_flux_lora_to_diffusers(dict(file))
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(guidance_embeds=True)
    keys = {layer.path: layer.key for layer in layers if layer.group == "transformer"}
    pieces = [piece for piece in diffusers_pieces(FluxConfig()) if piece.ours in keys]
    assert len(converted) == 2 * len(pieces)
    for piece in pieces:
        down, up = (converted[f"transformer.{piece.theirs}.lora_{part}.weight"] for part in "AB")
        whole = file[f"{keys[piece.ours]}.lora_up.weight"]
        assert torch.equal(up, whole[slice(*piece.our_rows)] if piece.our_rows else whole), piece
        assert (up.shape[0], down.shape[1]) == theirs.get_submodule(piece.theirs).get_parameter("weight").shape
