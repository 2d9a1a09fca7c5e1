"""Sizes of diffusion transformers and of their T5 text encoder, read from the ``config.json`` files of a model folder. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorabake.families.networks.config import ConfigReader

_FLUX_FIXED: Mapping[str, tuple[Any, ...]] = {
    "_class_name": ("FluxTransformer2DModel",),
    "patch_size": (1,),
}
_SD3_FIXED: Mapping[str, tuple[Any, ...]] = {
    "_class_name": ("SD3Transformer2DModel",),
    "patch_size": (2,),
    "qk_norm": (None, "rms_norm"),
}
_T5_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("t5",),
    "feed_forward_proj": ("gated-gelu",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxConfig:
    """Sizes of Flux.1's denoiser. Channels of a picture token are those of 2 × 2 latent cells."""

    token_channels: int = 64
    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_channels: int = 128
    text_channels: int = 4096
    pooled_channels: int = 768
    guidance: bool = True
    """Whether the network is told a guidance scale: dev is, schnell is not."""
    axes: tuple[int, ...] = (16, 56, 56)
    """Channels per head that tell a token's place: on an unused axis, down, and across."""

    @property
    def channels(self) -> int:
        """Width of the network."""
        return self.heads * self.head_channels

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "transformer/config.json") -> FluxConfig:
        """Sizes from the parsed file.

        Raises:
            Problems: every value that is malformed, or asks for arithmetic that this network does not have.
        """
        read = ConfigReader(values, where)
        read.fixed(_FLUX_FIXED)
        config = cls(
            token_channels=read.whole("in_channels", 64),
            double_blocks=read.whole("num_layers", 19, high=256),
            single_blocks=read.whole("num_single_layers", 38, high=256),
            heads=read.whole("num_attention_heads", 24, high=256),
            head_channels=read.whole("attention_head_dim", 128, high=1024),
            text_channels=read.whole("joint_attention_dim", 4096),
            pooled_channels=read.whole("pooled_projection_dim", 768),
            guidance=read.flag("guidance_embeds", False),
            axes=read.sizes("axes_dims_rope", (16, 56, 56), None, high=1024),
        )
        read.asked.add("out_channels")
        if (out := values.get("out_channels")) not in (None, config.token_channels):
            read.wrong("out_channels", out, f"{config.token_channels}, as many as in_channels (no control variants)")
        if len(config.axes) != 3 or any(width % 2 for width in config.axes):
            read.wrong("axes_dims_rope", list(config.axes), "three even numbers")
        elif sum(config.axes) != config.head_channels:
            read.wrong("axes_dims_rope", list(config.axes), f"a sum of {config.head_channels}, the attention_head_dim")
        if config.token_channels % 4:
            read.wrong("in_channels", config.token_channels, "a multiple of 4, the cells of a token")
        read.finish(frozenset(), "Flux.1")
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class SD3Config:
    """Sizes of the denoiser of Stable Diffusion 3 and 3.5. Its tokens are 2 × 2 latent cells."""

    latent_channels: int = 16
    blocks: int = 24
    heads: int = 24
    head_channels: int = 64
    text_channels: int = 4096
    pooled_channels: int = 2048
    places: int = 192
    """Tokens along each side of the table of positions, of which a smaller picture gets the middle."""
    qk_norm: bool = False
    """Queries and keys are normed: in 3.5."""
    dual: tuple[int, ...] = ()
    """Blocks in which the picture also attends to itself alone: the first half of 3.5 medium's."""

    @property
    def channels(self) -> int:
        """Width of the network."""
        return self.heads * self.head_channels

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "transformer/config.json") -> SD3Config:
        """Sizes from the parsed file.

        Raises:
            Problems: every value that is malformed, or asks for arithmetic that this network does not have.
        """
        read = ConfigReader(values, where)
        read.fixed(_SD3_FIXED)
        config = cls(
            latent_channels=read.whole("in_channels", 16),
            blocks=read.whole("num_layers", 18, high=256),
            heads=read.whole("num_attention_heads", 18, high=256),
            head_channels=read.whole("attention_head_dim", 64, high=1024),
            text_channels=read.whole("joint_attention_dim", 4096),
            pooled_channels=read.whole("pooled_projection_dim", 2048),
            places=read.whole("pos_embed_max_size", 96, high=4096),
            qk_norm=values.get("qk_norm") is not None,
        )
        read.asked |= {"out_channels", "dual_attention_layers"}
        if (out := values.get("out_channels", config.latent_channels)) not in (None, config.latent_channels):
            read.wrong("out_channels", out, f"{config.latent_channels}, as many as in_channels")
        if (width := read.whole("caption_projection_dim", 1152)) != config.channels:
            read.wrong("caption_projection_dim", width, f"{config.channels}, the heads' channels together")
        dual = values.get("dual_attention_layers") or ()
        if not isinstance(dual, list | tuple) or any(block not in range(config.blocks) for block in dual):
            read.wrong("dual_attention_layers", dual, f"a list of blocks, 0 to {config.blocks - 1}")
            dual = ()
        read.finish(frozenset({"sample_size"}), "Stable Diffusion 3")
        return replace(config, dual=tuple(dual))


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Config:
    """Sizes of the T5 text encoder (version 1.1)."""

    vocab_size: int = 32128
    channels: int = 4096
    width: int = 10240
    layers: int = 24
    heads: int = 64
    head_channels: int = 64
    buckets: int = 32
    """Kinds of distances between two tokens that the encoder tells apart, both directions together."""
    farthest: int = 128
    """Distance in tokens from which on all are alike."""
    norm_eps: float = 1e-6

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "text_encoder_2/config.json") -> T5Config:
        """Sizes from the parsed file; the many settings around generation in it mean nothing here.

        Raises:
            Problems: every value that is malformed, or asks for arithmetic that this network does not have.
        """
        read = ConfigReader(values, where)
        read.fixed(_T5_FIXED)
        config = cls(
            vocab_size=read.whole("vocab_size", 32128, high=1 << 20),
            channels=read.whole("d_model", 4096),
            width=read.whole("d_ff", 10240),
            layers=read.whole("num_layers", 24, high=256),
            heads=read.whole("num_heads", 64, high=1024),
            head_channels=read.whole("d_kv", 64, high=1024),
            buckets=read.whole("relative_attention_num_buckets", 32, high=4096),
            farthest=read.whole("relative_attention_max_distance", 128),
            norm_eps=read.number("layer_norm_epsilon", 1e-6),
        )
        if config.buckets % 4 or config.farthest <= config.buckets // 4:
            read.wrong(
                "relative_attention_num_buckets", config.buckets, "a multiple of 4, below 4 × the largest distance"
            )
        read.finish(None, "T5 version 1.1")
        return config
