"""Key tables of Flux.1's denoiser and of T5: where their tensors lie in the layouts they are published in. No torch here.

Our names of the denoiser are those of Black Forest Labs' files, but for the norms' weights. diffusers' folders have queries, keys
and values (and the MLP's first layer beside them) as layers of their own, and the final layer's scale before its shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorabake.families.networks.dit_config import FluxConfig, T5Config
from lorabake.families.networks.layouts import Rename, Target
from lorabake.families.networks.pieces import Piece, pieces_rename, swapped
from lorabake.families.networks.weights import Weights

_AXES = (2, 7, 7)
"""Sixteenths of a head's channels that tell a token's place on each axis; files do not say it."""
_MLP_RATIO = 4
_NORM = ".scale"

_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear",
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
"""Ours in a block of two streams, and diffusers'."""
_DOUBLE_JOINED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""One layer of ours, several of diffusers', in order of rows."""
_SINGLE = {
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_SINGLE_JOINED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
_AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
"""Ours and diffusers', whose halves are the other way round."""


def diffusers_pieces(config: FluxConfig) -> Iterator[Piece]:
    """All modules with weights, in diffusers' layout."""
    channels = config.channels
    for ours, theirs in _AROUND.items():
        if config.guidance or not ours.startswith("guidance_in."):
            yield Piece(ours, theirs)
    yield from swapped(*_SWAPPED, channels)
    blocks = (
        ("double_blocks", "transformer_blocks", config.double_blocks, _DOUBLE, _DOUBLE_JOINED),
        ("single_blocks", "single_transformer_blocks", config.single_blocks, _SINGLE, _SINGLE_JOINED),
    )
    for ours, theirs, count, alike, joined in blocks:
        for index in range(count):
            for name, other in alike.items():
                yield Piece(f"{ours}.{index}.{name}", f"{theirs}.{index}.{other}")
            for name, others in joined.items():
                for place, other in enumerate(others):
                    stop = (place + (_MLP_RATIO if other == "proj_mlp" else 1)) * channels
                    yield Piece(f"{ours}.{index}.{name}", f"{theirs}.{index}.{other}", (place * channels, stop))


def flux_diffusers(config: FluxConfig) -> Rename:
    """The denoiser in diffusers' layout."""
    return pieces_rename(diffusers_pieces(config))


def flux_own(name: str) -> tuple[Target, ...]:
    """The rename of Black Forest Labs' files."""
    return (Target(name.removesuffix(_NORM) + ".weight" if name.endswith(_NORM) else name),)


def flux_own_config(weights: Weights) -> FluxConfig:
    """Sizes of the denoiser in Black Forest Labs' layout.

    Raises:
        UserError: tensors are missing.
    """
    channels, token_channels = weights.shape("img_in.weight")
    (head_channels,) = weights.shape("double_blocks.0.img_attn.norm.query_norm.scale")
    return FluxConfig(
        token_channels=token_channels,
        double_blocks=weights.count("double_blocks.{}.img_attn.qkv.weight"),
        single_blocks=weights.count("single_blocks.{}.linear1.weight"),
        heads=channels // head_channels,
        head_channels=head_channels,
        text_channels=weights.shape("txt_in.weight")[1],
        pooled_channels=weights.shape("vector_in.in_layer.weight")[1],
        guidance="guidance_in.in_layer.weight" in weights,
        axes=tuple(share * head_channels // 16 for share in _AXES),
    )


def flux_json(config: FluxConfig) -> dict[str, Any]:
    """``transformer/config.json``."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.head_channels,
        "axes_dims_rope": list(config.axes),
        "guidance_embeds": config.guidance,
        "in_channels": config.token_channels,
        "joint_attention_dim": config.text_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.double_blocks,
        "num_single_layers": config.single_blocks,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled_channels,
    }


def t5_encoder(weights: Mapping[str, Any]) -> Rename:
    """T5 as transformers and all others store it: the encoder alone, or the whole model, whose decoder is ignored."""
    twice = "shared.weight" in weights

    def rename(name: str) -> tuple[Target, ...]:
        if name == "encoder.embed_tokens.weight":
            return () if twice else (Target("shared.weight"),)
        return () if name.startswith(("decoder.", "lm_head.")) else (Target(name),)

    return rename


def t5_config(weights: Weights) -> T5Config:
    """Sizes of a T5 encoder, with the distances that every published one tells apart.

    Raises:
        UserError: tensors are missing, such as those of version 1.1's gated MLP.
    """
    vocabulary, channels = weights.shape(
        "shared.weight" if "shared.weight" in weights else "encoder.embed_tokens.weight"
    )
    first = "encoder.block.0.layer.{}"
    buckets, heads = weights.shape(first.format(0) + ".SelfAttention.relative_attention_bias.weight")
    return T5Config(
        vocab_size=vocabulary,
        channels=channels,
        width=weights.shape(first.format(1) + ".DenseReluDense.wi_0.weight")[0],
        layers=weights.count("encoder.block.{}.layer.0.SelfAttention.q.weight"),
        heads=heads,
        head_channels=weights.shape(first.format(0) + ".SelfAttention.q.weight")[0] // heads,
        buckets=buckets,
    )


def t5_json(config: T5Config) -> dict[str, Any]:
    """``text_encoder_2/config.json``."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.width,
        "d_kv": config.head_channels,
        "d_model": config.channels,
        "dense_act_fn": "gelu_new",
        "dtype": "float32",
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.norm_eps,
        "model_type": "t5",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.farthest,
        "relative_attention_num_buckets": config.buckets,
        "vocab_size": config.vocab_size,
    }
