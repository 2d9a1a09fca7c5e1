"""Names of LoRA layers at Stable Diffusion 3's and 3.5's real sizes, and what diffusers calls the same."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorabake.families.networks.clip import CLIPTextModelWithProjection
from lorabake.families.networks.config import ClipConfig
from lorabake.families.networks.dit_config import SD3Config, T5Config
from lorabake.families.networks.t5 import T5Encoder
from lorabake.families.networks.weights import Entry, Weights
from lorabake.families.sd3.card import own_config, sd3_json, sd3_pieces
from lorabake.families.sd3.model import SD3Transformer, sd3_layers
from lorabake.protocols.family import Layer

REAL: dict[str, tuple[SD3Config, int, int]] = {
    "3 medium": (SD3Config(), 2_028_328_000, 24 * 10 - 3),
    "3.5 medium": (SD3Config(places=384, qk_norm=True, dual=tuple(range(13))), 2_243_171_520, 24 * 10 - 3 + 13 * 2),
    "3.5 large": (SD3Config(blocks=38, heads=38, qk_norm=True), 8_056_627_520, 38 * 10 - 3),
}
"""Sizes, parameters of the denoiser, layers in its blocks."""
BLOCK = [
    "x_block_adaLN_modulation_1",
    "x_block_attn_qkv",
    "x_block_attn_proj",
    "x_block_mlp_fc1",
    "x_block_mlp_fc2",
    "context_block_adaLN_modulation_1",
    "context_block_attn_qkv",
    "context_block_attn_proj",
    "context_block_mlp_fc1",
    "context_block_mlp_fc2",
]
LAST = ["context_block_attn_proj", "context_block_mlp_fc1", "context_block_mlp_fc2"]
"""What the last block does without."""
OTHERS = [
    "lora_unet_x_embedder_proj",
    "lora_unet_t_embedder_mlp_0",
    "lora_unet_t_embedder_mlp_2",
    "lora_unet_y_embedder_mlp_0",
    "lora_unet_y_embedder_mlp_2",
    "lora_unet_context_embedder",
    "lora_unet_final_layer_linear",
    "lora_unet_final_layer_adaLN_modulation_1",
]


def network(config: SD3Config) -> SD3Transformer:
    with torch.device("meta"):
        return SD3Transformer(config)


def layers_of(config: SD3Config) -> list[Layer]:
    return list(sd3_layers("denoiser", network(config)))


@pytest.mark.parametrize("kind", REAL)
def test_the_layers_that_kohya_trains(kind: str) -> None:
    config, parameters, count = REAL[kind]
    assert sum(parameter.numel() for parameter in network(config).parameters()) == parameters
    layers = layers_of(config)
    trained = [layer.key for layer in layers if layer.group == "transformer"]
    assert len(trained) == len(set(trained)) == count
    kinds = Counter(re.sub(r"^lora_unet_joint_blocks_\d+_", "", key) for key in trained)
    expected = {name: config.blocks - (name in LAST) for name in BLOCK}
    if config.dual:
        expected |= {"x_block_attn2_qkv": 13, "x_block_attn2_proj": 13}
    assert kinds == expected
    assert "lora_unet_joint_blocks_0_context_block_attn_qkv" in trained
    assert [layer.key for layer in layers if layer.group == "other"] == OTHERS


@pytest.mark.parametrize("kind", REAL)
def test_sizes_are_read_back_from_a_real_files_shapes(kind: str) -> None:
    config, path = REAL[kind][0], Path("model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in network(config).state_dict().items()}
    assert shapes["pos_embed"] == (1, config.places**2, config.channels)
    assert shapes["joint_blocks.0.x_block.adaLN_modulation.1.weight"][0] == (9 if config.dual else 6) * config.channels
    last = f"joint_blocks.{config.blocks - 1}.context_block.adaLN_modulation.1.weight"
    assert shapes[last][0] == 2 * config.channels
    entries = {name: Entry(path, name, "F16", shape, 0, 0) for name, shape in shapes.items()}
    assert own_config(Weights((path,), entries, {})) == config


def test_text_encoders() -> None:
    big = ClipConfig(hidden_size=1280, intermediate_size=5120, layers=32, heads=20, projection_dim=1280)
    with torch.device("meta"):
        parts = {
            "text_encoder": CLIPTextModelWithProjection(ClipConfig()),
            "text_encoder_2": CLIPTextModelWithProjection(big),
            "text_encoder_3": T5Encoder(T5Config()),
        }
    first, second, third = (list(sd3_layers(part, root)) for part, root in parts.items())  # pyright: ignore[reportArgumentType]
    assert Counter(layer.group for layer in first) == {"text": 72, "other": 1}
    assert Counter(layer.group for layer in second) == {"text": 192, "other": 1}
    assert Counter(layer.group for layer in third) == {"other": 168}
    assert first[0].key == "lora_te1_text_model_encoder_layers_0_self_attn_k_proj"
    assert second[-2].key == "lora_te2_text_model_encoder_layers_31_mlp_fc2"
    assert third[0].key == "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert [alias.key for alias in first[0].aliases] == ["lora_te_text_model_encoder_layers_0_self_attn_k_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL)
def test_diffusers_has_the_same_layers_where_we_look(kind: str) -> None:
    """Every piece of a layer is a layer of diffusers' at its real size, all of them are found, and rows are all used once."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    config, _, _ = REAL[kind]
    values: dict[str, Any] = {name: value for name, value in sd3_json(config).items() if name != "_class_name"}
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**values)
    assert SD3Config.from_json(dict(theirs.config)) == config
    ours = dict(network(config).named_modules())
    seen: dict[str, int] = {}
    for piece in sd3_pieces(config):
        if piece.ours not in ours or not isinstance(module := ours[piece.ours], nn.Linear | nn.Conv2d):
            continue
        shape = theirs.get_submodule(piece.theirs).get_parameter("weight").shape
        rows = piece.our_rows[1] - piece.our_rows[0] if piece.our_rows else module.weight.shape[0]
        theirs_rows = piece.their_rows[1] - piece.their_rows[0] if piece.their_rows else shape[0]
        assert (rows, *module.weight.shape[1:]) == (theirs_rows, *shape[1:]), piece
        seen[piece.theirs] = seen.get(piece.theirs, 0) + theirs_rows
    linear = {name for name, module in theirs.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert seen == {name: theirs.get_submodule(name).get_parameter("weight").shape[0] for name in linear}
