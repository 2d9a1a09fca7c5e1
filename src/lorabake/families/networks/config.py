"""Sizes of the SD1.x, SD2.x and SDXL networks, read from the ``config.json`` files of a model folder. No torch here.

Every value that would change the arithmetic in a way these networks do not have is refused, all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError

MICRO_SIZES = 6
"""Numbers that SDXL is told of a picture: height and width of the original, crop from the top and left, height and width of the target."""

_DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

_UNET_FIXED: Mapping[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_UNET_HARMLESS = frozenset(
    # sizes of switched-off parts, and the bookkeeping that averaged (EMA) U-Nets are saved with
    (
        "sample_size",
        "addition_embed_type_num_heads",
        "addition_time_embed_dim",
        "class_embeddings_concat",
        "projection_class_embeddings_input_dim",
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
    )
)
_CLIP_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0,),
    "dropout": (0,),
    "hidden_act": ("quick_gelu", "gelu"),
    "model_type": ("clip", "clip_text_model"),
}
_VAE_FIXED: Mapping[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_VAE_HARMLESS = frozenset({"sample_size"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """Sizes of the denoiser. Tuples have one entry per resolution, from the finest to the coarsest."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    """Residual blocks per resolution on the way down; the way up has one more."""
    heads: tuple[int, ...] = (8, 8, 8, 8)
    """Attention heads per resolution: what the file calls ``attention_head_dim``, by an old mistake that stayed."""
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)
    attends_down: tuple[bool, ...] = (True, True, True, False)
    """Which resolutions have transformers on the way down."""
    attends_up: tuple[bool, ...] = (True, True, True, False)
    """The same on the way up, still counted from the finest resolution."""
    cross_attention_dim: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    exact_attention: bool = False
    """``upcast_attention`` in the file: scores leave the range or precision of 16 bits (SD 2.1)."""
    micro_channels: int | None = None
    """Width of all the network is told besides time and text tokens (SDXL): pooled text and sizes; None tells it nothing."""
    size_channels: int = 256
    """Sinusoids for each number among those sizes."""

    @property
    def pooled_channels(self) -> int:
        """Width of the pooled text that is told beside :data:`MICRO_SIZES` sizes; 0 or less where these do not fit."""
        return (self.micro_channels or 0) - MICRO_SIZES * self.size_channels

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "unet/config.json") -> UNetConfig:
        """Sizes from the parsed file.

        Raises:
            Problems: every value that is malformed, or asks for arithmetic that these U-Nets do not have.
        """
        read = ConfigReader(values, where)
        read.fixed(_UNET_FIXED)
        channels = read.sizes("block_out_channels", (320, 640, 1280, 1280), None)
        count = len(channels)
        down = read.kinds("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), _DOWN_BLOCKS, count)
        up = read.kinds("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, _UP_BLOCKS, count)
        config = cls(
            in_channels=read.whole("in_channels", 4),
            out_channels=read.whole("out_channels", 4),
            block_out_channels=channels,
            layers_per_block=read.sizes("layers_per_block", 2, count, high=64),
            heads=read.sizes("attention_head_dim", 8, count),
            transformer_depth=read.sizes("transformer_layers_per_block", 1, count, high=64),
            attends_down=tuple(kind == "CrossAttnDownBlock2D" for kind in down),
            attends_up=tuple(kind == "CrossAttnUpBlock2D" for kind in reversed(up)),
            cross_attention_dim=read.whole("cross_attention_dim", 1280),
            norm_num_groups=read.whole("norm_num_groups", 32),
            norm_eps=read.number("norm_eps", 1e-5),
            use_linear_projection=read.flag("use_linear_projection", False),
            exact_attention=read.flag("upcast_attention", False),
            **_micro_conditioning(read),
        )
        read.divides("block_out_channels", channels, (config.norm_num_groups,) * count, "norm_num_groups")
        read.divides("block_out_channels", channels, config.heads, "attention_head_dim")
        read.finish(_UNET_HARMLESS)
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Sizes of the text encoder."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    layers: int = 12
    heads: int = 12
    positions: int = 77
    quick_gelu: bool = True
    """``x·sigmoid(1.702x)`` (OpenAI's CLIP, SD1.x) instead of the exact GELU (OpenCLIP, SD2.x)."""
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768
    """Width of the pooled text, where the network has a projection to it (SDXL's second encoder)."""
    end_id: int | None = None
    """Token whose first place in a row the pooled text is taken from; None takes the place of the highest id."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "text_encoder/config.json") -> ClipConfig:
        """Sizes from the parsed file; the many settings around generation in it mean nothing here.

        Raises:
            Problems: every value that is malformed or unknown to this network.
        """
        read = ConfigReader(values, where)
        read.fixed(_CLIP_FIXED)
        config = cls(
            vocab_size=read.whole("vocab_size", 49408, high=1 << 20),
            hidden_size=read.whole("hidden_size", 512),
            intermediate_size=read.whole("intermediate_size", 2048),
            layers=read.whole("num_hidden_layers", 12, high=256),
            heads=read.whole("num_attention_heads", 8),
            positions=read.whole("max_position_embeddings", 77),
            quick_gelu=values.get("hidden_act", "quick_gelu") == "quick_gelu",
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
            projection_dim=read.whole("projection_dim", 512),
            end_id=_end_id(read),
        )
        read.divides("hidden_size", (config.hidden_size,), (config.heads,), "num_attention_heads")
        read.finish(None)
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Sizes of the autoencoder. ``block_out_channels`` runs from the picture's resolution to the latents'."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    """The denoiser sees ``(latents - shift_factor) * scaling_factor``."""
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    """Half precision overflows inside: run in float32 or bfloat16."""

    @property
    def latent_scale(self) -> int:
        """Pixels per latent cell along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "vae/config.json") -> VaeConfig:
        """Sizes from the parsed file.

        Raises:
            Problems: every value that is malformed or unknown to this network.
        """
        read = ConfigReader(values, where)
        read.fixed(_VAE_FIXED)
        channels = read.sizes("block_out_channels", (64,), None)
        count = len(channels)
        read.kinds("down_block_types", ("DownEncoderBlock2D",) * count, ("DownEncoderBlock2D",), count)
        read.kinds("up_block_types", ("UpDecoderBlock2D",) * count, ("UpDecoderBlock2D",), count)
        config = cls(
            in_channels=read.whole("in_channels", 3),
            out_channels=read.whole("out_channels", 3),
            latent_channels=read.whole("latent_channels", 4),
            block_out_channels=channels,
            layers_per_block=read.whole("layers_per_block", 1, high=64),
            norm_num_groups=read.whole("norm_num_groups", 32),
            scaling_factor=read.number("scaling_factor", 0.18215),
            shift_factor=read.number("shift_factor", 0.0, low=None),
            use_quant_conv=read.flag("use_quant_conv", True),
            use_post_quant_conv=read.flag("use_post_quant_conv", True),
            mid_block_add_attention=read.flag("mid_block_add_attention", True),
            force_upcast=read.flag("force_upcast", True),
        )
        read.divides("block_out_channels", channels, (config.norm_num_groups,) * count, "norm_num_groups")
        read.finish(_VAE_HARMLESS)
        return config


class ConfigReader:
    """Reads a network's ``config.json`` value by value, remembers what was asked for, and collects everything wrong.

    Each method answers with the default where the value is wrong, so that one reading finds all problems; :meth:`finish` then raises
    them. Nothing that was read may be used before.

    Attributes:
        values: the parsed file.
        where: what to name in messages.
        problems: found so far.
        asked: settings that were read, or may be there.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """
        Raises:
            UserError: ``values`` is no JSON object.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"{where} holds a {type(values).__name__}; a JSON object of settings was expected.")
        self.values, self.where = values, where
        self.problems: list[Problem] = []
        self.asked: set[str] = set()

    def fixed(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Settings that may be absent or have one of a few values, and no other."""
        for key, options in allowed.items():
            self.asked.add(key)
            given = self.values.get(key, options[0])
            if not any(given == option and isinstance(given, bool) == isinstance(option, bool) for option in options):
                self.wrong(key, given, " or ".join(map(repr, options)))

    def whole(self, key: str, default: int, high: int = 1 << 16) -> int:
        """A whole number in [1, high]."""
        self.asked.add(key)
        given = self.values.get(key, default)
        if not _is_size(given, high):
            self.wrong(key, given, f"a whole number from 1 to {high}")
            return default
        return given

    def number(self, key: str, default: float, low: float | None = 0.0) -> float:
        """A number above ``low``; null means the default."""
        self.asked.add(key)
        given = self.values.get(key)
        if given is None:
            return default
        if (
            isinstance(given, bool)
            or not isinstance(given, int | float)
            or not abs(given) < 1e6
            or (low is not None and given <= low)
        ):
            self.wrong(key, given, "a number" if low is None else f"a number above {low:g}")
            return default
        return float(given)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null means the default."""
        self.asked.add(key)
        given = self.values.get(key)
        if given is None:
            return default
        if not isinstance(given, bool):
            self.wrong(key, given, "true or false")
            return default
        return given

    def sizes(
        self, key: str, default: int | tuple[int, ...], count: int | None, high: int = 1 << 16
    ) -> tuple[int, ...]:
        """One whole number for all resolutions, or a list with one for each; ``count`` None takes a list of any length."""
        self.asked.add(key)
        given = self.values.get(key, default)
        listed = [given] * count if count and _is_size(given, high) else given
        good = (
            isinstance(listed, list | tuple) and 0 < len(listed) <= 16 and all(_is_size(size, high) for size in listed)
        )
        if not good or (count and len(listed) != count):
            self.wrong(key, given, f"a list of {count or 'up to 16'} whole numbers from 1 to {high}")
            return (default,) * (count or 1) if isinstance(default, int) else default
        return tuple(listed)

    def kinds(self, key: str, default: tuple[str, ...], allowed: tuple[str, ...], count: int) -> tuple[str, ...]:
        """A list of ``count`` block names."""
        self.asked.add(key)
        given = self.values.get(key, default)
        if not isinstance(given, list | tuple) or len(given) != count or any(kind not in allowed for kind in given):
            self.wrong(key, given, f"a list of {count} of {' | '.join(allowed)}")
            return (allowed[0],) * count
        return tuple(given)

    def divides(self, key: str, whole: tuple[int, ...], parts: tuple[int, ...], other: str) -> None:
        """Each of ``whole`` must be a multiple of its entry in ``parts``."""
        if any(size % part for size, part in zip(whole, parts, strict=False)):
            self.wrong(key, list(whole), f"multiples of {other} ({', '.join(map(str, dict.fromkeys(parts)))})")

    def wrong(self, key: str, given: Any, allowed: str) -> None:
        """Note that ``key`` holds something this network cannot be built with."""
        shown = repr(given)
        self.problems.append(
            Problem(key, f"is {shown if len(shown) <= 80 else shown[:77] + '...'}; allowed here: {allowed}.")
        )

    def finish(self, harmless: frozenset[str] | None, kind: str = "Stable Diffusion 1.x, 2.x or XL") -> None:
        """Refuse settings nobody asked for, unless they are switched off.

        Args:
            harmless: settings that may be there and change nothing here; None means any may be.
            kind: what the network should be, for the message.

        Raises:
            Problems: anything was wrong.
        """
        if harmless is not None:
            for key in sorted(self.values.keys() - self.asked - harmless):
                if not key.startswith("_") and self.values[key] not in (None, False):
                    self.problems.append(Problem(key, "is not a setting of this kind of network."))
        if self.problems:
            raise Problems(self.where, self.problems, f"It is not a {kind} network, or its file is damaged.")


def _micro_conditioning(read: ConfigReader) -> dict[str, int]:
    """Widths of what SDXL is told besides the text's tokens; nothing for networks that are told nothing."""
    if read.values.get("addition_embed_type") != "text_time":
        return {}
    width, each = read.whole("projection_class_embeddings_input_dim", 0), read.whole("addition_time_embed_dim", 0)
    if 0 < width <= MICRO_SIZES * each:
        more = f"more than {MICRO_SIZES} times addition_time_embed_dim ({each})"
        read.wrong("projection_class_embeddings_input_dim", width, more)
    return {"micro_channels": width, "size_channels": each}


def _end_id(read: ConfigReader) -> int | None:
    """The end token's id. 2 is what old files say of every model, wrongly: then it is the highest id, as it is in CLIP's vocabulary."""
    given = read.whole("eos_token_id", 49407, high=1 << 20)
    return given if given != 2 else None


def _is_size(given: Any, high: int) -> bool:
    return isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= high
